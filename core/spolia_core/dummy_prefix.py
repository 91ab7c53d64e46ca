"""Takes the dummy prefix out of a tokenizer: the space that some tokenizers put before whatever they encode.

SentencePiece-like tokenizers encode "Once" as "▁Once". At the start of a prompt that is what the model was trained on;
before a part that stands inside one it would be a space nobody wrote.
"""

from __future__ import annotations

from typing import Any

Json = dict[str, Any]


def without_dummy_prefix(tokenizer: Json) -> Json:
    """A copy of a parsed `tokenizer.json` that encodes text as it is. Equal to its argument when it already does."""
    changed = dict(tokenizer)
    changed["normalizer"] = _normalizer(tokenizer.get("normalizer"))
    changed["pre_tokenizer"] = _pre_tokenizer(tokenizer.get("pre_tokenizer"))
    return changed


def _normalizer(node: Json | None) -> Json | None:
    """A `Prepend` goes; what surrounds it stays, in order."""
    if node is None or node["type"] == "Prepend":
        return None
    if node["type"] == "Sequence":
        kept = [_normalizer(child) for child in node["normalizers"]]
        return {**node, "normalizers": [child for child in kept if child is not None]}
    return node


def _pre_tokenizer(node: Json | None) -> Json | None:
    """`Metaspace` and `ByteLevel` keep splitting and only stop adding a prefix."""
    if node is None:
        return None
    if node["type"] == "Sequence":
        return {**node, "pretokenizers": [_pre_tokenizer(child) for child in node["pretokenizers"]]}
    if node["type"] == "Metaspace":
        kept = {key: value for key, value in node.items() if key != "add_prefix_space"}  # the older spelling
        return {**kept, "prepend_scheme": "never"}
    if node["type"] == "ByteLevel":
        return {**node, "add_prefix_space": False}
    return node
