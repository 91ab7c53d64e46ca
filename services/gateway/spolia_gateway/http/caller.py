"""Who asks. The one place that knows how a request over HTTP shows its key."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Annotated, Any

from fastapi import Depends, Request
from fastapi.routing import APIRoute
from starlette.responses import Response

from spolia_gateway.caller import Caller
from spolia_gateway.http.front_door import Front, FrontDoor
from spolia_gateway.http.json_request import JsonRequest
from spolia_gateway.http.request_body import check_encoding
from spolia_gateway.identities import EVERY_CALL


class KeyedRoute(APIRoute):
    """A route with a body, of which nothing is read before the caller's key is known to be good.

    FastAPI reads and parses bodies before it asks dependencies: strangers could have megabytes of theirs held and
    parsed.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """The answer to a request, behind the door."""
        answer = super().get_route_handler()

        async def answer_callers(request: Request) -> Response:
            request.state.caller = let_in(request)
            return await answer(JsonRequest(request.scope, request.receive))

        return answer_callers


def let_in(request: Request) -> Caller:
    """Who asks, before a body is read. Raises as `caller_of` does, and `BodyRefused` for one that is packed."""
    caller = _shown(request, request.app.state.front, EVERY_CALL)
    check_encoding(request.headers.get("content-encoding", ""))
    return caller


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
