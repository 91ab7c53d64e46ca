"""What single tokens say, as bytes: for answers that name tokens and not only text."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_DUMMY = "\u2581"


class TokenTexts:
    """Bytes of each token of a tokenizer. A token may be a part of a character, so its bytes need not be text."""

    def __init__(self, tokenizer: Mapping[str, Any], piece_of: Callable[[int], str | None]) -> None:
        """Of a parsed `tokenizer.json`; `piece_of` gives tokens as its vocabulary spells them."""
        self._piece_of = piece_of
        added = tokenizer.get("added_tokens") or ()
        self._known: dict[int, bytes] = {int(token["id"]): str(token["content"]).encode() for token in added}
        self._char_to_byte = _byte_alphabet() if _is_byte_level(tokenizer.get("decoder")) else None

    def bytes_of(self, token_id: int) -> bytes:
        """What the token adds to the text; empty for an id the tokenizer has no token for."""
        found = self._known.get(token_id)
        if found is None:
            piece = self._piece_of(token_id)
            found = self._known[token_id] = b"" if piece is None else self._decoded(piece)
        return found

    def name_of(self, token_id: int) -> str:
        """The token as text; one that is no whole text by its bytes, as "bytes:\\xe6\\xbc"."""
        raw = self.bytes_of(token_id)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)

    def _decoded(self, piece: str) -> bytes:
        if self._char_to_byte is not None:
            return bytes(self._char_to_byte[char] for char in piece if char in self._char_to_byte)
        byte = _BYTE_PIECE.fullmatch(piece)
        return bytes([int(byte.group(1), 16)]) if byte else piece.replace(_DUMMY, " ").encode()


def _is_byte_level(decoder: Mapping[str, Any] | None) -> bool:
    if decoder is None:
        return False
    if decoder["type"] == "Sequence":
        return any(_is_byte_level(child) for child in decoder["decoders"])
    return bool(decoder["type"] == "ByteLevel")


def _byte_alphabet() -> dict[str, int]:
    """The characters in which byte-level BPE writes bytes: printable ones stand for themselves, the others, in order,
    for those from U+0100 on.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}
