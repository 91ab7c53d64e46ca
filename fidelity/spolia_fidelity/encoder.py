"""Text to token ids as a prompt's parts are encoded: each alone, special tokens off, no dummy prefix."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from spolia_core.dummy_prefix import without_dummy_prefix
from spolia_core.tokenizer_files import TokenizerFiles, load_tokenizer


class TextEncoder:
    """Encodes parts with a model's own tokenizer; text that spells a special token out stays text."""

    def __init__(self, files: TokenizerFiles) -> None:
        source = dict(files.tokenizer)
        whole = load_tokenizer(source)
        self._tokenizer = load_tokenizer(without_dummy_prefix(source))
        self._tokenizer.encode_special_tokens = True
        self.bos_ids = files.bos_ids(whole)
        """What stands before a prompt; usually one id or none."""
        self.eos_ids = files.eos_ids(whole)
        """What ends an answer; empty for a tokenizer that names no such token."""

    @classmethod
    def from_model(cls, model: str | Path) -> TextEncoder:
        """Reads the tokenizer of a model directory. Raises `NotFound` when there is none."""
        return cls(TokenizerFiles.read(Path(model)))

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
