"""The short way to a handler: whatever is sent, the answer is that of FastAPI's own way."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import httpx2
import pytest
from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from spolia_core.errors import Busy, SpoliaError
from spolia_gateway.http import app as http_app
from spolia_gateway.http import caller as http_caller
from spolia_gateway.http.caller import Asking, KeyedRoute
from spolia_gateway.http.chat_request import ChatRequest
from spolia_gateway.http.front_door import Front
from spolia_gateway.http.short_way import ShortWay

URL = "/v1/chat/completions"
GOOD = {"messages": [{"role": "user", "content": "why"}], "max_tokens": 3}
AS_JSON = {"content-type": "application/json"}


async def told(body: ChatRequest, request: Request, front: Front, caller: Asking) -> Response:
    """What the handler was called with, or an error that the request asks for."""
    if body.user == "refused":
        raise Busy("come back", retry_after_ms=1500)
    if body.user == "broken":
        json.loads("no JSON")
    return JSONResponse([body.model_dump(mode="json"), front.name, caller, len(await request.body())])  # type: ignore[attr-defined]  # a stand-in


def ways() -> tuple[ShortWay, FastAPI]:
    router = APIRouter(route_class=KeyedRoute)
    router.post(URL)(told)
    app = FastAPI()
    bounds = SimpleNamespace(http_max_body_bytes=1 << 20, max_prompt_bytes=1 << 20)
    app.state.front = SimpleNamespace(name="front", config=bounds)
    app.include_router(router)
    app.add_exception_handler(SpoliaError, http_app._refused)
    app.add_exception_handler(RequestValidationError, http_app._invalid)
    app.add_exception_handler(HTTPException, http_app._not_served)
    app.add_exception_handler(Exception, http_app._unexpected)
    return ShortWay(app, router.routes), app


@pytest.fixture(autouse=True)
def anybody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_caller, "_shown", lambda request, front, call: "somebody")


async def answer_of(way: ASGIApp, content: bytes, headers: dict[str, str], method: str = "POST") -> tuple[Any, ...]:
    transport = httpx2.ASGITransport(app=way, raise_app_exceptions=False)
    async with httpx2.AsyncClient(transport=transport, base_url="http://gateway") as client:
        answer = await client.request(method, URL, content=content, headers=headers)
        return answer.status_code, answer.headers, answer.json()


@pytest.mark.parametrize(
    ("content", "headers", "status"),
    [
        (json.dumps(GOOD).encode(), AS_JSON, 200),
        (json.dumps(GOOD).encode(), {"content-type": "Application/JSON; charset=utf-8"}, 200),
        (json.dumps(GOOD).encode(), {"content-type": "application/problem+json"}, 200),
        (json.dumps(GOOD).encode(), {"content-type": "text/plain"}, 400),
        (json.dumps(GOOD).encode(), {}, 400),
        (b"", AS_JSON, 400),
        (b"null", AS_JSON, 400),
        (b"[]", AS_JSON, 400),
        (b'"text"', AS_JSON, 400),
        (b"{nope", AS_JSON, 400),
        (b'{"messages": [1,]}', AS_JSON, 400),
        (b"\xff\xfe", AS_JSON, 400),
        (b"[" * 100_000, AS_JSON, 400),
        (b'{"seed": ' + b"9" * 5000 + b"}", AS_JSON, 400),
        (b'{"messages": "\\ud800"}', AS_JSON, 400),
        (b"{}", AS_JSON, 400),
        (json.dumps(GOOD | {"unheard_of": 1}).encode(), AS_JSON, 400),
        (json.dumps(GOOD | {"max_tokens": "many", "n": "none"}).encode(), AS_JSON, 400),
        (json.dumps({"messages": [{"role": "nobody"}, 3]}).encode(), AS_JSON, 400),
        (json.dumps(GOOD).encode(), AS_JSON | {"content-encoding": "gzip"}, 415),
        (json.dumps(GOOD | {"user": "refused"}).encode(), AS_JSON, 429),
        (json.dumps(GOOD | {"user": "broken"}).encode(), AS_JSON, 500),
    ],
)
async def test_what_is_answered_is_the_same(content: bytes, headers: dict[str, str], status: int) -> None:
    short, long = ways()
    answer = await answer_of(short, content, headers)
    assert answer == await answer_of(long, content, headers)
    assert answer[0] == status


async def test_another_method_is_refused_in_the_same_words() -> None:
    short, long = ways()
    answer = await answer_of(short, b"", {}, "GET")
    assert answer == await answer_of(long, b"", {}, "GET")
    assert answer[0] == 405


async def test_the_short_way_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    async def fails(app: FastAPI, scope: Scope, receive: Receive, send: Send) -> None:
        raise AssertionError("FastAPI was asked")

    monkeypatch.setattr(FastAPI, "__call__", fails)
    status, _, (body, front, caller, num_bytes) = await answer_of(ways()[0], json.dumps(GOOD).encode(), AS_JSON)
    assert (status, front, caller, num_bytes) == (200, "front", "somebody", len(json.dumps(GOOD)))
    assert body["max_tokens"] == 3


async def test_a_client_that_goes_within_its_body_is_answered_nothing() -> None:
    messages: list[Message] = [{"type": "http.request", "body": b"{", "more_body": True}, {"type": "http.disconnect"}]

    async def receive() -> Message:
        return messages.pop(0)

    async def send(message: Message) -> None:
        raise AssertionError(f"nobody reads {message}")

    headers = [(b"content-type", b"application/json")]
    await ways()[0]({"type": "http", "method": "POST", "path": URL, "headers": headers}, receive, send)
    assert not messages
