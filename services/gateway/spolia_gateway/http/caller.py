"""Who asks. The one place that knows how a request over HTTP shows its key."""

from __future__ import annotations

import json
from collections.abc import Callable, Coroutine
from typing import Annotated, Any

from fastapi import Depends, Request
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from spolia_gateway.caller import Caller
from spolia_gateway.http.front_door import Front, FrontDoor
from spolia_gateway.http.json_request import JsonRequest
from spolia_gateway.http.request_body import check_encoding
from spolia_gateway.identities import EVERY_CALL

Answer = Callable[[Request], Coroutine[Any, Any, Response]]
"""Answers a request."""


class KeyedRoute(APIRoute):
    """A route with a body, of which nothing is read before the caller's key is known to be good.

    FastAPI reads and parses bodies before it asks dependencies: strangers could have megabytes of theirs held and
    parsed.
    """

    def get_route_handler(self) -> Answer:
        """The answer to a request, behind the door."""
        answer = self.answering()

        async def answer_callers(request: Request) -> Response:
            request.state.caller = _shown(request, request.app.state.front, EVERY_CALL)
            check_encoding(request.headers.get("content-encoding", ""))
            return await answer(JsonRequest(request.scope, request.receive))

        return answer_callers

    def answering(self) -> Answer:
        """What answers who may ask: FastAPI."""
        return super().get_route_handler()


class AskedRoute(KeyedRoute):
    """One that is asked so often that its cost counts: its handler takes `body`, `request`, `front` and `caller` and
    gives a `Response`.

    FastAPI finds what a handler's arguments want anew for each request: with reading the body 96 µs, of which this
    leaves 41. The schema, and what is said of a body that does not fit it, are FastAPI's all the same.
    """

    def answering(self) -> Answer:
        """Calls the handler; by way of FastAPI where the body is no JSON, or may be none."""
        slowly, handler, field = super().answering(), self.endpoint, self.body_field
        assert field is not None, "the handler takes a body"

        async def answer(request: Request) -> Response:
            if not _says_json(request.headers.get("content-type", "")):
                return await slowly(request)
            try:
                value = await request.json()
            except (json.JSONDecodeError, ClientDisconnect):  # an empty body, too
                return await slowly(request)
            body, errors = field.validate(value, {}, loc=("body",))
            if errors:
                raise RequestValidationError(errors, body=value)
            response: Response = await handler(
                body=body, request=request, front=request.app.state.front, caller=request.state.caller
            )
            return response

        return answer


def _says_json(content_type: str) -> bool:
    return content_type.partition(";")[0].strip().lower() == "application/json"


async def caller_of(request: Request, front: Front) -> Caller:
    """Who shows the key in the header `authorization`. Raises `Unauthenticated`, and `Forbidden` for no user's key."""
    known: Caller | None = getattr(request.state, "caller", None)
    return known or _shown(request, front, EVERY_CALL)


async def operator_of(request: Request, front: Front) -> Caller:
    """The same for what operators may see: the cluster, and what all tenants do."""
    return _shown(request, front, "GetCluster")


def _shown(request: Request, front: FrontDoor, call: str) -> Caller:
    caller = front.identities.of_header(request.headers.get("authorization"))
    front.identities.check_may(caller, call)
    return caller


Asking = Annotated[Caller, Depends(caller_of)]
"""A handler's argument: the caller for whom it works."""
Operating = Annotated[Caller, Depends(operator_of)]
"""Likewise: an operator."""
