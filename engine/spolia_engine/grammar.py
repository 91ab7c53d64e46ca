"""Constraints as grammars: compiled once, and followed by each answer with a matcher of its own.

A matcher says which tokens may come next and is told which one came. It is a function of the tokens told, so an answer
that is taken up elsewhere tells them again. The grammars are llguidance's.
"""

from __future__ import annotations

import re
import threading
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from spolia_core.constraint import Constraint, ConstraintKind
from spolia_core.errors import InvalidRequest, NotSupported
from spolia_engine.vocabulary import load_vocabulary

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

TokenIds = npt.NDArray[np.int64]

MAX_GRAMMARS = 64
"""Kept compiled. One takes 0.1 to 3 MB for a vocabulary of 150 thousand; what a wild expression may take is bounded by
the states below, of 1 to 2 KB each."""
MAX_LEXER_STATES = 20_000
WHITESPACE = "[ ]?"
"""Between the pieces of JSON: a model that knows no better would indent until its tokens are spent."""

_JSON_OPTIONS: JsonCompileOptions = {"whitespace_pattern": WHITESPACE, "lenient": False}
_NOT_SERVED = re.compile(r"(^|: )(Unimplemented keys|Unknown format)\b|\bnot supported\b|\bnot present in a registry\b")
"""How the library says that it knows what is asked for and does not do it; its other reasons are mistakes."""


class Matcher:
    """Where one answer stands in its grammar."""

    def __init__(self, matcher: LLMatcher, constraint: Constraint, vocab_size: int) -> None:
        self._matcher = matcher
        self._constraint = constraint
        self._vocab_size = vocab_size

    @property
    def is_complete(self) -> bool:
        """Nothing but the end of the answer may follow."""
        return self._matcher.is_stopped() and not self._matcher.is_error()

    @property
    def is_match(self) -> bool:
        """The answer may end here."""
        return self._matcher.is_accepting()

    def branch(self) -> Matcher:
        """Another matcher that stands where this one does."""
        return Matcher(self._matcher.deep_copy(), self._constraint, self._vocab_size)

    def allowed(self) -> TokenIds:
        """Ids of the tokens that may come next, ascending, at least one. End-of-sequence tokens where the answer may
        end. Raises `NotSupported` where finding them exceeds a limit of the library.
        """
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        self._check()
        unpacked = np.unpackbits(bits, count=self._vocab_size, bitorder="little")
        ids: TokenIds = np.flatnonzero(unpacked.view(np.bool_))  # of bools: twice to ten times as fast as of bytes
        # One token alone may be forced by bytes that the model's tokens lack: llguidance names it, and then refuses it.
        if not len(ids) or (len(ids) == 1 and not self.branch().take(int(ids[0]))):
            raise NotSupported(
                f"{self._constraint.field} cannot be gone on with in this model's tokens", field=self._constraint.field
            )
        return ids

    def take(self, token_id: int) -> bool:
        """Goes on by a token; False where it is none of those allowed, and the matcher is of no more use."""
        return self._matcher.consume_token(token_id)

    def _check(self) -> None:
        if self._matcher.is_error():
            field = self._constraint.field
            raise NotSupported(
                f"{field} became too complex to follow: {_reason(self._matcher.get_error())}", field=field
            )


class Grammar:
    """A compiled constraint. `matcher` may be called from any thread, one at a time."""

    def __init__(self, matcher: LLMatcher, constraint: Constraint, vocab_size: int) -> None:
        self._start = Matcher(matcher, constraint, vocab_size)

    def matcher(self) -> Matcher:
        """A matcher at the beginning of an answer. Microseconds."""
        return self._start.branch()


class Grammars:
    """Grammars of one model's tokens, kept by content. Safe to use from several threads."""

    def __init__(self, load: Callable[[], LLTokenizer], vocab_size: int) -> None:
        """`load` is called with the first constraint: without any, the tokens are never looked at."""
        self._load = load
        self._vocab_size = vocab_size
        self._lock = threading.Lock()
        self._tokens: LLTokenizer | None = None
        self._kept: OrderedDict[Constraint, Grammar] = OrderedDict()

    @classmethod
    def of(cls, model_path: str | Path, vocab_size: int, eos_token_ids: frozenset[int]) -> Grammars:
        """Grammars over the tokens of a model directory."""
        return cls(partial(load_vocabulary, Path(model_path), vocab_size, eos_token_ids), vocab_size)

    @property
    def num_kept(self) -> int:
        """Grammars in memory."""
        return len(self._kept)

    def compile(self, constraint: Constraint) -> Grammar:
        """The grammar of a checked constraint: milliseconds, a second with the first. Not for an event loop.

        Raises, with the library's reason, `InvalidRequest` for what means nothing, and `NotSupported` for what would
        mean something and is not enforced, or where the model's tokens cannot be used.
        """
        with self._lock:
            kept = self._kept.get(constraint)
            if kept is not None:
                self._kept.move_to_end(constraint)
                return kept
            if self._tokens is None:
                self._tokens = self._load()
            made = _compiled(constraint, self._tokens, self._vocab_size)
            self._kept[constraint] = made
            if len(self._kept) > MAX_GRAMMARS:
                self._kept.popitem(last=False)
            return made


def _compiled(constraint: Constraint, tokens: LLTokenizer, vocab_size: int) -> Grammar:
    limits = LLParserLimits(max_lexer_states=MAX_LEXER_STATES, verbose_errors=False)
    matcher = LLMatcher(tokens, _text_of(constraint), log_level=0, limits=limits)
    if matcher.is_error():
        reason = _reason(matcher.get_error())
        kind = NotSupported if _NOT_SERVED.search(reason) else InvalidRequest
        raise kind(
            f"{constraint.field} cannot be enforced: {reason}", field=constraint.field, limit="docs/structured.md"
        )
    return Grammar(matcher, constraint, vocab_size)


def _text_of(constraint: Constraint) -> str:
    """The grammar as the library reads it."""
    match constraint.kind:
        case ConstraintKind.JSON_SCHEMA:
            return LLMatcher.grammar_from_json_schema(constraint.text, overrides=_JSON_OPTIONS)
        case ConstraintKind.JSON_OBJECT:
            return LLMatcher.grammar_from_json_schema('{"type": "object"}', overrides=_JSON_OPTIONS)
        case ConstraintKind.REGEX:
            return LLMatcher.grammar_from_regex(constraint.text)
        case ConstraintKind.CHOICES:
            return LLMatcher.grammar_from_regex("|".join(map(_literal, constraint.choices)))
        case ConstraintKind.LARK:
            return LLMatcher.grammar_from_lark(constraint.text)


def _literal(text: str) -> str:
    """A regular expression for exactly `text`."""
    return "".join(char if char.isalnum() else f"\\x{{{ord(char):x}}}" for char in text)


def _reason(error: str) -> str:
    """The line of the library's message that says what is wrong; the others show where."""
    lines = [line.strip() for line in error.strip().splitlines()] or ["no reason given"]
    said = next((line for line in lines if line.startswith("error: ")), lines[0]).removeprefix("error: ")
    return said.partition(". Enable ")[0][:300]  # what follows are options of the library, which no request can set
