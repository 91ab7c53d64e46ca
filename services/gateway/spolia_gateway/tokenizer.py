"""Encodes prompt parts, each on its own: the same text gives the same ids wherever it stands."""

from __future__ import annotations

from array import array
from enum import Enum
from itertools import accumulate
from pathlib import Path

from blake3 import blake3
from tokenizers import Encoding

from spolia_core.dummy_prefix import without_dummy_prefix
from spolia_core.tokenizer_files import TokenizerFiles, load_tokenizer
from spolia_gateway.split import EncodedText
from spolia_gateway.token_bound import max_bytes_per_token
from spolia_gateway.token_cache import TokenCache

DEFAULT_CACHE_BYTES = 64 << 20
_STARTS = b"starts"


class Form(Enum):
    """What a text is in its prompt; decides how it is encoded."""

    HEAD = "head"
    """Text that starts the prompt: keeps the dummy prefix, where the tokenizer adds one."""
    BODY = "body"
    """Text further on: no dummy prefix. Special tokens spelled out in it (chat templates) are special tokens."""
    DOCUMENT = "document"
    """Reusable text: no dummy prefix wherever it stands, so that it has one id; and no special tokens, so that
    a file which spells one out cannot end a turn."""


class PartTokenizer:
    """Text to token ids, special tokens off. Safe to call from several threads; keeps recent results."""

    def __init__(self, files: TokenizerFiles, *, cache_bytes: int = DEFAULT_CACHE_BYTES) -> None:
        source = dict(files.tokenizer)
        plain = without_dummy_prefix(source)
        body = load_tokenizer(plain)
        document = load_tokenizer(plain)
        document.encode_special_tokens = True  # spell special tokens out instead of parsing them
        head = body if plain == source else load_tokenizer(source)
        self._tokenizers = {Form.HEAD: head, Form.BODY: body, Form.DOCUMENT: document}
        self._has_prefix = head is not body
        self._cache = TokenCache(cache_bytes)
        self.bos_ids = files.bos_ids(head)
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

    def piece_of(self, token_id: int) -> str | None:
        """A token as the vocabulary spells it; None for an id it has not."""
        piece: str | None = self._tokenizers[Form.BODY].id_to_token(token_id)
        return piece

    def encode(self, text: str, form: Form, *, tenant_id: str) -> tuple[int, ...]:
        """Ids of `text` alone; may be empty. Not cached, a megabyte takes about a second: keep it off the event loop.

        Other threads run meanwhile. The cache is kept per tenant: nobody can tell from the time taken what another
        tenant has encoded.
        """
        if form is Form.HEAD and not self._has_prefix:
            form = Form.BODY
        key = _key(form, tenant_id, text)
        cached = self._cache.get(key)
        if cached is None:
            # Of the ways to encode, only the batched ones let other threads run.
            (encoding,) = self._tokenizers[form].encode_batch_fast([text], add_special_tokens=False)
            cached = array("I", encoding.ids)
            self._cache.put(key, cached)
        return tuple(cached)

    def encode_with_starts(self, text: str, *, tenant_id: str) -> EncodedText:
        """`encode` of a document, and the character of `text` at which each token begins. Slower; cached beside it."""
        key = _key(Form.DOCUMENT, tenant_id, text)
        token_ids, starts = self._cache.get(key), self._cache.get(key + _STARTS)
        if token_ids is None or starts is None:
            (encoding,) = self._tokenizers[Form.DOCUMENT].encode_batch([text], add_special_tokens=False)
            token_ids, starts = array("I", encoding.ids), _starts_of(encoding)
            self._cache.put(key, token_ids)
            self._cache.put(key + _STARTS, starts)
        return EncodedText(text, tuple(token_ids), starts)


def cache_scope(tenant_id: str, cache_salt: str) -> str:
    """Who finds what was tokenized for a request: to `PartTokenizer`, another salt is another tenant."""
    return f"{tenant_id}\0{cache_salt}" if cache_salt else tenant_id


def _key(form: Form, tenant_id: str, text: str) -> bytes:
    return blake3(f"{form.value}\0{len(tenant_id)}\0{tenant_id}\0{text}".encode()).digest()


def _starts_of(encoding: Encoding) -> array[int]:
    """Characters of the text as it was given, also where a normalizer changed it; made never to decrease."""
    return array("I", accumulate((start for start, _ in encoding.offsets), max))
