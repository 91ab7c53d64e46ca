"""Checks that every request to a node with an engine passes before memory is held for it."""

from __future__ import annotations

from spolia_core.errors import InvalidRequest, NotSupported
from spolia_engine.core import EngineCore


def check_caller(tenant_id: str, fingerprint: bytes, num_sink_tokens: int, core: EngineCore) -> None:
    """Raises `NotSupported` for ids derived for another model or recipe, `InvalidRequest` without a tenant."""
    if fingerprint != core.adapter.fingerprint:
        raise NotSupported(
            "this node serves another model",
            field="fingerprint",
            limit=core.adapter.fingerprint.hex(),
            actual=fingerprint.hex(),
        )
    if num_sink_tokens != core.recipe.num_sink_tokens:
        raise NotSupported(
            f"the request's ids are of chunks behind {num_sink_tokens} sink tokens, this node's profile has "
            f"{core.recipe.num_sink_tokens}",
            field="recipe",
            limit=f"{core.recipe.num_sink_tokens} sink tokens",
            actual=f"{num_sink_tokens} sink tokens",
        )
    if not tenant_id:
        raise InvalidRequest("tenant_id is empty", field="tenant_id")
