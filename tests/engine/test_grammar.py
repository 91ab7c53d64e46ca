"""A grammar takes what its constraint means and nothing else; what cannot be enforced is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from constraint_worlds import DEMO, EOS, VOCAB_SIZE, accepts, demo_grammars, demo_tokenizer, follow
from tokenizers import AddedToken, Tokenizer
from tokenizers.decoders import ByteLevel
from tokenizers.models import BPE

from spolia_core.constraint import Constraint
from spolia_core.errors import InvalidRequest, NotSupported
from spolia_core.tools import read_tool_choice
from spolia_engine import grammar as grammar_module
from spolia_engine.grammar import Grammars

GRAMMARS = demo_grammars()
ODD = ("yes", "yes, but", "\x01\n\"'\\/é😀]")
TAKEN: list[tuple[Constraint, list[str], list[str]]] = [
    (
        Constraint.json_object(),
        ["{}", '{"a": [1, {"b": null}], "é": -2.5e3}', '{"a":1,"b":"\\n\\""}'],
        ["[]", '"a"', "{", "{} ", '{"a":  1}', "{'a': 1}", '{"a": 01}', ""],
    ),
    (Constraint.json_schema({"enum": ["a", 7, None]}), ['"a"', "7", "null"], ['"b"', "77", "{}"]),
    (Constraint.json_schema({"type": "integer", "multipleOf": 7, "minimum": 5}), ["7", "140"], ["0", "8", "-7", "7.0"]),
    (Constraint.json_schema({"type": "string", "format": "date"}), ['"2024-02-29"'], ['"yesterday"', '"2024-2-29"']),
    (
        Constraint.json_schema(
            {"$ref": "#/$defs/n", "$defs": {"n": {"type": "array", "items": {"$ref": "#/$defs/n"}}}}
        ),
        ["[]", "[[], [[]]]"],
        ["[1]", "[[]"],
    ),
    (Constraint.regex("[a-c]+x?"), ["abc", "ax"], ["", "x", "abd", "axx", "ax\n"]),
    (Constraint.regex("^[0-9]{3}$"), ["123"], ["12", "1234", "a"]),
    (Constraint.regex(r"(?i)yes|(no)"), ["YES", "yEs", "no"], ["NOO", "y"]),
    (
        Constraint.one_of(["yes", "yes, but", "\x01\n\"'\\/é😀]"]),
        ["yes", "yes, but", "\x01\n\"'\\/é😀]"],
        ["ye", "yes,"],
    ),
    (Constraint.lark('start: "(" start ")" | "x"'), ["x", "((x))"], ["(x", "x)", "()"]),
]


@pytest.mark.parametrize(("constraint", "good", "bad"), TAKEN, ids=range(len(TAKEN)))
def test_a_grammar_takes_what_the_constraint_means(constraint: Constraint, good: list[str], bad: list[str]) -> None:
    constraint.validate()
    grammar = GRAMMARS.compile(constraint)
    for text in good:
        assert accepts(grammar, text), text
        assert EOS in follow(grammar, text).allowed()
    for text in bad:
        assert not accepts(grammar, text), text


CANNOT = [
    (Constraint.json_schema({"type": "array", "uniqueItems": True}), "uniqueItems"),
    (Constraint.json_schema({"not": {"type": "string"}}), "not"),
    (Constraint.json_schema({"if": {"type": "string"}, "then": {"minLength": 3}}), "if"),
    (Constraint.json_schema({"type": "array", "contains": {}}), "contains"),
    (Constraint.json_schema({"type": "object", "propertyNames": {"pattern": "^a"}}), "propertyNames"),
    (Constraint.json_schema({"type": "object", "dependentRequired": {"a": ["b"]}}), "dependentRequired"),
    (Constraint.json_schema({"oneOf": [{"type": "integer"}, {"type": "number"}]}), "oneOf"),
    (Constraint.json_schema({"type": "string", "format": "made-up"}), "made-up"),
    (Constraint.json_schema({"$ref": "https://example.com/a.json"}), "example.com"),
    (Constraint.json_schema({"$ref": "#/$defs/nowhere"}), "nowhere"),
    (Constraint.json_schema({"type": "text"}), "text"),
    (Constraint.json_schema({"type": "string", "pattern": "("}), "unclosed group"),
    (Constraint.json_schema({"type": "string", "minLength": 5, "maxLength": 3}), "Unsatisfiable"),
    # A schema cannot ask for leniency either.
    (Constraint.json_schema({"uniqueItems": True, "x-guidance": {"lenient": True}}), "uniqueItems"),
    (Constraint.regex("a(?=b)"), "look-around"),
    (Constraint.regex(r"(a)\1"), "backreferences"),
    (Constraint.regex("["), "unclosed character class"),
    (Constraint.lark('begin: "a"'), "start"),
    (Constraint.lark('start: other\n# "'), "other"),
    (Constraint.lark("start: /[/"), "unclosed"),
]
MISTAKES = frozenset(
    {"nowhere", "text", "unclosed group", "Unsatisfiable", "unclosed character class", "start", "other", "unclosed"}
)
"""What is said of those that mean nothing anywhere; the others mean what is not served."""


@pytest.mark.parametrize(("constraint", "said"), CANNOT, ids=range(len(CANNOT)))
def test_what_cannot_be_enforced_is_refused_by_name(constraint: Constraint, said: str) -> None:
    constraint.validate()
    with pytest.raises((InvalidRequest, NotSupported), match="cannot be enforced") as caught:
        GRAMMARS.compile(constraint)
    assert said in caught.value.message
    assert caught.value.field == constraint.field
    assert isinstance(caught.value, InvalidRequest) == (said in MISTAKES)


def test_a_huge_schema_compiles_or_is_refused_and_never_hangs() -> None:
    properties: dict[str, Any] = {f"field_{i}": {"type": "string", "maxLength": i + 1} for i in range(2000)}
    wide = Constraint.json_schema({"type": "object", "properties": properties, "required": list(properties)})
    wide.validate()
    grammar = GRAMMARS.compile(wide)
    follow(grammar, '{"field_0": "x", "field_1": "yz", "field_2":')
    nested: dict[str, Any] = {"type": "integer"}
    for _ in range(62):
        nested = {"type": "array", "items": nested, "minItems": 1}
    assert accepts(GRAMMARS.compile(Constraint.json_schema(nested)), "[" * 62 + "7" + "]" * 62)


def test_an_expression_that_grows_too_large_ends_in_an_error_and_not_in_a_stall() -> None:
    grammar = GRAMMARS.compile(Constraint.regex("((a{1,1000}){1,1000}b?){1,1000}"))
    matcher = grammar.matcher()
    token = demo_tokenizer().encode("a", add_special_tokens=False).ids[0]
    with pytest.raises(NotSupported, match="too complex") as caught:  # noqa: PT012 - some step of many
        for _ in range(5000):
            assert token in matcher.allowed()
            if not matcher.take(token):
                matcher.allowed()
    assert caught.value.field == "sampling.regex"


def test_a_matcher_that_branches_leaves_the_other_where_it_was() -> None:
    here = follow(GRAMMARS.compile(Constraint.regex("ab|ac")), "a")
    there = here.branch()
    b, c = (demo_tokenizer().encode(each, add_special_tokens=False).ids[0] for each in "bc")
    assert there.take(b)
    assert there.is_complete
    assert not here.is_complete
    assert {b, c} <= set(here.allowed().tolist())
    assert here.take(c)
    assert here.is_complete


def test_nothing_but_the_end_follows_a_complete_answer() -> None:
    matcher = follow(GRAMMARS.compile(Constraint.one_of(["yes", "no"])), "yes")
    assert matcher.is_complete
    assert matcher.allowed().tolist() == [EOS]
    open_end = follow(GRAMMARS.compile(Constraint.regex("[a-z]{2,4}")), "ab")
    assert not open_end.is_complete
    assert open_end.is_match


def test_grammars_are_kept_by_content_and_not_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammar_module, "MAX_GRAMMARS", 3)
    grammars = demo_grammars()
    first = grammars.compile(Constraint.regex("a"))
    assert grammars.compile(Constraint.regex("a")) is first
    assert grammars.compile(Constraint.one_of(["a"])) is not first
    for text in "bcde":
        grammars.compile(Constraint.regex(text))
    assert grammars.num_kept == 3
    assert grammars.compile(Constraint.regex("a")) is not first
    assert follow(first, "a").is_complete, "one that is in use outlives its place"


def test_a_tokenizer_without_an_end_of_sequence_serves_constraints_too() -> None:
    grammars = Grammars.of(DEMO, VOCAB_SIZE, frozenset())
    matcher = grammars.compile(Constraint.regex("[a-z]+")).matcher()
    assert matcher.allowed().max() < VOCAB_SIZE
    assert EOS not in matcher.allowed()


def test_what_the_models_tokens_cannot_write_is_refused_by_name(tmp_path: Path) -> None:
    """A vocabulary without a blank: the library would name the token behind it, and then refuse that."""
    alphabet = {letter: number for number, letter in enumerate("abc01")}
    tokenizer = Tokenizer(BPE(vocab=alphabet, merges=[]))
    tokenizer.decoder = ByteLevel()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    grammars = Grammars.of(tmp_path, len(alphabet), frozenset())
    assert grammars.compile(Constraint.regex("0a")).matcher().allowed().tolist() == [alphabet["0"]]
    with pytest.raises(NotSupported, match="in this model's tokens"):
        grammars.compile(Constraint.regex(" 0")).matcher().allowed()


@pytest.fixture(scope="module")
def tagged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model's tokenizer with tags that are one token each, and a control token."""
    tokenizer = Tokenizer.from_file(str(DEMO / "tokenizer.json"))
    tokenizer.add_tokens([AddedToken("<tool_call>", special=False), AddedToken("</tool_call>", special=False)])
    tokenizer.add_special_tokens([AddedToken("<|im_end|>", special=True)])
    path = tmp_path_factory.mktemp("tagged")
    tokenizer.save(str(path / "tokenizer.json"))
    return path


