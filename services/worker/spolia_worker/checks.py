"""Checks that every request to a node with an engine passes before memory is held for it."""

from __future__ import annotations

from collections.abc import Sequence

from spolia_core.errors import InvalidRequest, NotSupported
from spolia_core.ids import SHARED_TENANT, IdSpace, tenant_key
from spolia_engine.core import EngineCore
from spolia_node.logs import get_log

log = get_log(__name__)


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


def readable_ids(
    core: EngineCore, cluster_secret: bytes, tenant_id: str, cache_salt: str = ""
) -> tuple[IdSpace, IdSpace]:
    """By what a tenant's requests may name chunks: its own ids, and those of `shared`, which all tenants read.

    Requests with a `cache_salt` are apart from all others: for them `shared` has ids of that salt too.
    """
    names = (tenant_id, SHARED_TENANT)
    own, shared = (core.id_space(tenant_key(cluster_secret, name, cache_salt)) for name in names)
    return own, shared


def check_local_chunk(chunk_id: bytes, token_ids: Sequence[int], spaces: Sequence[IdSpace], field: str) -> None:
    """Raises `InvalidRequest` unless this is the id of these tokens in one of `spaces`.

    One that is not would poison the cache for everyone who asks for it later, or read what another tenant has: gateways
    derive ids as nodes do, so whoever sent it guessed, or has another secret. It is logged.
    """
    if not any(ids.local(token_ids) == chunk_id for ids in spaces):
        log.warning("chunk id refused: not of these tokens and this tenant", field=field, chunk_id=chunk_id.hex())
        raise InvalidRequest(f"{field} is not the id of these tokens", field=field, actual=chunk_id.hex())
