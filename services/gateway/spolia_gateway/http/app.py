"""The HTTP application: routes, and how what they raise is told."""

from __future__ import annotations

import re
from typing import cast

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.routing import Match
from starlette.types import ASGIApp

from spolia.version import __version__
from spolia_core.errors import InternalError, InvalidRequest, SpoliaError
from spolia_gateway.http import chat, cluster, completions, models, operations, page_files, tokenize
from spolia_gateway.http.body_errors import invalid_body
from spolia_gateway.http.edge import Edge, HttpMetrics
from spolia_gateway.http.errors import error_response, plain_error
from spolia_gateway.http.front_door import FrontDoor
from spolia_gateway.http.pages_elsewhere import PagesElsewhere
from spolia_gateway.http.request_body import BodyRefused
from spolia_gateway.http.short_way import ShortWay
from spolia_node.logs import get_log

log = get_log(__name__)


def make_app(front: FrontDoor) -> ASGIApp:
    """The application over one gateway. Its schema is at /openapi.json; no page needs the internet."""
    # A redirect to where there is no slash would name the host that a proxy asked for, and cost some clients their body
    # or key.
    app = FastAPI(title="Spolia", version=__version__, docs_url=None, redoc_url=None, redirect_slashes=False)
    app.state.front = front
    for part in (chat, completions, models, tokenize, cluster, operations, page_files):
        app.include_router(part.router)
    app.add_exception_handler(SpoliaError, _refused)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _not_served)
    app.add_exception_handler(UnicodeEncodeError, _no_text)
    app.add_exception_handler(Exception, _unexpected)
    return Edge(
        ShortWay(app, [*chat.router.routes, *completions.router.routes]),
        HttpMetrics(front.node.metrics),
        front.node.tracing,
        front.gateway.turnstile,
        max_body_bytes=front.config.http_max_body_bytes,
        body_timeout_s=front.config.rpc_timeout_s,
        leaving=lambda: front.node.leaving,
        refusal=PagesElsewhere(front.config.own_names, front.identities).refusal,
    )


async def _refused(request: Request, error: Exception) -> Response:
    told = cast(SpoliaError, error)
    if isinstance(told, InternalError):
        log.exception("internal error", route=request.url.path)
    return error_response(told, "messages" if request.url.path == chat.PATH else "prompt")


async def _invalid(request: Request, error: Exception) -> Response:
    return invalid_body(cast(RequestValidationError, error).errors())


async def _no_text(request: Request, error: Exception) -> Response:
    """JSON can spell halves of characters, which no message to a node can hold; `JsonRequest` finds most."""
    return error_response(InvalidRequest("the request holds half a character (a lone surrogate)"))


async def _not_served(request: Request, error: Exception) -> Response:
    told = cast(HTTPException, error)
    if isinstance(told, BodyRefused):
        return plain_error(told.status_code, told.detail, told.code, told.headers)
    if isinstance(told.__cause__, SpoliaError):  # FastAPI wraps what reading a body raises
        return await _refused(request, told.__cause__)
    code = {404: "unknown_url", 405: "method_not_allowed"}.get(told.status_code, "http_error")
    message = f"{request.method} {request.url.path} is not served: {told.detail}"
    if told.status_code == 404 and (served := _path_meant(request)):
        message += f"; {served} is"
    return plain_error(told.status_code, message, code, told.headers)


def _path_meant(request: Request) -> str | None:
    """The path that is served and differs from the request's in slashes alone; None where there is none."""
    asked = request.url.path
    path = re.sub("/+", "/", asked).rstrip("/") or "/"
    scope = {**request.scope, "path": path, "raw_path": path.encode()}
    is_served = path != asked and any(route.matches(scope)[0] is not Match.NONE for route in request.app.routes)
    return path if is_served else None


async def _unexpected(request: Request, error: Exception) -> Response:
    log.error("unexpected exception", route=request.url.path, exc_info=error)
    message = f"unexpected {type(error).__name__}; this node's log has the traceback"
    return error_response(InternalError(message))
