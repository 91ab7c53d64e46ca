"""Documents that operators stored for every tenant, found and named by their ids under the tenant `shared`."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import replace

from spolia_core.errors import SpoliaError
from spolia_core.ids import SHARED_TENANT, IdSpace
from spolia_core.prompt import Prompt
from spolia_gateway.generation_request import GenerationRequest
from spolia_gateway.metrics import GatewayMetrics, Sharing
from spolia_gateway.routing import Demand
from spolia_node.deadline import Deadline
from spolia_node.logs import get_log
from spolia_node.store_client import StoreClient

STORE_SHARE = 0.05
"""Share of a request's time that asking the store may use up."""
MAX_STORE_WAIT_S = 1.0
"""The same in seconds: with a long deadline, compiling the documents anew would be done sooner than a share of it."""

log = get_log(__name__)


class SharedDocuments:
    """Asks the store which documents of a request it has under `shared`. Where it cannot say, none is shared."""

    def __init__(self, store: StoreClient, cluster_secret: str, metrics: GatewayMetrics) -> None:
        self._store = store
        self._cluster_secret = cluster_secret
        self._metrics = metrics

    async def apply(
        self, request: GenerationRequest, demand: Demand, deadline: Deadline
    ) -> tuple[GenerationRequest, Demand]:
        """The request with each document that is stored under `shared` named by its id there, and its demand.

        Others keep their tenant's own ids. A request without documents to reuse, as every EXACT one is, and one of the
        tenant `shared` itself come back as they are, and the store is not asked.
        """
        documents = {part.chunk_id: part.token_ids for part in request.prompt.parts if part.chunk_id is not None}
        if not documents or request.tenant_id == SHARED_TENANT:
            return request, demand
        ids = request.model.id_space(self._cluster_secret, SHARED_TENANT)
        shared_ids = await deadline.wait(
            asyncio.to_thread(_ids_under, ids, documents), f"naming the documents of request {request.request_id}"
        )
        stored = await self._stored(request, shared_ids, deadline)
        if not stored:
            return request, demand
        prompt = _renamed(request.prompt, stored)
        own_ids = request.model.id_space(self._cluster_secret, request.tenant_id)
        return replace(request, prompt=prompt), Demand.of(prompt, request.mode, own_ids)

    async def _stored(
        self, request: GenerationRequest, shared_ids: Mapping[bytes, bytes], deadline: Deadline
    ) -> dict[bytes, bytes]:
        """The entries of `shared_ids` whose object is stored; none where the store is away or late."""
        until = Deadline(min(deadline.share(STORE_SHARE).at, Deadline.after(MAX_STORE_WAIT_S).at))
        fingerprint = request.model.fingerprint
        try:
            entries = await self._store.lookup(
                SHARED_TENANT, list(shared_ids.values()), fingerprint, (), until, ignore_cost=True
            )
        except SpoliaError as error:
            log.info("no shared documents could be had", request_id=request.request_id, error=str(error))
            self._metrics.count_sharing(Sharing.UNASKED, len(shared_ids))
            return {}
        stored = {
            own_id: shared_id
            for (own_id, shared_id), entry in zip(shared_ids.items(), entries, strict=True)
            if entry.HasField("info")
        }
        self._metrics.count_sharing(Sharing.SHARED, len(stored))
        self._metrics.count_sharing(Sharing.OWN, len(shared_ids) - len(stored))
        return stored


def _ids_under(ids: IdSpace, documents: Mapping[bytes, tuple[int, ...]]) -> dict[bytes, bytes]:
    """Own id to id under `ids`. Hashes every token of the documents: keep it off the event loop."""
    return {own_id: ids.local(token_ids) for own_id, token_ids in documents.items()}


def _renamed(prompt: Prompt, names: Mapping[bytes, bytes]) -> Prompt:
    """The prompt with each chunk whose id is in `names` under its other id."""
    other_ids = [names.get(part.chunk_id or b"") for part in prompt.parts]
    pairs = zip(prompt.parts, other_ids, strict=True)
    return Prompt(tuple(part if other_id is None else replace(part, chunk_id=other_id) for part, other_id in pairs))
