"""A request's tools are read, or refused by the name of the field that is wrong."""

from __future__ import annotations

from typing import Any

import pytest

from spolia_core.constraint import ConstraintKind
from spolia_core.errors import InvalidRequest
from spolia_core.tools import MAX_TOOLS, ToolMode, read_tool_choice


def tool(name: object = "weather", **changes: Any) -> dict[str, Any]:
    function = {"name": name, "description": "Tells it.", "parameters": {"type": "object"}, **changes}
    return {"type": "function", "function": function}


def test_a_choice_says_whether_and_what_may_be_called() -> None:
    tools = [tool("a"), tool("b")]
    assert read_tool_choice(tools).mode is ToolMode.AUTO
    assert read_tool_choice(None).mode is ToolMode.NONE
    assert read_tool_choice([], "none").constraint is None
    assert [each.name for each in read_tool_choice(tools, "required").tools] == ["a", "b"]
    named = read_tool_choice(tools, {"type": "function", "function": {"name": "b"}})
    assert (named.mode, [each.name for each in named.tools], named.is_single) == (ToolMode.REQUIRED, ["b"], True)
    assert read_tool_choice(tools, parallel=False).is_single


@pytest.mark.parametrize("choice", ["auto", "required"])
def test_a_choice_becomes_a_grammar(choice: str) -> None:
    constraint = read_tool_choice([tool()], choice).constraint
    assert constraint is not None
    assert constraint.kind is ConstraintKind.LARK
    constraint.validate()


@pytest.mark.parametrize(
    ("tools", "choice", "field"),
    [
        ("weather", None, "tools"),
        ([tool()] * (MAX_TOOLS + 1), None, "tools"),
        ([{"type": "retrieval"}], None, "tools[0].type"),
        ([{"type": "function"}], None, "tools[0].function"),
        ([tool(), tool("a b")], None, "tools[1].function.name"),
        ([tool(7)], None, "tools[0].function.name"),
        ([tool("x" * 65)], None, "tools[0].function.name"),
        ([tool(), tool()], None, "tools[1].function.name"),
        ([tool(description=["x"])], None, "tools[0].function.description"),
        ([tool(parameters=[])], None, "tools[0].function.parameters"),
        ([tool(parameters={"type": "string"})], None, "tools[0].function.parameters"),
        ([tool(parameters={"enum": [float("nan")]})], None, "tools[0].function.parameters"),
        ([tool()], "maybe", "tool_choice"),
        ([tool()], 7, "tool_choice"),
        (None, "required", "tool_choice"),
        ([tool()], {"type": "function", "function": {"name": "other"}}, "tool_choice.function.name"),
        ([tool()], {"type": "function"}, "tool_choice.function.name"),
        ([tool()], {"type": "tool", "function": {"name": "weather"}}, "tool_choice.type"),
    ],
)
def test_what_is_wrong_is_named(tools: object, choice: object, field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        read_tool_choice(tools, choice)
    assert caught.value.field == field


def test_tools_that_are_too_large_together_are_refused() -> None:
    large = {"type": "object", "description": "x" * 100_000}
    choice = read_tool_choice([tool(f"t{index}", parameters=large) for index in range(3)])
    with pytest.raises(InvalidRequest, match="tools must be ≤ 262144 bytes together") as caught:
        _ = choice.constraint
    assert caught.value.field == "tools"
