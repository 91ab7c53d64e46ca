"""Text to token ids as a prompt's parts are encoded: each alone, special tokens off, no dummy prefix."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from spolia_core.errors import NotFound


class TextEncoder:
    """Encodes parts with a model's own tokenizer; text that spells a special token out stays text."""

    def __init__(self, tokenizer: dict[str, Any], config: dict[str, Any]) -> None:
        whole = Tokenizer.from_str(json.dumps(tokenizer))
        self._tokenizer = Tokenizer.from_str(json.dumps(_without_dummy_prefix(tokenizer)))
        self._tokenizer.no_truncation()  # a file may carry the limits of its training
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True
        self.bos_ids = _bos_ids(whole, config)
        """What stands before a prompt; usually one id or none."""
        self.eos_ids = _named(whole, config, "eos_token")
        """What ends an answer; empty for a tokenizer that names no such token."""

    @classmethod
    def from_model(cls, model: str | Path) -> TextEncoder:
        """Reads `tokenizer.json` and, where present, `tokenizer_config.json` of a model directory.

        Raises `NotFound` when there is no readable `tokenizer.json`.
        """
        path = Path(model)
        try:
            tokenizer = json.loads((path / "tokenizer.json").read_text(encoding="utf-8"))
            config_path = path / "tokenizer_config.json"
            config = json.loads(config_path.read_text(encoding="utf-8")) if config_path.exists() else {}
        except (OSError, ValueError) as error:
            raise NotFound(f"no readable tokenizer in {path}: {error}", field="model", actual=str(path)) from error
        return cls(tokenizer, config)

    def encode(self, text: str) -> tuple[int, ...]:
        """Ids of `text` alone; may be empty."""
        return self.encode_all([text])[0]

    def encode_all(self, texts: Sequence[str]) -> list[tuple[int, ...]]:
        """Ids of each text alone, in order."""
        found = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [tuple(encoding.ids) for encoding in found]

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of ids, special tokens left out."""
        return str(self._tokenizer.decode(list(token_ids), skip_special_tokens=True))


def _without_dummy_prefix(node: Any) -> Any:
    """A parsed `tokenizer.json` that adds no space of its own before a text.

    Such a space is added by a `Prepend` normalizer, or by a `Metaspace` or `ByteLevel` pre-tokenizer.
    """
    if not isinstance(node, dict):
        return node
    changed = dict(node)
    for field in ("normalizer", "pre_tokenizer"):
        if isinstance(node.get(field), dict):
            changed[field] = None if node[field].get("type") == "Prepend" else _without_dummy_prefix(node[field])
    for field in ("normalizers", "pretokenizers"):
        if isinstance(node.get(field), list):
            changed[field] = [_without_dummy_prefix(child) for child in node[field] if child.get("type") != "Prepend"]
    if node.get("type") == "Metaspace":
        changed.pop("add_prefix_space", None)  # the older spelling
        changed["prepend_scheme"] = "never"
    if node.get("type") == "ByteLevel" and "add_prefix_space" in node:
        changed["add_prefix_space"] = False
    return changed


def _bos_ids(tokenizer: Tokenizer, config: dict[str, Any]) -> tuple[int, ...]:
    """As `add_bos_token` says where the config states it; else the special tokens put before any text."""
    if config.get("add_bos_token") is None:
        encoding = tokenizer.encode("a", add_special_tokens=True)
        marked = zip(encoding.ids, encoding.special_tokens_mask, strict=True)
        return tuple(token_id for token_id, is_special in takewhile(lambda pair: pair[1], marked))
    return _named(tokenizer, config, "bos_token") if config["add_bos_token"] else ()


def _named(tokenizer: Tokenizer, config: dict[str, Any], field: str) -> tuple[int, ...]:
    token = config.get(field)
    text = token.get("content") if isinstance(token, dict) else token
    if text is None:
        return ()
    token_id = tokenizer.token_to_id(text)
    if token_id is None:
        raise NotFound(f"the tokenizer has no token {text!r}, its {field}", field=field, actual=str(text))
    return (token_id,)
