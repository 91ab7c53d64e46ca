"""A model's tokens as the bytes they add to a text, for the grammar library."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llguidance import LLTokenizer, TokenizerWrapper

from spolia_core.errors import NotSupported


def load_vocabulary(model_path: Path, vocab_size: int, eos_token_ids: frozenset[int]) -> LLTokenizer:
    """The tokens of a model directory's `tokenizer.json`; a second for 150 thousand.

    It has at least `vocab_size` tokens, and one behind all where the model has no end-of-sequence token: the library
    wants one. Raises `NotSupported` for a tokenizer whose tokens have no bytes of their own.
    """
    text = (model_path / "tokenizer.json").read_text(encoding="utf-8")
    read = json.loads(text)
    num_tokens = max(vocab_size, _num_tokens(read))
    own = {each["content"]: each["id"] for each in read.get("added_tokens", ()) if not each["special"]}
    try:
        tokens = LLTokenizer(text, n_vocab=num_tokens, eos_token=sorted(eos_token_ids) or [0])
        return tokens if eos_token_ids and not own else _spelled(tokens, own, eos_token_ids)
    except (ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise NotSupported(
            f"constraints do not work with this model's tokenizer: {reason}", field="model", actual=str(model_path)
        ) from error


def _num_tokens(tokenizer: dict[str, Any]) -> int:
    """One more than the largest id of a read `tokenizer.json`."""
    vocab = tokenizer["model"]["vocab"]  # token to id, or a list of tokens
    ids: list[int] = [each["id"] for each in tokenizer.get("added_tokens", ())]
    ids += vocab.values() if isinstance(vocab, dict) else range(len(vocab))
    return 1 + max(ids, default=-1)


def _spelled(tokens: LLTokenizer, own: dict[str, int], eos_token_ids: frozenset[int]) -> LLTokenizer:
    """The same tokens, but that those of `own`, `<tool_call>` for example, are text like any other.

    Decoding does not leave them out; the library takes all added tokens for control tokens, which no text contains.
    """
    eos = sorted(eos_token_ids) or [tokens.vocab_size]
    spelled = _Spelled(tokens, own, eos)
    return LLTokenizer(TokenizerWrapper(spelled), n_vocab=len(spelled.tokens), eos_token=eos)


class _Spelled:
    """What the library asks of a tokenizer: the bytes of each token, and the tokens of a text."""

    def __init__(self, tokens: LLTokenizer, own: dict[str, int], eos: list[int]) -> None:
        self.eos_token_id = eos[0]
        self.bos_token_id = None
        self.tokens = [tokens.decode_bytes([token_id]) for token_id in range(tokens.vocab_size)]
        self.tokens += [b"<end>" for token_id in eos if token_id == len(self.tokens)]
        for content, token_id in own.items():
            self.tokens[token_id] = content.encode()
        control = {token_id for token_id in range(tokens.vocab_size) if tokens.is_special_token(token_id)}
        self.special_token_ids = sorted((control | set(eos)) - set(own.values()))
        self._tokens = tokens
        self._own = own
        longest_first = sorted(own, key=len, reverse=True)
        own_or_nothing = "|".join(map(re.escape, longest_first)) or r"(?!)"
        self._split: Callable[[str], list[str]] = re.compile(f"({own_or_nothing})").split

    def __call__(self, text: bytes) -> list[int]:
        """The tokens of UTF-8 `text`, which the library prefers where only one text can follow."""
        if not isinstance(text, bytes):
            raise TypeError("bytes are expected")
        token_ids: list[int] = []
        for piece in self._split(text.decode("utf-8", errors="surrogateescape")):
            if piece in self._own:
                token_ids.append(self._own[piece])
            elif piece:
                token_ids += self._tokens.tokenize_bytes(piece.encode("utf-8", errors="surrogateescape"))
        return token_ids
