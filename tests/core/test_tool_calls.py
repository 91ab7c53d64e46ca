"""Calls are found in an answer's text, however it comes cut; what is none is text."""

from __future__ import annotations

import json

import pytest

from spolia_core.tool_calls import (
    AnswerWithCalls,
    CallArguments,
    CallBegins,
    Content,
    ToolCall,
    ToolCallParser,
    parse_tool_calls,
)

ARGUMENTS = '{"city": "O\\"s{lo}\\\\", "days": [1, {"x": "</tool_call>"}]}'
CALL = f'<tool_call>\n{{"name": "weather", "arguments": {ARGUMENTS}}}\n</tool_call>'
OTHER_ORDER = '<tool_call>{"arguments": {"a": 1}, "name": "f"}</tool_call>'

ANSWERS = {
    "": AnswerWithCalls("", ()),
    "No call at all.\n": AnswerWithCalls("No call at all.\n", ()),
    CALL: AnswerWithCalls("", (ToolCall("weather", ARGUMENTS),)),
    f"Let me see. \n{CALL}": AnswerWithCalls("Let me see.", (ToolCall("weather", ARGUMENTS),)),
    f"{CALL}\n{CALL}\n": AnswerWithCalls("", (ToolCall("weather", ARGUMENTS),) * 2),
    f"{CALL}\n and so  on": AnswerWithCalls("and so  on", (ToolCall("weather", ARGUMENTS),)),
    OTHER_ORDER: AnswerWithCalls("", (ToolCall("f", '{"a": 1}'),)),
    "a <tool_call>b</tool_call> c": AnswerWithCalls("a<tool_call>b</tool_call> c", ()),
    '<tool_call>{"name": "f", "arguments": 3}</tool_call>': AnswerWithCalls(
        '<tool_call>{"name": "f", "arguments": 3}</tool_call>', ()
    ),
    "1 < 2 <tool> <tool_call": AnswerWithCalls("1 < 2 <tool> <tool_call", ()),
    '<tool_call>\n{"name": "f", "argu': AnswerWithCalls('<tool_call>\n{"name": "f", "argu', ()),
    '<tool_call>\n{"name": "f", "arguments": {"a": "b': AnswerWithCalls("", (ToolCall("f", '{"a": "b'),)),
}


@pytest.mark.parametrize(("text", "expected"), ANSWERS.items(), ids=range(len(ANSWERS)))
def test_an_answer_is_read_the_same_whole_and_in_pieces(text: str, expected: AnswerWithCalls) -> None:
    assert parse_tool_calls(text) == expected
    for size in (1, 2, 3, 7):
        assert _in_pieces(text, size) == expected


def test_arguments_come_as_they_are_written() -> None:
    parser = ToolCallParser()
    assert parser.feed('Hm. <tool_call>\n{"name": "f", "arguments": ') == [Content("Hm.")]
    assert parser.feed('{"a": ') == [CallBegins(0, "f"), CallArguments(0, '{"a": ')]
    assert parser.feed("1") == [CallArguments(0, "1")]
    assert parser.feed("}}\n</tool_call>") == [CallArguments(0, "}")]
    assert parser.finish() == []
    assert parser.num_calls == 1


def test_text_is_held_back_only_while_it_may_begin_a_tag() -> None:
    parser = ToolCallParser()
    assert parser.feed("one <tool") == [Content("one")]
    assert parser.feed("s") == [Content(" <tools")]
    assert parser.feed(" ") == []
    assert parser.finish() == [Content(" ")]


def test_a_call_that_is_no_json_is_text() -> None:
    deep = "[" * 100_000
    assert parse_tool_calls(f"<tool_call>{deep}</tool_call>").content == f"<tool_call>{deep}</tool_call>"


CUT = {
    "": "",
    "Text. ": "Text. ",
    "Text. <": "Text. <",
    "Text. <tool": "Text. <tool",
    "Text. <tool_": "Text.",
    "Text.\n<tool_call": "Text.",
    "Text.\n<tool_call>": "Text.",
    'Text. <tool_call>\n{"na': "Text.",
    'Text. <tool_call> { "name" : "f': "Text.",
    "Text. <tool_call>nothing": "Text.<tool_call>nothing",
    '<tool_call>{"nome": "f"': '<tool_call>{"nome": "f"',
    '<tool_call>{"name": "f g': '<tool_call>{"name": "f g',
    '<tool_call>{"name": "", "argu': '<tool_call>{"name": "", "argu',
    '<tool_call>{"name": "f", "a": 1': '<tool_call>{"name": "f", "a": 1',
    '<tool_call>{"name": "f", "arguments": 3': '<tool_call>{"name": "f", "arguments": 3',
}


@pytest.mark.parametrize(("text", "content"), CUT.items(), ids=range(len(CUT)))
def test_what_may_be_the_beginning_of_a_call_is_no_text_where_it_was_cut(text: str, content: str) -> None:
    assert parse_tool_calls(text, was_cut=True) == AnswerWithCalls(content, ())
    assert _in_pieces(text, 1, was_cut=True) == AnswerWithCalls(content, ())
    behind = AnswerWithCalls("", (ToolCall("weather", ARGUMENTS),))
    if text.startswith("Text.") and content == "Text.":
        assert parse_tool_calls(CALL + text.removeprefix("Text."), was_cut=True) == behind


@pytest.mark.parametrize("held", ["<", "\n<to", "\n<tool_call"])
def test_behind_a_call_and_where_there_are_only_calls_a_tag_is_a_tag_from_its_first_character(held: str) -> None:
    whole = (ToolCall("weather", ARGUMENTS),)
    assert parse_tool_calls(CALL + held, was_cut=True) == AnswerWithCalls("", whole)
    assert parse_tool_calls(held.strip(), was_cut=True, only_calls=True) == AnswerWithCalls("", ())


def test_a_call_is_no_text_wherever_it_is_cut() -> None:
    for size in range(len(CALL) + 1):
        answer = parse_tool_calls(CALL[:size], was_cut=True, only_calls=True)
        assert answer == _in_pieces(CALL[:size], 1, was_cut=True, only_calls=True)
        assert not answer.content
        assert [call.name for call in answer.calls] == (["weather"] if size >= CALL.index(", ") else [])
        assert all(ARGUMENTS.startswith(call.arguments) for call in answer.calls)


def test_a_call_whose_name_is_whole_is_told_without_arguments() -> None:
    for behind in ("", ",", ' , "argu', ', "arguments"', ', "arguments": '):
        text = f'<tool_call>\n{{"name": "f"{behind}'
        assert parse_tool_calls(text, was_cut=True) == AnswerWithCalls("", (ToolCall("f", ""),))
        assert _in_pieces(text, 1, was_cut=True) == AnswerWithCalls("", (ToolCall("f", ""),))


def _in_pieces(text: str, size: int, *, was_cut: bool = False, only_calls: bool = False) -> AnswerWithCalls:
    parser = ToolCallParser(only_calls=only_calls)
    events = [event for start in range(0, len(text), size) for event in parser.feed(text[start : start + size])]
    events += parser.finish(was_cut=was_cut)
    names = [event.name for event in events if isinstance(event, CallBegins)]
    said = [
        "".join(event.text for event in events if isinstance(event, CallArguments) and event.index == index)
        for index in range(len(names))
    ]
    for given in said[:-1]:
        json.loads(given)
    calls = tuple(ToolCall(name, given) for name, given in zip(names, said, strict=True))
    return AnswerWithCalls("".join(event.text for event in events if isinstance(event, Content)), calls)
