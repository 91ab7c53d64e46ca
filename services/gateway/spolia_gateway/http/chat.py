"""POST /v1/chat/completions."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

from spolia_gateway.http import refusals
from spolia_gateway.http.answering import Answering
from spolia_gateway.http.caller import Asking
from spolia_gateway.http.chat_prompt import chat_prompt
from spolia_gateway.http.chat_request import ChatRequest, turns_of
from spolia_gateway.http.fields import message_of
from spolia_gateway.http.front_door import Front
from spolia_gateway.http.shapes import ChatShape, Envelope

PATH = "/v1/chat/completions"

router = APIRouter()


@router.post(PATH)
async def chat(body: ChatRequest, request: Request, front: Front, caller: Asking) -> Response:
    """Answers a chat, as OpenAI's chat completions do."""
    front.node.check_accepting()
    body.check()
    refusals.check_chat(body)
    request_id: str = request.state.request_id
    message = message_of(body, request_id)
    message.parts.extend(await chat_prompt(front, turns_of(body.messages), body.reusable, body.chat_template_kwargs))
    message.no_bos = True  # the template has written it, if the model wants one
    message.sampling.CopyFrom(body.to_sampling())
    shape = ChatShape(front.texts, has_logprobs=bool(body.logprobs))
    envelope = Envelope(shape, request_id, front.config.served_name)
    answering = Answering([message], body.n or 1, shape, envelope)
    return await answering.answer(front, caller, request, streams=bool(body.stream), tells_usage=body.tells_usage)
