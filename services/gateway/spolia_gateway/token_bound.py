"""How many bytes of text one token can stand for at most, told from a parsed `tokenizer.json`.

With it a text too long for any context is refused before the seconds that encoding it would take.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tokenizers import pre_tokenizers

Json = Mapping[str, Any]

NFC_SHRINKS_BY = 4
"""NFC takes a text's bytes down to no less than 2 of 7 (U+1FBE U+0308 U+0301 becomes U+0390); rounded up."""

_BYTE_ALPHABET = frozenset(pre_tokenizers.ByteLevel.alphabet())
_FALLBACK_ALPHABET = frozenset(f"<0x{byte:02X}>" for byte in range(256))


def max_bytes_per_token(tokenizer: Json) -> int | None:
    """The bound; None where there is none: a tokenizer that may drop or fold text makes no token of some of it.

    It holds for byte-level and byte-fallback BPE behind normalizers and pre-tokenizers that are known to keep text.
    """
    shrinks_by = _normalizer_shrinks_by(tokenizer.get("normalizer"))
    entry_bytes = _longest_entry(tokenizer["model"], tokenizer.get("pre_tokenizer"))
    added = tokenizer.get("added_tokens") or ()
    if shrinks_by is None or entry_bytes is None or any(token.get("lstrip") or token.get("rstrip") for token in added):
        return None  # stripping takes any amount of white space into one token
    return shrinks_by * max([entry_bytes, *(len(token["content"].encode()) for token in added)])


def _longest_entry(model: Json, pre_tokenizer: Json | None) -> int | None:
    """Bytes of the longest vocabulary entry; None unless every byte of a text becomes part of one."""
    splits = _flat(pre_tokenizer, "pretokenizers")
    if model.get("type") != "BPE" or not all(_keeps_text(node) for node in splits):
        return None
    vocab = model["vocab"]
    if any(node["type"] == "ByteLevel" for node in splits) and vocab.keys() >= _BYTE_ALPHABET:
        return max(map(len, vocab))  # a character for each byte
    if model.get("byte_fallback") and vocab.keys() >= _FALLBACK_ALPHABET:
        return max(len(entry.encode()) for entry in vocab)
    return None


def _keeps_text(node: Json) -> bool:
    if node["type"] == "Split":
        return bool(node["behavior"] != "Removed")
    return node["type"] in ("ByteLevel", "Metaspace", "Digits")


def _normalizer_shrinks_by(normalizer: Json | None) -> int | None:
    """The factor by which a text may lose bytes; None when it is not known."""
    factor = 1
    for node in _flat(normalizer, "normalizers"):
        if node["type"] == "NFC":
            factor *= NFC_SHRINKS_BY
        elif node["type"] != "Prepend" and not _grows(node):
            return None
    return factor


def _grows(node: Json) -> bool:
    """Whether this is a replacement by something no shorter, as of a space by "▁"."""
    if node["type"] != "Replace" or "String" not in node["pattern"]:
        return False
    return len(node["content"].encode()) >= len(node["pattern"]["String"].encode())


def _flat(node: Json | None, children: str) -> list[Json]:
    """A node as the list of nodes that a `Sequence` of them stands for."""
    if node is None:
        return []
    if node["type"] == "Sequence":
        return [inner for child in node[children] for inner in _flat(child, children)]
    return [node]
