"""Who asks. The one place that knows how a request over HTTP shows its key."""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends, Request

from spolia_gateway.caller import Caller
from spolia_gateway.http.front_door import Front
from spolia_gateway.identities import EVERY_CALL


async def caller_of(request: Request, front: Front) -> Caller:
    """Who shows the key in the header `authorization`. Raises `Unauthenticated`, and `Forbidden` for no user's key."""
    caller = front.identities.of_header(request.headers.get("authorization"))
    front.identities.check_may(caller, EVERY_CALL)
    return caller


async def operator_of(request: Request, front: Front) -> Caller:
    """The same for what operators may see: the cluster, and what all tenants do."""
    caller = front.identities.of_header(request.headers.get("authorization"))
    front.identities.check_may(caller, "GetCluster")
    return caller


Asking = Annotated[Caller, Depends(caller_of)]
"""A handler's argument: the caller for whom it works."""
Operating = Annotated[Caller, Depends(operator_of)]
"""Likewise: an operator."""
