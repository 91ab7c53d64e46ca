"""Finds tool calls in an answer's text, as it comes: the format is that of `tools`.

    text ──<tool_call>──▶ head ──"arguments": {──▶ arguments ──}──▶ tail ──</tool_call>──▶ text

What stands between tags and is no call is given back as text: an answer without a constraint may hold anything. What a
limit cut while it could still become a call is no text: of a call whose name is known that is told, of another nothing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from spolia_core.tools import CLOSE_TAG, OPEN_TAG


@dataclass(frozen=True, slots=True)
class Content:
    """Text that is no part of a call."""

    text: str


@dataclass(frozen=True, slots=True)
class CallBegins:
    """A call of function `name`, the answer's call number `index`; its arguments follow."""

    index: int
    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    """A piece of a call's arguments, as JSON text. Together they are an object, unless the answer was cut short."""

    index: int
    text: str


CallEvent: TypeAlias = Content | CallBegins | CallArguments


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call. `arguments` is JSON text, as the API hands it on."""

    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class AnswerWithCalls:
    """An answer's text without its calls, and the calls."""

    content: str
    calls: tuple[ToolCall, ...]


_HEAD = re.compile(r'\s*\{\s*"name"\s*:\s*"([\w.-]+)"\s*,\s*"arguments"\s*:\s*(?=\{)')


_BEFORE_NAME = ("{", '"name"', ":", '"')
_NAME = re.compile(r"[\w.-]+")
_AFTER_NAME = (",", '"arguments"', ":", "{")
"""The same, part by part, for a head that ends early."""

_SURELY_A_TAG = "<tool_"
"""Where an answer was cut in a tag: shorter beginnings may be text, as of HTML."""


class ToolCallParser:
    """Reads one answer. `feed` its text piece by piece, then `finish`; how it was cut into pieces changes nothing but
    the events' number.
    """

    def __init__(self, *, only_calls: bool = False) -> None:
        """`only_calls`: the answer was held to calls, and has no text."""
        self._only_calls = only_calls
        self.num_calls = 0
        """Calls that began."""
        self._held = ""
        self._is_behind_call = False
        self._depth = 0
        self._in_string = False
        self._escaped = False
        self._read: Callable[[], list[CallEvent] | None] = self._read_text

    def feed(self, text: str) -> list[CallEvent]:
        """What the text so far settles."""
        self._held += text
        events: list[CallEvent] = []
        while (read := self._read()) is not None:
            events += read
        return events

    def finish(self, *, was_cut: bool = False) -> list[CallEvent]:
        """What was held back, at the end of the answer. Of a call that was cut the arguments stand as they came.

        `was_cut`: it did not end by itself, but at a limit or a stop string, maybe where a call begins.
        """
        held, self._held = self._held, ""
        if self._read == self._read_head:
            begun = _name_so_far(held) if was_cut else None
            if begun is not None:
                return [self._begin(begun)] if begun else []
            held = OPEN_TAG + held
        elif self._read == self._read_text:
            held = held[: self._end_of_text(held)] if was_cut else held
        else:
            return []
        return [Content(held)] if held else []

    def _end_of_text(self, held: str) -> int:
        """Where the text ends of an answer that was cut: before what was to be a tag, and the space before that."""
        if self._only_calls:
            return 0
        start = _start_of_tag(held)
        is_tag = self.num_calls > 0 or len(held) - start >= len(_SURELY_A_TAG)
        return len(held[:start].rstrip()) if start < len(held) and is_tag else len(held)

    # Each reader takes what it can of what is held, and returns its events; None where it must wait for more.

    def _read_text(self) -> list[CallEvent] | None:
        """Text up to a tag; space before a tag and behind a call is nobody's."""
        if self._is_behind_call:
            self._held = self._held.lstrip()
            self._is_behind_call = not self._held
        before, tag, behind = self._held.partition(OPEN_TAG)
        if tag:
            before, self._held, self._read = before.rstrip(), behind, self._read_head
            return [Content(before)] if before else []
        settled = self._held[: _start_of_tag(self._held)].rstrip()
        self._held = self._held[len(settled) :]
        return [Content(settled)] if settled else None

    def _read_head(self) -> list[CallEvent] | None:
        found = _HEAD.match(self._held)
        if found is not None:
            self._held, self._read = self._held[found.end() :], self._read_arguments
            return [self._begin(found[1])]
        body, tag, behind = self._held.partition(CLOSE_TAG)
        if not tag:
            return None
        self._held, self._read = behind, self._read_text
        call = _as_call(body)
        self._is_behind_call = call is not None
        if call is None:
            return [Content(OPEN_TAG + body + CLOSE_TAG)]
        begins = self._begin(call.name)
        return [begins, CallArguments(begins.index, call.arguments)]

    def _read_arguments(self) -> list[CallEvent] | None:
        end = self._end_of_object()
        piece = self._held if end is None else self._held[:end]
        self._held = self._held[len(piece) :]
        if end is not None:
            self._read = self._read_tail
        return [CallArguments(self.num_calls - 1, piece)] if piece else None

    def _read_tail(self) -> list[CallEvent] | None:
        _, tag, behind = self._held.partition(CLOSE_TAG)
        if not tag:
            return None
        self._held, self._read = behind, self._read_text
        self._is_behind_call = True
        return []

    def _begin(self, name: str) -> CallBegins:
        self.num_calls += 1
        return CallBegins(self.num_calls - 1, name)

    def _end_of_object(self) -> int | None:
        """Where in what is held the arguments end; None where they go on."""
        for index, char in enumerate(self._held):
            if self._escaped:
                self._escaped = False
            elif self._in_string:
                self._escaped = char == "\\"
                self._in_string = char != '"'
            elif char == '"':
                self._in_string = True
            elif char in "{[":
                self._depth += 1
            elif char in "}]":
                self._depth -= 1
                if self._depth == 0:
                    return index + 1
        return None


