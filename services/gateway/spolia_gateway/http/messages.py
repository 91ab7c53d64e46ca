"""Messages of a chat as requests state them, and as templates take them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, NoReturn

from pydantic import BaseModel, ConfigDict, Field

from spolia_core.errors import NotSupported
from spolia_core.field_checks import check_field, wrong_field


class ContentPart(BaseModel):
    """A piece of a message. Text is what is served; pieces of other types are refused by name."""

    model_config = ConfigDict(extra="allow", strict=True)

    type: str
    text: str | None = None


class CalledFunction(BaseModel):
    """The function of a call. `arguments` is the text of a JSON object."""

    model_config = ConfigDict(extra="allow", strict=True)

    name: str
    arguments: str


class MadeCall(BaseModel):
    """A call of an earlier answer, as the answer stated it."""

    model_config = ConfigDict(extra="allow", strict=True)

    id: str | None = None
    type: Literal["function"] = "function"
    function: CalledFunction


class Message(BaseModel):
    """A turn of a chat. What it holds besides goes to the template, which may know it."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | Annotated[list[ContentPart], Field(fail_fast=True)] | None = None
    tool_calls: Annotated[list[MadeCall], Field(fail_fast=True)] | None = None
    tool_call_id: str | None = None
    name: str | None = None


def turns_of(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """The messages as templates take them. Raises `NotSupported` for content that is no text, `InvalidRequest` for
    calls that are none and for results of calls that nobody made.

    A tool's message gets the name of the function that its call named: some templates write it.
    """
    turns: list[dict[str, Any]] = []
    id_to_name: dict[str, str] = {}
    for index, message in enumerate(messages):
        turn = _turn(message, f"messages[{index}]")
        id_to_name |= {call.id: call.function.name for call in message.tool_calls or () if call.id is not None}
        if message.role == "tool" and message.tool_call_id is not None:
            made = message.tool_call_id in id_to_name
            check_field(made, f"messages[{index}].tool_call_id", "the id of a call before it", message.tool_call_id)
            turn.setdefault("name", id_to_name[message.tool_call_id])
        turns.append(turn)
    return turns


def _turn(message: Message, field: str) -> dict[str, Any]:
    """Templates written for text take content as one string, calls only where there are some, their arguments as an
    object, and know the developer by the older name.
    """
    turn = message.model_dump(exclude_none=True)
    turn["content"] = _text(message, field)
    if message.role == "developer":
        turn["role"] = "system"
    if not turn.pop("tool_calls", None):
        return turn
    place = f"{field}.tool_calls"
    check_field(message.role == "assistant", place, "an assistant's", message.role)
    made = enumerate(message.tool_calls or ())
    return turn | {"tool_calls": [_call(call, f"{place}[{index}].function.arguments") for index, call in made]}


def _call(call: MadeCall, field: str) -> dict[str, Any]:
    told = call.model_dump(exclude_none=True)
    told["function"]["arguments"] = _arguments(call.function.arguments, field)
    return told


def _arguments(text: str, field: str) -> Mapping[str, Any]:
    """No text at all is what some clients write for no arguments."""
    limit = "the text of a JSON object"
    try:
        arguments = json.loads(text or "{}", parse_constant=_no_json)
    except (ValueError, RecursionError):
        raise wrong_field(field, limit, text) from None
    if not isinstance(arguments, dict):
        raise wrong_field(field, limit, text)
    return arguments


def _no_json(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no number of JSON")


def _text(message: Message, field: str) -> str:
    content = message.content
    check_field(content is not None or message.role == "assistant", f"{field}.content", "text", "null")
    if not isinstance(content, list):
        return content or ""
    for index, part in enumerate(content):
        if part.type != "text":
            raise NotSupported(
                f"{field}.content[{index}] is {part.type!r}; this server takes text",
                field=f"{field}.content[{index}].type",
                limit="text",
                actual=part.type,
            )
        check_field(part.text is not None, f"{field}.content[{index}].text", "text", "null")
    return "\n".join(part.text or "" for part in content)
