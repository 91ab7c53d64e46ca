"""Token ids to text, as they come: incremental detokenization and stop strings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
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
    What has been returned is never taken back: for ids that spell valid UTF-8 all of it together is what decoding all
    ids at once gives.
    """

    def __init__(self, decode: Decode, stop: Sequence[str] = ()) -> None:
        self._decode = decode
        self._stop = tuple(stop)
        self._ids: list[int] = []
        self._window = 0
        self._complete = 0
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

    def add(self, token_id: int) -> None:
        """Adds a token; `take` returns its text."""
        if self.stopped:
            raise AssertionError("no tokens after a stop string")
        self._ids.append(token_id)
        text = self._decode(self._ids[self._window :])
        has_grown = len(text) > len(self._window_text)
        # A trailing replacement character may be the beginning of a character; all before it is settled.
        self._append(text.rstrip(REPLACEMENT))
        if has_grown and not text.endswith(REPLACEMENT):
            self._move_window()

    def take(self) -> str:
        """The text that has become final and was not returned yet."""
        return self._take(len(self._decoded) - (0 if self.stopped else self._held_back()))

    def finish(self) -> str:
        """The rest of the text, an unfinished UTF-8 sequence as replacement characters."""
        if not self.stopped:
            self._append(self._decode(self._ids[self._window :]))
        return self._take(len(self._decoded))

    def branch(self) -> IncrementalText:
        """Another text that begins as this one stands."""
        other = copy(self)
        other._ids = list(self._ids)
        return other

    def skip(self, num_code_points: int) -> None:
        """Marks text as given out already: a replay goes on after it."""
        self._emitted = max(self._emitted, num_code_points)

    def _append(self, window_text: str) -> None:
        """Takes over what the window's text has grown by, up to the first stop string."""
        new = window_text[len(self._window_text) :]
        if not new:
            return
        searched = len(self._decoded)
        self._decoded += new
        self._window_text = window_text
        end = self._first_stop(searched)
        if end is not None:
            self.stopped = True
            self._decoded = self._decoded[:end]

    def _move_window(self) -> None:
        # The window begins where text was complete once before, so it never begins inside a character; and it keeps
        # one complete piece before the newest, because how a token reads may depend on the one before it. So a token
        # costs no more late in a text than early.
        self._window, self._complete = self._complete, len(self._ids)
        self._window_text = self._decode(self._ids[self._window :])

    def _first_stop(self, searched: int) -> int | None:
        """Start of the stop string that is complete first, the longest of those; None when there is none.

        No stop string ends at or before `searched`. Deciding by the end, not the start, makes the result independent
        of how the text was cut into tokens.
        """
        found: list[tuple[int, int]] = []
        for text in self._stop:
            start = self._decoded.find(text, max(0, searched - len(text) + 1))
            if start >= 0:
                found.append((start + len(text), start))
        return min(found)[1] if found else None

    def _held_back(self) -> int:
        """Length of the longest end of the text that a stop string may begin with."""
        longest = 0
        for text in self._stop:
            for size in range(min(len(text) - 1, len(self._decoded)), longest, -1):
                if self._decoded.endswith(text[:size]):
                    longest = size
                    break
        return longest

    def _take(self, end: int) -> str:
        start = self._emitted
        self._emitted = max(start, end)
        return self._decoded[start : self._emitted]
