"""Who asks. The one place that knows how a request over HTTP gets its tenant."""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends

from spolia_gateway.http.front_door import Front


async def tenant_of(front: Front) -> str:
    """The tenant is this gateway's to say: nothing a client sends can name another."""
    return front.config.tenant


Tenant = Annotated[str, Depends(tenant_of)]
"""A handler's argument: the tenant for whom it works."""
