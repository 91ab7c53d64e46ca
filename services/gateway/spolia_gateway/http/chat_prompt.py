"""A chat's prompt, rendered off the event loop unless it is short."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from spolia.v1 import gateway_pb2
from spolia_core.errors import InvalidRequest
from spolia_gateway.chat_parts import ReusableText, chat_parts
from spolia_gateway.chat_template import RESERVED, no_template
from spolia_gateway.http.front_door import FrontDoor

SHORT_BYTES, SHORT_TURNS = 16 << 10, 64
"""Chats that are rendered at once: it takes some 20 microseconds, less than to hand them to a thread, which on a busy
node waits for its turn besides."""

Turns = Sequence[Mapping[str, Any]]


async def chat_prompt(
    front: FrontDoor,
    turns: Turns,
    documents: Sequence[ReusableText],
    tools: Sequence[Mapping[str, Any]],
    variables: Mapping[str, Any] | None,
) -> list[gateway_pb2.PromptPart]:
    """The parts. Raises `NotSupported` where the model has no template, else as `chat_parts` does."""
    template = front.template
    if template is None:
        raise no_template(front.config.served_name)
    for name in sorted(RESERVED & (variables or {}).keys()):
        field = f"chat_template_kwargs.{name}"
        raise InvalidRequest(f"{field} is set by fields of its own, and always", field=field)
    front.check_documents(documents)
    sizes = [_num_bytes(turn["content"]) + _num_bytes(turn.get("tool_calls", "")) for turn in turns]
    front.config.limits.check_bytes(sizes, "messages")
    told = [_num_bytes(tool) for tool in tools]
    front.config.limits.check_bytes(told, "tools")
    render = partial(chat_parts, template, turns, documents, tools=tools or None, variables=variables)
    if sum(sizes) + sum(told) <= SHORT_BYTES and len(turns) + len(documents) + len(tools) <= SHORT_TURNS:
        return render()
    work = asyncio.to_thread(render)
    return await front.short_deadline().wait(work, "rendering the chat template")


def _num_bytes(told: object) -> int:
    """Of a text; of anything else nearly."""
    return len(str(told).encode(errors="replace"))
