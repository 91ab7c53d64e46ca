"""What those who run a gateway ask of it: /health, /version, /metrics."""

from __future__ import annotations

from fastapi import APIRouter, Request
from prometheus_client.exposition import choose_encoder
from starlette.responses import JSONResponse, Response

from spolia.version import __version__
from spolia_gateway.http.caller import Operating
from spolia_gateway.http.front_door import Front

router = APIRouter()


@router.get("/health")
@router.head("/health", include_in_schema=False)
async def health(front: Front) -> Response:
    """200 while the node serves; 503 while it drains, or knows no decode node that serves its model."""
    front.node.health.refresh()
    serving = front.node.health.is_serving()
    return JSONResponse({"status": "serving" if serving else "not_serving"}, 200 if serving else 503)


@router.get("/version")
async def version() -> dict[str, str]:
    """The release."""
    return {"version": __version__}


@router.get("/metrics")
async def metrics(request: Request, front: Front, _operator: Operating) -> Response:
    """The node's metrics, in the format the scraper accepts. They name tenants: for operators' keys."""
    encode, content_type = choose_encoder(request.headers.get("accept", ""))
    return Response(encode(front.node.metrics.registry), media_type=content_type)
