"""Tools for a chat template that knows none: told in a system turn, and calls and results written into the turns' text.

Calls stand there as the grammar has an answer write them, `spolia_core.tools`. The tags around tools and results are
those of the Hermes and Qwen templates, which many models have read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from spolia_core.tools import CLOSE_TAG, OPEN_TAG

Turn = Mapping[str, Any]

_TOLD = "These functions can be called; each line describes one, its parameters as JSON schema."
_HOW_TO_CALL = f"""A call is its function's name and arguments, written like this:
{OPEN_TAG}
{{"name": "the name", "arguments": {{"an argument": "its value"}}}}
{CLOSE_TAG}
What the function gives comes back between <tool_response> and </tool_response>."""


def words_for(tools: Sequence[Mapping[str, Any]]) -> str:
    """What a model is told of its tools, and how it calls them."""
    lines = [json.dumps(tool, ensure_ascii=False) for tool in tools]
    return "\n".join([_TOLD, "<tools>", *lines, "</tools>", _HOW_TO_CALL])


def with_system_words(turns: Sequence[Turn], words: str) -> list[Turn]:
    """The turns with `words` at the end of a system turn that begins them, theirs or one of its own."""
    if turns and turns[0].get("role") == "system":
        return [{**turns[0], "content": f"{turns[0]['content']}\n\n{words}"}, *turns[1:]]
    return [{"role": "system", "content": words}, *turns]


def in_text(turns: Sequence[Turn]) -> list[Turn]:
    """The turns without calls and tools' turns: an assistant's calls end its text, and results that follow each other
    are one user turn.
    """
    written: list[Turn] = []
    before = ""
    for turn in turns:
        role = str(turn.get("role"))
        if role != "tool":
            written.append(_with_calls_in_text(turn))
        elif before == "tool":
            written[-1] = {**written[-1], "content": f"{written[-1]['content']}\n{_result(turn)}"}
        else:
            written.append({"role": "user", "content": _result(turn)})
        before = role
    return written


def _with_calls_in_text(turn: Turn) -> Turn:
    calls = turn.get("tool_calls")
    if not calls:
        return turn
    text = "\n".join([*([turn["content"]] if turn["content"] else []), *(_call(call["function"]) for call in calls)])
    return {name: value for name, value in turn.items() if name != "tool_calls"} | {"content": text}


def _call(function: Mapping[str, Any]) -> str:
    said = {"name": function["name"], "arguments": function["arguments"]}
    return f"{OPEN_TAG}\n{json.dumps(said, ensure_ascii=False)}\n{CLOSE_TAG}"


def _result(turn: Turn) -> str:
    return f"<tool_response>\n{turn['content']}\n</tool_response>"
