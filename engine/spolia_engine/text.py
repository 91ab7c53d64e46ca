"""Token ids to text, as they come: incremental detokenization and stop strings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from tokenizers import Tokenizer

from spolia_core.errors import NotFound

REPLACEMENT = "\ufffd"
Decode = Callable[[Sequence[int]], str]
"""Token ids to text, special tokens left out."""


def load_decode(model_path: str | Path) -> Decode:
    """The decoder of a model directory's `tokenizer.json`. Raises `NotFound` when there is none."""
    path = Path(model_path) / "tokenizer.json"
    if not path.is_file():
        raise NotFound(f"no tokenizer.json in {model_path}", field="model", actual=str(model_path))
    tokenizer = Tokenizer.from_file(str(path))
    return lambda token_ids: str(tokenizer.decode(list(token_ids), skip_special_tokens=True))


class IncrementalText:
    """Final text of a growing list of token ids; a function of the ids alone, so a replay gives the same text.

    Text is held back while it ends in an unfinished UTF-8 sequence, or in what may be the beginning of a stop string.
    """

    def __init__(self, decode: Decode, stop: Sequence[str] = ()) -> None:
        self._decode = decode
        self._stop = tuple(stop)
        self._ids: list[int] = []
        self._window_start = 0
        self._window_text = ""
        self._decoded = ""
        self._emitted = 0
        self.stopped = False
        """A stop string has appeared; the text ends before it."""

    @property
    def num_emitted(self) -> int:
        """Unicode code points returned so far."""
        return self._emitted

    @property
    def emitted(self) -> str:
        """Text returned so far."""
        return self._decoded[: self._emitted]

    def push(self, token_id: int) -> str:
        """Adds a token; returns the text that has become final."""
        if self.stopped:
            raise AssertionError("no tokens after a stop string")
        self._ids.append(token_id)
        self._decode_new()
        for text in self._stop:
            found = self._decoded.find(text, max(0, self._emitted - len(text)))
            if found >= 0:
                self.stopped = True
                self._decoded = self._decoded[:found]
        return self._take(len(self._decoded) - (0 if self.stopped else self._held_back()))

    def finish(self) -> str:
        """The rest of the text, an unfinished UTF-8 sequence as replacement characters."""
        if not self.stopped:
            self._decoded += self._decode(self._ids[self._window_start :])[len(self._window_text) :]
            self._window_start, self._window_text = len(self._ids), ""
        return self._take(len(self._decoded))

    def skip(self, num_code_points: int) -> None:
        """Marks text as given out already: a replay goes on after it."""
        self._emitted = max(self._emitted, num_code_points)

    def _decode_new(self) -> None:
        # Decoding a window that begins at a token whose text is settled keeps merges across tokens right at a cost
        # that does not grow with the text.
        text = self._decode(self._ids[self._window_start :])
        if text.endswith(REPLACEMENT) or len(text) <= len(self._window_text):
            return
        self._decoded += text[len(self._window_text) :]
        self._window_start = len(self._ids) - 1
        self._window_text = self._decode(self._ids[self._window_start :])

    def _held_back(self) -> int:
        pending = self._decoded[self._emitted :]
        longest = 0
        for text in self._stop:
            for size in range(min(len(text) - 1, len(pending)), longest, -1):
                if pending.endswith(text[:size]):
                    longest = size
                    break
        return longest

    def _take(self, end: int) -> str:
        start = self._emitted
        self._emitted = max(start, end)
        return self._decoded[start : self._emitted]