def test_tags_that_are_tokens_of_their_own_are_text_and_control_tokens_are_not(tagged: Path) -> None:
    tag, end_tag, control = VOCAB_SIZE, VOCAB_SIZE + 1, VOCAB_SIZE + 2
    tokenizer = Tokenizer.from_file(str(tagged / "tokenizer.json"))
    grammars = Grammars.of(tagged, VOCAB_SIZE + 8, frozenset([EOS]))
    anything = grammars.compile(Constraint.regex(r"(.|\n)*")).matcher().allowed()
    assert tag in anything
    assert not {control, 0, *range(VOCAB_SIZE + 3, VOCAB_SIZE + 8)} & set(anything.tolist())
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"properties": {"a": {"type": "integer"}}}}}]
    text = '<tool_call>\n{"name": "f", "arguments": {"a": 12}}\n</tool_call>'
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert (ids[0], ids[-1]) == (tag, end_tag)
    for choice, before in (("required", ""), ("auto", "Let me see.\n")):
        constraint = read_tool_choice(tools, choice).constraint
        assert constraint is not None
        matcher = grammars.compile(constraint).matcher()
        for token_id in [*tokenizer.encode(before, add_special_tokens=False).ids, *ids]:
            assert token_id in matcher.allowed()
            assert matcher.take(token_id)
        assert matcher.is_match


