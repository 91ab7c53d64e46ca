"""GET /v1/models."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from starlette.exceptions import HTTPException

from spolia.v1 import common_pb2, gateway_pb2
from spolia_core.errors import NotFound
from spolia_gateway.http.caller import Asking
from spolia_gateway.http.front_door import Front, FrontDoor

router = APIRouter()


@router.get("/v1/models")
async def list_models(front: Front, caller: Asking) -> dict[str, Any]:
    """The models that can be asked for here."""
    return {"object": "list", "data": [_entry(model) for model in _served(front)]}


@router.get("/v1/models/{model:path}")
async def get_model(model: str, front: Front, caller: Asking) -> dict[str, Any]:
    """One of them."""
    if not model:
        raise HTTPException(404)  # the list's path, with a slash too many
    for served in _served(front):
        if served.name == model:
            return _entry(served)
    own = front.config.served_name
    raise NotFound(f"no model {model!r} is served here now; this gateway's is {own!r}", field="model", limit=own)


def context_tokens(front: FrontDoor) -> int | None:
    """The served model's longest context; None while no node serves it."""
    return next((model.max_context_tokens for model in _served(front)), None)


def _served(front: FrontDoor) -> list[gateway_pb2.ModelInfo]:
    """This gateway's model, once, as most nodes serve it: one it does not tokenize for cannot be asked here."""
    models = front.gateway.list_models().models
    return [model for model in models if model.name == front.config.served_name][:1]


def _entry(model: gateway_pb2.ModelInfo) -> dict[str, Any]:
    return {
        "id": model.name,
        "object": "model",
        "created": 0,
        "owned_by": "spolia",
        "max_model_len": model.max_context_tokens,
        "spolia": {
            "fingerprint": model.fingerprint.hex(),
            "modes": ["linked" if mode == common_pb2.REUSE_MODE_LINKED else "exact" for mode in model.modes],
            "profile": model.profile,
            "policy": model.policy,
            "linked_refusal": model.linked_refusal,
            "can_force_linked": model.can_force_linked,
        },
    }
