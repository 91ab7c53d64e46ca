"""Checks that every request to a node with an engine passes before memory is held for it."""

from __future__ import annotations

from spolia_core.errors import InvalidRequest, NotSupported
from spolia_engine.core import EngineCore


def check_caller(tenant_id: str, fingerprint: bytes, core: EngineCore) -> None:
    """Raises `NotSupported` for ids derived for another model than this node's, `InvalidRequest` without a tenant."""
    if fingerprint != core.adapter.fingerprint:
        raise NotSupported(
            "this node serves another model",
            field="fingerprint",
            limit=core.adapter.fingerprint.hex(),
            actual=fingerprint.hex(),
        )
    if not tenant_id:
        raise InvalidRequest("tenant_id is empty", field="tenant_id")
