"""POST /tokenize."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter
from pydantic import Field

from spolia.v1 import gateway_pb2
from spolia_core.errors import InvalidRequest
from spolia_gateway.http.caller import Asking, KeyedRoute
from spolia_gateway.http.chat_request import FunctionTool, told_of
from spolia_gateway.http.fields import DocumentText, ModelName, Strict, reusable_texts
from spolia_gateway.http.front_door import Front
from spolia_gateway.http.messages import Message, turns_of
from spolia_gateway.http.models import context_tokens

router = APIRouter(route_class=KeyedRoute)


class TokenizeRequest(Strict):
    """A prompt, or a chat, as a completion would take it."""

    model: ModelName = ""
    prompt: Annotated[str, Field(min_length=1)] | None = None
    messages: Annotated[list[Message], Field(fail_fast=True, min_length=1)] | None = None
    documents: Annotated[list[str | DocumentText], Field(fail_fast=True)] | None = None
    tools: Annotated[list[FunctionTool], Field(fail_fast=True)] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_special_tokens: bool = True
    return_token_strs: bool = False


@router.post("/tokenize")
async def tokenize(body: TokenizeRequest, front: Front, caller: Asking) -> dict[str, Any]:
    """The token ids of a prompt, begin-of-sequence token included unless it is unwanted; those of a chat are its
    template's. With `return_token_strs` also what each says.
    """
    documents = reusable_texts(body.documents)
    front.config.limits.check_documents(len(documents))
    message = gateway_pb2.GenerateRequest(model=body.model)
    if (body.prompt is None) == (body.messages is None):
        raise InvalidRequest("give one of prompt and messages", field="prompt", limit="one of prompt, messages")
    if body.messages is not None:
        turns, tools = turns_of(body.messages), told_of(body.tools)
        parts = await front.chats.of(turns, documents, tools, body.chat_template_kwargs)
        message.no_bos = True
    else:
        named = [gateway_pb2.Document(text=document.text) for document in documents]
        parts = [gateway_pb2.PromptPart(document=document) for document in named]
        parts.append(gateway_pb2.PromptPart(text=body.prompt or ""))
        message.no_bos = not body.add_special_tokens
    message.parts.extend(parts)
    token_ids = await front.gateway.prompt_ids(message, caller, front.short_deadline())
    told = {"tokens": token_ids, "count": len(token_ids), "max_model_len": context_tokens(front)}
    return told | ({"token_strs": [front.texts.name_of(i) for i in token_ids]} if body.return_token_strs else {})
