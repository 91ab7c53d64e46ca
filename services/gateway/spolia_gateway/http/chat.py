"""POST /v1/chat/completions."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

from spolia_core.tools import ToolMode
from spolia_gateway.http import refusals
from spolia_gateway.http.answering import Answering
from spolia_gateway.http.caller import Asking, KeyedRoute
from spolia_gateway.http.chat_request import ChatRequest, told_of
from spolia_gateway.http.fields import message_of
from spolia_gateway.http.front_door import Front
from spolia_gateway.http.messages import turns_of
from spolia_gateway.http.shapes import ChatShape, Envelope
from spolia_gateway.http.tool_shape import ToolShape

PATH = "/v1/chat/completions"

router = APIRouter(route_class=KeyedRoute)


@router.post(PATH)
async def chat(body: ChatRequest, request: Request, front: Front, caller: Asking) -> Response:
    """Answers a chat, as OpenAI's chat completions do."""
    front.node.check_accepting()
    body.check()
    refusals.check_chat(body)
    request_id: str = request.state.request_id
    message = message_of(body, request_id)
    choice = body.to_tool_choice()
    may_call = choice.mode is not ToolMode.NONE
    message.sampling.CopyFrom(body.to_sampling(choice))
    tools = told_of(body.tools) if may_call else []
    turns = turns_of(body.messages)
    message.parts.extend(await front.chats.of(turns, body.reusable, tools, body.chat_template_kwargs))
    message.no_bos = True  # the template has written it, if the model wants one
    num_samples, has_logprobs = body.n or 1, bool(body.logprobs)
    shape: ChatShape
    if may_call:
        only_calls = choice.mode is ToolMode.REQUIRED
        shape = ToolShape(front.texts, num_samples, only_calls=only_calls, has_logprobs=has_logprobs)
    else:
        shape = ChatShape(front.texts, has_logprobs=has_logprobs)
    envelope = Envelope(shape, request_id, front.config.served_name)
    answering = Answering([message], num_samples, shape, envelope, choice.explain if may_call else None)
    return await answering.answer(front, caller, request, streams=bool(body.stream), tells_usage=body.tells_usage)
