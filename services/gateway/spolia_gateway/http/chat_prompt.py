"""A chat's prompt, rendered off the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

from spolia.v1 import gateway_pb2
from spolia_core.errors import InvalidRequest
from spolia_gateway.chat_parts import ReusableText, chat_parts
from spolia_gateway.chat_template import RESERVED, no_template
from spolia_gateway.http.front_door import FrontDoor

Turns = Sequence[Mapping[str, Any]]


async def chat_prompt(
    front: FrontDoor, turns: Turns, documents: Sequence[ReusableText], variables: Mapping[str, Any] | None
) -> list[gateway_pb2.PromptPart]:
    """The parts. Raises `NotSupported` where the model has no template, else as `chat_parts` does."""
    template = front.template
    if template is None:
        raise no_template(front.config.served_name)
    for name in sorted(RESERVED & (variables or {}).keys()):
        field = f"chat_template_kwargs.{name}"
        raise InvalidRequest(f"{field} is set by fields of its own, and always", field=field)
    front.check_documents(documents)
    # Before the template sees any of it: rendering takes time in proportion to the text.
    front.config.limits.check_bytes([len(str(turn["content"]).encode()) for turn in turns], "messages")
    work = asyncio.to_thread(chat_parts, template, turns, documents, variables=variables)
    return await front.short_deadline().wait(work, "rendering the chat template")