def parse_tool_calls(text: str, *, only_calls: bool = False, was_cut: bool = False) -> AnswerWithCalls:
    """A whole answer."""
    parser = ToolCallParser(only_calls=only_calls)
    content: list[str] = []
    names: list[str] = []
    arguments: list[str] = []
    for event in [*parser.feed(text), *parser.finish(was_cut=was_cut)]:
        match event:
            case Content():
                content.append(event.text)
            case CallBegins():
                names.append(event.name)
                arguments.append("")
            case CallArguments():
                arguments[event.index] += event.text
    calls = tuple(ToolCall(name, given) for name, given in zip(names, arguments, strict=True))
    return AnswerWithCalls("".join(content), calls)


def _start_of_tag(text: str) -> int:
    """Where the longest end of the text begins that a tag may begin with; the text's length where there is none."""
    for size in range(min(len(OPEN_TAG) - 1, len(text)), 0, -1):
        if text.endswith(OPEN_TAG[:size]):
            return len(text) - size
    return len(text)


def _name_so_far(head: str) -> str | None:
    """The name in a call's head that ends early, empty where it is not whole; None where this never becomes a call."""
    left = _behind(head, _BEFORE_NAME)
    if not left:
        return left
    name, quote, left = left.partition('"')
    if not quote:
        return "" if _NAME.fullmatch(name) else None
    return name if _NAME.fullmatch(name) and _behind(left, _AFTER_NAME) is not None else None


def _behind(text: str, parts: Sequence[str]) -> str | None:
    """What stands behind all parts, with space before each or none; empty where the text ends among them, None where it
    is another.
    """
    for part in parts:
        text = text.lstrip()
        if not text.startswith(part):
            return "" if part.startswith(text) else None
        text = text[len(part) :]
    return text


def _as_call(body: str) -> ToolCall | None:
    """A call in another order or spelling than the grammar's."""
    try:
        read: Any = json.loads(body)
    except (ValueError, RecursionError):
        return None
    match read:
        case {"name": str(name), "arguments": dict(arguments)}:
            return ToolCall(name, json.dumps(arguments, ensure_ascii=False))
        case _:
            return None