@pytest.mark.parametrize("choice", ["auto", "required"])
def test_calls_keep_their_tools_parameters(choice: str) -> None:
    def tool(name: str, **parameters: Any) -> dict[str, Any]:
        return {"type": "function", "function": {"name": name, "parameters": {"type": "object", **parameters}}}

    places = {"$defs": {"place": {"enum": ["Oslo", "Bergen"]}}, "properties": {"city": {"$ref": "#/$defs/place"}}}
    tools = [
        tool("weather", required=["city"], additionalProperties=False, **places),
        tool("add", properties={"a": {"type": "integer"}}, additionalProperties=False),
    ]

    def call(name: str, arguments: object) -> str:
        return f'<tool_call>\n{{"name": "{name}", "arguments": {json.dumps(arguments)}}}\n</tool_call>'

    constraint = read_tool_choice(tools, choice).constraint
    assert constraint is not None
    grammar = GRAMMARS.compile(constraint)
    good = call("weather", {"city": "Oslo"})
    assert accepts(grammar, good)
    assert accepts(grammar, f"{good}\n{call('add', {'a': 3})}")
    assert accepts(grammar, call("add", {}))
    for bad in ({"city": "Rome"}, {}, {"city": "Oslo", "x": 1}):
        assert not accepts(grammar, call("weather", bad))
    assert not accepts(grammar, call("other", {}))
    assert accepts(grammar, "It rains.\n") == (choice == "auto")
    assert accepts(grammar, f"Let me see: {good}") == (choice == "auto")
    assert not accepts(grammar, "Let me see: <tool_call>and more")
    single = read_tool_choice(tools, choice, parallel=False).constraint
    assert single is not None
    assert accepts(GRAMMARS.compile(single), good)
    assert not accepts(GRAMMARS.compile(single), f"{good}\n{good}")


@pytest.mark.parametrize("choice", ["auto", "required", {"type": "function", "function": {"name": "second"}}])
def test_what_is_refused_of_a_grammar_is_told_of_its_tool(choice: object) -> None:
    tools = [
        {"type": "function", "function": {"name": name, "parameters": {"properties": {"x": {"uniqueItems": unique}}}}}
        for name, unique in (("first", False), ("second", True))
    ]
    tools[0]["function"]["parameters"] = {"title": "\u2028 and\nlines"}
    read = read_tool_choice(tools, choice)
    assert read.constraint is not None
    with pytest.raises(NotSupported) as caught:
        GRAMMARS.compile(read.constraint)
    told = read.explain(caught.value)
    assert isinstance(told, NotSupported)
    assert told.field == "tools[1].function.parameters"
    assert told.message.startswith("tools[1].function.parameters cannot be enforced: ")
    assert "uniqueItems" in told.message


def test_allowed_tokens_are_exactly_those_that_can_be_taken() -> None:
    matcher = follow(GRAMMARS.compile(Constraint.json_object()), '{"a": ')
    allowed = set(matcher.allowed().tolist())
    rng = np.random.default_rng(0)
    for token_id in [*rng.choice(VOCAB_SIZE, 300, replace=False).tolist(), *list(allowed)[:50]]:
        assert matcher.branch().take(int(token_id)) == (token_id in allowed)
