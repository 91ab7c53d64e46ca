"""Finds tool calls in an answer's text, as it comes: the format is that of `tools`.

    text ──<tool_call>──▶ head ──"arguments": {──▶ arguments ──}──▶ tail ──</tool_call>──▶ text

What stands between tags and is no call is given back as text: an answer without a constraint may hold anything.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
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


class ToolCallParser:
    """Reads one answer. `feed` its text piece by piece, then `finish`; how it was cut changes nothing but the events'
    number.
    """

    def __init__(self) -> None:
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

    def finish(self) -> list[CallEvent]:
        """What was held back, at the end of the answer. Of a call that was cut the arguments stand as they came."""
        held, self._held = self._held, ""
        if self._read == self._read_head:
            held = OPEN_TAG + held
        if self._read not in (self._read_head, self._read_text):
            return []
        return [Content(held)] if held else []

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


def parse_tool_calls(text: str) -> AnswerWithCalls:
    """A whole answer."""
    parser = ToolCallParser()
    content: list[str] = []
    names: list[str] = []
    arguments: list[str] = []
    for event in [*parser.feed(text), *parser.finish()]:
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
