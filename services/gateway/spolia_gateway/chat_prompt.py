"""A chat's prompt, rendered off the event loop unless it is short."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from spolia.v1 import gateway_pb2
from spolia_core.errors import InvalidRequest
from spolia_core.field_checks import check_field
from spolia_gateway.chat_parts import ReusableText, chat_parts
from spolia_gateway.chat_template import RESERVED, ChatTemplate, no_template
from spolia_gateway.config import GatewayConfig
from spolia_gateway.documents import check_documents
from spolia_gateway.served_models import check_model_name
from spolia_node.deadline import Deadline

SHORT_BYTES, SHORT_TURNS = 16 << 10, 64
"""Chats that are rendered at once: it takes some 20 microseconds, less than to hand them to a thread, which on a busy
node waits for its turn besides."""

Turns = Sequence[Mapping[str, Any]]
Parts = list[gateway_pb2.PromptPart]


class ChatPrompts:
    """Writes chats as prompts, with the model's template. `template` is None where the model has none."""

    def __init__(self, template: ChatTemplate | None, config: GatewayConfig) -> None:
        self._template = template
        self._config = config

    async def spelled_out(self, message: gateway_pb2.GenerateRequest) -> gateway_pb2.GenerateRequest:
        """The request with its chat as parts; itself where it has none. What it says besides is not looked at.

        Raises `InvalidRequest` for a chat beside parts and for documents without one, else as `asked` does.
        """
        if not message.messages:
            no_documents = "none without messages; those of a prompt are parts"
            check_field(not message.documents, "documents", no_documents, len(message.documents))
            return message
        check_field(not message.parts, "parts", "none beside messages", len(message.parts))
        written = gateway_pb2.GenerateRequest()
        written.CopyFrom(message)
        written.ClearField("messages")
        written.ClearField("documents")
        written.parts.extend(await self.asked(message))
        written.no_bos = True  # the template has written it, if the model wants one
        return written

    async def asked(self, message: gateway_pb2.RenderChatRequest | gateway_pb2.GenerateRequest) -> Parts:
        """The parts of a chat that came over gRPC; see GatewayService.RenderChat."""
        limits = self._config.limits
        check_model_name(message.model, self._config.served_name)
        limits.check_count(len(message.messages), limits.max_parts, "messages")
        if message.documents:
            check_documents(message.documents, limits)
        turns = [{"role": turn.role, "content": turn.content} for turn in message.messages]
        return await self.of(turns, [ReusableText(each.text, name=each.name) for each in message.documents])

    async def of(
        self,
        turns: Turns,
        documents: Sequence[ReusableText],
        tools: Sequence[Mapping[str, Any]] = (),
        variables: Mapping[str, Any] | None = None,
    ) -> Parts:
        """The parts. Raises `NotSupported` where the model has no template, else as `chat_parts` does."""
        template, limits = self._template, self._config.limits
        if template is None:
            raise no_template(self._config.served_name)
        for name in sorted(RESERVED & (variables or {}).keys()):
            field = f"chat_template_kwargs.{name}"
            raise InvalidRequest(f"{field} is set by fields of its own, and always", field=field)
        limits.check_documents(len(documents))
        sizes = [_num_bytes(turn["content"]) + _num_bytes(turn.get("tool_calls", "")) for turn in turns]
        limits.check_bytes(sizes, "messages")
        told = [_num_bytes(tool) for tool in tools]
        limits.check_bytes(told, "tools")
        render = partial(chat_parts, template, turns, documents, tools=tools or None, variables=variables)
        if sum(sizes) + sum(told) <= SHORT_BYTES and len(turns) + len(documents) + len(tools) <= SHORT_TURNS:
            return render()
        work = asyncio.to_thread(render)
        return await Deadline.after(self._config.rpc_timeout_s).wait(work, "rendering the chat template")


def _num_bytes(told: object) -> int:
    """Of a text; of anything else nearly."""
    return len(str(told).encode(errors="replace"))
