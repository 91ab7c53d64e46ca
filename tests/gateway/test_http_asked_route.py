"""The short way to a handler: whatever is sent, the answer and the schema are those of FastAPI's own way."""

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

from spolia_core.errors import SpoliaError
from spolia_gateway.http import app as http_app
from spolia_gateway.http import caller as http_caller
from spolia_gateway.http.caller import AskedRoute, Asking, KeyedRoute
from spolia_gateway.http.chat_request import ChatRequest
from spolia_gateway.http.front_door import Front

URL = "/v1/chat/completions"
GOOD = {"messages": [{"role": "user", "content": "why"}], "max_tokens": 3}
AS_JSON = {"content-type": "application/json"}


async def told(body: ChatRequest, request: Request, front: Front, caller: Asking) -> Response:
    """What the handler was called with."""
    return JSONResponse([body.model_dump(mode="json"), front.name, caller, len(await request.body())])  # type: ignore[attr-defined]  # a stand-in


def app_of(route: type[KeyedRoute]) -> FastAPI:
    router = APIRouter(route_class=route)
    router.post(URL)(told)
    app = FastAPI()
    bounds = SimpleNamespace(http_max_body_bytes=1 << 20, max_prompt_bytes=1 << 20)
    app.state.front = SimpleNamespace(name="front", config=bounds)
    app.include_router(router)
    app.add_exception_handler(SpoliaError, http_app._refused)
    app.add_exception_handler(RequestValidationError, http_app._invalid)
    app.add_exception_handler(HTTPException, http_app._not_served)
    return app


@pytest.fixture(autouse=True)
def anybody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_caller, "_shown", lambda request, front, call: "somebody")


async def answer_of(route: type[KeyedRoute], content: bytes, headers: dict[str, str]) -> tuple[int, Any]:
    transport = httpx2.ASGITransport(app=app_of(route))
    async with httpx2.AsyncClient(transport=transport, base_url="http://gateway") as client:
        answer = await client.post(URL, content=content, headers=headers)
        return answer.status_code, answer.json()


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
    ],
)
async def test_what_is_answered_is_the_same(content: bytes, headers: dict[str, str], status: int) -> None:
    short, long = await answer_of(AskedRoute, content, headers), await answer_of(KeyedRoute, content, headers)
    assert short == long
    assert short[0] == status


async def test_the_schema_is_the_same() -> None:
    short, long = app_of(AskedRoute).openapi(), app_of(KeyedRoute).openapi()
    assert short == long
    assert "ChatRequest" in short["components"]["schemas"]


async def test_the_short_way_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(route: KeyedRoute) -> http_caller.Answer:
        async def fails(request: Request) -> Response:
            raise AssertionError("FastAPI was asked")

        return fails

    monkeypatch.setattr(KeyedRoute, "answering", none)
    status, (body, front, caller, num_bytes) = await answer_of(AskedRoute, json.dumps(GOOD).encode(), AS_JSON)
    assert (status, front, caller, num_bytes) == (200, "front", "somebody", len(json.dumps(GOOD)))
    assert body["max_tokens"] == 3
