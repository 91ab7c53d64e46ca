"""POST /v1/completions."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

from spolia.v1 import gateway_pb2
from spolia_gateway.http import refusals
from spolia_gateway.http.answering import Answering
from spolia_gateway.http.caller import Asking, KeyedRoute
from spolia_gateway.http.completion_request import CompletionRequest
from spolia_gateway.http.fields import message_of
from spolia_gateway.http.front_door import Front
from spolia_gateway.http.shapes import CompletionShape, Envelope

router = APIRouter(route_class=KeyedRoute)


@router.post("/v1/completions")
async def complete(body: CompletionRequest, request: Request, front: Front, caller: Asking) -> Response:
    """Goes on from one prompt, or from each of several, as OpenAI's completions do."""
    front.node.check_accepting()
    body.check()
    refusals.check_completion(body)
    front.config.limits.check_documents(len(body.reusable))
    request_id: str = request.state.request_id
    messages = _messages(body, request_id)
    num_choices = len(messages) * body.num_samples
    shape = CompletionShape(front.texts, num_choices, has_logprobs=body.logprobs is not None)
    envelope = Envelope(shape, request_id, front.config.served_name)
    answering = Answering(messages, body.num_samples, shape, envelope)
    return await answering.answer(front, caller, request, streams=bool(body.stream), tells_usage=body.tells_usage)


def _messages(body: CompletionRequest, request_id: str) -> list[gateway_pb2.GenerateRequest]:
    """One for each prompt; their ids tell them apart in logs."""
    documents = [
        gateway_pb2.PromptPart(document=gateway_pb2.Document(text=document.text, name=f"documents[{index}]"))
        for index, document in enumerate(body.reusable)
    ]
    prompts, sampling = body.prompts(), body.to_sampling()
    messages = []
    for index, prompt in enumerate(prompts):
        message = message_of(body, request_id if len(prompts) == 1 else f"{request_id}-{index}")
        message.parts.extend(documents)
        _write_prompt(prompt, message.parts.add())
        message.sampling.CopyFrom(sampling)
        messages.append(message)
    return messages


def _write_prompt(prompt: str | list[int], part: gateway_pb2.PromptPart) -> None:
    """Where it is sent from: a part that is made elsewhere is copied byte by byte, 8 ms for 10 MB."""
    if isinstance(prompt, str):
        part.text = prompt
    else:
        part.token_ids.ids.extend(prompt)
