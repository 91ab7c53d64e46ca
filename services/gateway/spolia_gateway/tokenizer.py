"""Encodes prompt parts, each on its own: the same text gives the same ids wherever it stands."""

from __future__ import annotations

import json
from array import array
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from itertools import takewhile
from pathlib import Path
from typing import Any

from blake3 import blake3
from tokenizers import Tokenizer

from spolia_core.errors import NotFound
from spolia_gateway.prefix_space import without_dummy_prefix
from spolia_gateway.token_bound import max_bytes_per_token
from spolia_gateway.token_cache import TokenCache

DEFAULT_CACHE_BYTES = 64 << 20


class Form(Enum):
    """What a text is in its prompt; decides how it is encoded."""

    HEAD = "head"
    """Text that starts the prompt: keeps the dummy prefix, where the tokenizer adds one."""
    BODY = "body"
    """Text further on: no dummy prefix. Special tokens spelled out in it (chat templates) are special tokens."""
    DOCUMENT = "document"
    """Reusable text: no dummy prefix wherever it stands, so that it has one id; and no special tokens, so that
    a file which spells one out cannot end a turn."""


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


class PartTokenizer:
    """Text to token ids, special tokens off. Safe to call from several threads; keeps recent results."""

    def __init__(self, files: TokenizerFiles, *, cache_bytes: int = DEFAULT_CACHE_BYTES) -> None:
        source = dict(files.tokenizer)
        plain = without_dummy_prefix(source)
        body = _load(plain)
        document = _load(plain)
        document.encode_special_tokens = True  # spell special tokens out instead of parsing them
        head = body if plain == source else _load(source)
        self._tokenizers = {Form.HEAD: head, Form.BODY: body, Form.DOCUMENT: document}
        self._has_prefix = head is not body
        self._cache = TokenCache(cache_bytes)
        self.bos_ids = _bos_ids(head, files.tokenizer_config)
        """Ids that the tokenizer puts before a prompt; usually one or none."""
        self.max_bytes_per_token = max_bytes_per_token(source)
        """The most bytes of text that one token stands for; None where there is no such bound."""

    @classmethod
    def from_model(cls, model: Path, *, cache_bytes: int = DEFAULT_CACHE_BYTES) -> PartTokenizer:
        """Loads the tokenizer of a Hugging Face-format directory. Raises `NotFound` when there is none."""
        return cls(TokenizerFiles.read(model), cache_bytes=cache_bytes)

    @property
    def vocab_size(self) -> int:
        """Number of ids this tokenizer knows, added tokens included."""
        return int(self._tokenizers[Form.BODY].get_vocab_size(with_added_tokens=True))

    def encode(self, text: str, form: Form, *, tenant_id: str) -> tuple[int, ...]:
        """Ids of `text` alone; may be empty. Not cached, a megabyte takes about a second: keep it off the event loop.

        Other threads run meanwhile. The cache is kept per tenant: nobody can tell from the time taken what another
        tenant has encoded.
        """
        if form is Form.HEAD and not self._has_prefix:
            form = Form.BODY
        key = blake3(f"{form.value}\0{tenant_id}\0{text}".encode()).digest()
        cached = self._cache.get(key)
        if cached is None:
            # Of the ways to encode, only the batched ones let other threads run.
            (encoding,) = self._tokenizers[form].encode_batch_fast([text], add_special_tokens=False)
            cached = array("I", encoding.ids)
            self._cache.put(key, cached)
        return tuple(cached)


def _load(source: Mapping[str, Any]) -> Tokenizer:
    tokenizer = Tokenizer.from_str(json.dumps(source))
    tokenizer.no_truncation()  # a file may carry the limits of its training
    tokenizer.no_padding()
    return tokenizer


def _bos_ids(tokenizer: Tokenizer, config: Mapping[str, Any]) -> tuple[int, ...]:
    """As `add_bos_token` says where the config states it; else the special tokens the post-processor puts first."""
    stated = config.get("add_bos_token")
    if stated is None:
        encoding = tokenizer.encode("a", add_special_tokens=True)
        marked = zip(encoding.ids, encoding.special_tokens_mask, strict=True)
        return tuple(token_id for token_id, _ in takewhile(lambda pair: pair[1], marked))
    bos = config.get("bos_token")
    text = bos.get("content") if isinstance(bos, dict) else bos
    if not stated or text is None:
        return ()
    token_id = tokenizer.token_to_id(text)
    if token_id is None:
        raise NotFound(f"the tokenizer has no token {text!r}, its bos_token", field="bos_token", actual=str(text))
    return (token_id,)
