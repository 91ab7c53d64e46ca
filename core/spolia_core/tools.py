"""Tools a model may call, as OpenAI's API states them, and what they ask of an answer.

A call stands in an answer's text between tags, as the Hermes and Qwen chat templates teach it:

    <tool_call>
    {"name": "weather", "arguments": {"city": "Oslo"}}
    </tool_call>

`tool_calls` finds calls in a text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from spolia_core.constraint import MAX_LARK_BYTES, Constraint, ConstraintKind
from spolia_core.errors import InvalidRequest, SpoliaError
from spolia_core.field_checks import check_field, wrong_field

MAX_TOOLS = 128
MAX_CALLS = 16
"""In one answer, where the grammar has a say."""
OPEN_TAG = "<tool_call>"
CLOSE_TAG = "</tool_call>"

_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
_TOOLS_LINE = re.compile(r"tool_(\d+): ")
_REFUSED_LINE = re.compile(r"cannot be enforced: at (\d+)\(\d+\): (.*)")
_NO_PARAMETERS: Mapping[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}
_READ_BY_LLGUIDANCE = {"whitespace_pattern": "[ ]?"}


@dataclass(frozen=True, slots=True)
class Tool:
    """A function the model may call. `parameters` is the JSON schema of its arguments, an object, as text, and `field`
    where the request has it.
    """

    name: str
    parameters: str
    field: str


class ToolMode(Enum):
    """Whether an answer calls tools."""

    NONE = "none"
    """It does not."""
    AUTO = "auto"
    """It may, behind some text or none."""
    REQUIRED = "required"
    """It is calls and nothing else."""


@dataclass(frozen=True, slots=True)
class ToolChoice:
    """Whether an answer calls tools, and which it may call: at least one, unless NONE."""

    mode: ToolMode
    tools: tuple[Tool, ...] = ()
    is_single: bool = False
    """One call at most."""

    @property
    def constraint(self) -> Constraint | None:
        """What holds an answer to the choice; None for NONE. Raises `InvalidRequest` for tools too large together."""
        if self.mode is ToolMode.NONE:
            return None
        grammar = _grammar(self)
        size = len(grammar.encode())
        check_field(size <= MAX_LARK_BYTES, "tools", f"≤ {MAX_LARK_BYTES} bytes together", f"{size} bytes")
        return Constraint.lark(grammar)

    def explain(self, error: SpoliaError) -> SpoliaError:
        """A decode node's refusal of the grammar, which names a line of it, told of the tool whose line that is; any
        other error as it is.
        """
        refused = _REFUSED_LINE.search(error.message)
        if refused is None or error.field != ConstraintKind.LARK.field:
            return error
        lines = _grammar(self).split("\n")
        at = int(refused[1]) - 1
        said = _TOOLS_LINE.match(lines[at]) if at < len(lines) else None
        if said is None:
            return error
        field = self.tools[int(said[1])].field
        return type(error)(f"{field} cannot be enforced: {refused[2]}", field=field, limit=error.limit)


NO_CALLS = ToolChoice(ToolMode.NONE)
_MODES = {mode.value: mode for mode in ToolMode}


def read_tool_choice(tools: object, choice: object = None, *, parallel: bool = True) -> ToolChoice:
    """A request's `tools`, `tool_choice` and `parallel_tool_calls`, `choice` None where it states none.

    Raises `InvalidRequest` naming the field, `tools[2].function.name` for example.
    """
    known = _read_tools(tools)
    if choice is None and not known:
        return NO_CALLS
    if choice is None:
        choice = "auto"
    named = _named(choice)
    if named is not None:
        chosen = tuple(tool for tool in known if tool.name == named)
        check_field(bool(chosen), "tool_choice.function.name", "the name of a tool", named)
        return ToolChoice(ToolMode.REQUIRED, chosen, is_single=True)
    limit = "none, auto, required, or an object that names a function"
    if not isinstance(choice, str) or choice not in _MODES:
        raise wrong_field("tool_choice", limit, choice)
    mode = _MODES[choice]
    if mode is ToolMode.NONE:
        return ToolChoice(mode)
    check_field(bool(known), "tool_choice", "none where there are no tools", choice)
    return ToolChoice(mode, known, is_single=not parallel)


def _read_tools(tools: object) -> tuple[Tool, ...]:
    if tools is None:
        return ()
    if not isinstance(tools, Sequence) or isinstance(tools, str | bytes):
        raise InvalidRequest("tools must be a list", field="tools", limit="a list", actual=type(tools).__name__)
    check_field(len(tools) <= MAX_TOOLS, "tools", f"≤ {MAX_TOOLS} tools", len(tools))
    read = tuple(_read_tool(tool, f"tools[{index}]") for index, tool in enumerate(tools))
    names = [tool.name for tool in read]
    for index, name in enumerate(names):
        check_field(name not in names[:index], f"tools[{index}].function.name", "a name of its own", name)
    return read


def _read_tool(tool: object, field: str) -> Tool:
    check_field(isinstance(tool, Mapping) and tool.get("type") == "function", f"{field}.type", "function", tool)
    function = _part(tool, "function")
    if not isinstance(function, Mapping):
        raise InvalidRequest(f"{field}.function must be an object", field=f"{field}.function", limit="an object")
    name = function.get("name")
    limit = "1 … 64 letters, digits, _ and -"
    check_field(isinstance(name, str) and bool(_NAME.fullmatch(name)), f"{field}.function.name", limit, name)
    description = function.get("description", "")
    check_field(
        description is None or isinstance(description, str), f"{field}.function.description", "text", description
    )
    parameters = function.get("parameters")
    schema = _NO_PARAMETERS if parameters is None else parameters
    place = f"{field}.function.parameters"
    if not isinstance(schema, Mapping) or schema.get("type", "object") != "object":
        raise wrong_field(place, "an object's schema", schema)
    return Tool(str(name), _schema_text(schema, place), place)


def _schema_text(schema: Mapping[str, Any], field: str) -> str:
    """The schema as text, checked as those of constraints are, its type stated."""
    try:
        constraint = Constraint.json_schema({**schema, "type": "object", "x-guidance": _READ_BY_LLGUIDANCE})
        constraint.validate()
    except InvalidRequest as error:
        raise InvalidRequest(
            error.message.replace(error.field, field), field=field, limit=error.limit, actual=error.actual
        ) from None
    return constraint.text


def _named(choice: object) -> str | None:
    """The function a choice names; None where it names none."""
    if not isinstance(choice, Mapping):
        return None
    function = _part(choice, "function")
    name = function.get("name") if isinstance(function, Mapping) else None
    check_field(choice.get("type") == "function", "tool_choice.type", "function", choice.get("type"))
    check_field(isinstance(name, str), "tool_choice.function.name", "the name of a tool", name)
    return str(name)


def _part(value: object, name: str) -> object:
    return value.get(name) if isinstance(value, Mapping) else None


def _grammar(choice: ToolChoice) -> str:
    """Lark. Each tool's schema stands alone, so that its references find what they name."""
    more = "" if choice.is_single else f' ("\\n" call){{0,{MAX_CALLS - 1}}}'
    rules = [
        'call: "<tool_call>" said',
        'said: "\\n" body "\\n</tool_call>"',
        "body: " + " | ".join(f"tool_{index}" for index in range(len(choice.tools))),
    ]
    if choice.mode is ToolMode.REQUIRED:
        rules.insert(0, f"start: call{more}")
    else:
        # A lazy rule ends as soon as it can: behind the tag there is a call, never more text.
        rules.insert(0, f"start: TEXT | text_and_tag said{more}")
        rules += ['text_and_tag[lazy]: TEXT "<tool_call>"', r"TEXT: /(.|\n)*/"]
    for index, tool in enumerate(choice.tools):
        begin = json.dumps(f'{{"name": "{tool.name}", "arguments": ')
        rules.append(f'tool_{index}: {begin} %json {tool.parameters} "}}"')
    return "\n".join(rules) + "\n"
