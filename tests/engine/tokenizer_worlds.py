"""Tokenizers made to measure: any text, cut into tokens anywhere, behind the decoders that real models use."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models

from spolia_engine.text import Decode

SPECIAL = "<|special|>"
LETTERS_AND_WORSE = [*"ab .,\n", "é", "ß", "中", "文", "😀", "🏳", "\u200d", "e\u0301", "👩\u200d🚀", "\u0e01\u0e33"]
TEXTS = st.lists(st.sampled_from(LETTERS_AND_WORSE), max_size=24).map("".join)


@dataclass(frozen=True)
class Tokenized:
    """Token ids and the decoder they belong to."""

    ids: list[int]
    decode: Decode

    @property
    def text(self) -> str:
        """All ids decoded at once."""
        return self.decode(self.ids)


def _tokenizer(pieces: Sequence[str], decoder: decoders.Decoder) -> Tokenized:
    vocab = {piece: index for index, piece in enumerate(dict.fromkeys([*pieces, "?unknown?"]))}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="?unknown?"))
    tokenizer.decoder = decoder
    tokenizer.add_special_tokens([AddedToken(SPECIAL, special=True)])
    ids = tokenizer.get_vocab()
    return Tokenized([ids[piece] for piece in pieces], lambda token_ids: str(tokenizer.decode(list(token_ids))))


def _byte_letters() -> dict[int, str]:
    """The letters in which byte-level tokenizers write bytes: printable ones as they are, the others from 256 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return {**{b: chr(b) for b in printable}, **{b: chr(256 + i) for i, b in enumerate(others)}}


LETTERS = _byte_letters()


def byte_level(data: bytes, cuts: Sequence[int]) -> Tokenized:
    """Bytes cut at `cuts` (any order, any values), as a byte-level tokenizer would hold them."""
    borders = sorted({0, len(data), *(c % (len(data) + 1) for c in cuts)})
    pieces = [data[a:b] for a, b in pairwise(borders)]
    return _tokenizer(["".join(LETTERS[b] for b in piece) for piece in pieces], decoders.ByteLevel())


def sentence_piece(text: str, cuts: Sequence[int], as_bytes: Sequence[bool], specials: Sequence[int] = ()) -> Tokenized:
    """Text behind a dummy prefix, cut at `cuts`; characters whose turn in `as_bytes` says so fall back to bytes."""
    borders = {0, len(text), *(c % (len(text) + 1) for c in cuts)}
    pieces: list[str] = ["▁"]
    for index, character in enumerate(text):
        if as_bytes and as_bytes[index % len(as_bytes)]:
            pieces += [f"<0x{byte:02X}>" for byte in character.encode()]
        elif index in borders or pieces[-1].startswith("<0x"):
            pieces.append(character.replace(" ", "▁"))
        else:
            pieces[-1] += character.replace(" ", "▁")
    for place in specials:
        pieces.insert(place % (len(pieces) + 1), SPECIAL)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    return _tokenizer(pieces, decoders.Sequence(steps))


@st.composite
def tokenized(draw: st.DrawFn) -> Tokenized:
    """Valid text under either kind of tokenizer, cut anywhere."""
    text, cuts = draw(TEXTS), draw(st.lists(st.integers(0, 200), max_size=30))
    if draw(st.booleans()):
        return byte_level(text.encode(), cuts)
    as_bytes = draw(st.lists(st.booleans(), max_size=5))
    return sentence_piece(text, cuts, as_bytes, draw(st.lists(st.integers(0, 200), max_size=2)))
