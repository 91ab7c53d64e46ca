"""A model's tokenizer as its files describe it: how it is loaded, and the tokens that begin and end a sequence."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from spolia_core.errors import NotFound


@dataclass(frozen=True, slots=True)
class TokenizerFiles:
    """What a Hugging Face-format model directory says about its tokenizer, parsed."""

    tokenizer: Mapping[str, Any]
    tokenizer_config: Mapping[str, Any]

    @classmethod
    def read(cls, model: Path) -> TokenizerFiles:
        """Reads `tokenizer.json` and, where present, `tokenizer_config.json`.

        Raises `NotFound` when there is no readable `tokenizer.json`.
        """
        path = model / "tokenizer.json"
        try:
            tokenizer = json.loads(path.read_text(encoding="utf-8"))
            config_path = model / "tokenizer_config.json"
            config = json.loads(config_path.read_text(encoding="utf-8")) if config_path.exists() else {}
        except (OSError, ValueError) as error:
            raise NotFound(f"no readable tokenizer in {model}: {error}", field="model", actual=str(model)) from error
        return cls(tokenizer, config)

    def bos_ids(self, tokenizer: Tokenizer) -> tuple[int, ...]:
        """What stands before a prompt; usually one id or none.

        As `add_bos_token` says where the config states it; else the special tokens the post-processor puts first.
        Raises `NotFound` for a token that the tokenizer has not.
        """
        stated = self.tokenizer_config.get("add_bos_token")
        if stated is None:
            encoding = tokenizer.encode("a", add_special_tokens=True)
            marked = zip(encoding.ids, encoding.special_tokens_mask, strict=True)
            return tuple(token_id for token_id, _ in takewhile(lambda pair: pair[1], marked))
        return self._named(tokenizer, "bos_token") if stated else ()

    def eos_ids(self, tokenizer: Tokenizer) -> tuple[int, ...]:
        """What ends an answer; empty where the config names no such token. Raises `NotFound` as `bos_ids` does."""
        return self._named(tokenizer, "eos_token")

    def _named(self, tokenizer: Tokenizer, field: str) -> tuple[int, ...]:
        token = self.tokenizer_config.get(field)
        text = token.get("content") if isinstance(token, dict) else token
        if text is None:
            return ()
        token_id = tokenizer.token_to_id(text)
        if token_id is None:
            raise NotFound(f"the tokenizer has no token {text!r}, its {field}", field=field, actual=str(text))
        return (token_id,)


def load_tokenizer(source: Mapping[str, Any]) -> Tokenizer:
    """A tokenizer from a parsed `tokenizer.json`, without the truncation and padding of its training."""
    tokenizer = Tokenizer.from_str(json.dumps(source))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer
