"""Where the KV of documents is before a row is measured: on the linking node, in the store's RAM, or on its disk."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence

from spolia import Document
from spolia.v1.common_pb2 import TIER_DISK, Frame, Tier
from spolia.v1.decode_pb2 import DropRequest
from spolia.v1.decode_pb2_grpc import DecodeServiceStub
from spolia.v1.directory_pb2 import NODE_ROLE_DECODE
from spolia.v1.gateway_pb2 import GetClusterRequest
from spolia.v1.gateway_pb2_grpc import GatewayServiceStub
from spolia.v1.kvstore_pb2 import DURABILITY_RAM, DeleteRequest, LookupRequest, PutHeader, PutRequest
from spolia.v1.kvstore_pb2_grpc import KVStoreServiceStub
from spolia.v1.prefill_pb2 import PrefillServiceDropRequest
from spolia.v1.prefill_pb2_grpc import PrefillServiceStub
from spolia_bench.reuse.system import System
from spolia_bench.store.objects import make_object
from spolia_core.digests import frames
from spolia_core.ids import IdSpace, Recipe, tenant_key
from spolia_node.config import DEFAULT_SECRET

TENANT = "default"
FILLER_TENANT = "bench-filler"
FILLER_VALUE_S = 1e6
"""Seconds the filler says it took to compute: more than anything beside it, so that nothing takes its place."""
WAIT_S = 120.0
FILL_AGAIN_S = 10.0
"""How long memory that was filled may take to put chunks out, before it is emptied and filled anew."""
CALL_S = 60.0


class Residency:
    """Moves local chunks of documents by what nodes and store offer; nothing is faked.

    The store has a disk tier (`data_dir`), and `ram_budget_bytes` of memory. A chunk has at least `chunk_bytes`.
    """

    def __init__(self, system: System, ram_budget_bytes: int, chunk_bytes: int) -> None:
        self._client = system.client
        self._ids = _ids_of(system)
        self._decode = DecodeServiceStub(system.channel("decode"))
        self._prefill = PrefillServiceStub(system.channel("prefill"))
        self._store = KVStoreServiceStub(system.channel("kvstore"))
        self._filler_bytes = ram_budget_bytes - chunk_bytes // 2  # beside it no chunk has room
        self._num_fillers = 0
        self._filler_id = b""

    def ids_of(self, documents: Sequence[Document]) -> list[bytes]:
        """Chunk ids, as the gateway derives them."""
        return [self._ids.local(self._client.tokenize(document.text)) for document in documents]

    def to_store(self, ids: Sequence[bytes]) -> None:
        """Waits until the store has them, and drops them from both nodes."""
        self._wait_until_stored(ids)
        self._decode.Drop(DropRequest(tenant_id=TENANT, chunk_ids=ids), timeout=CALL_S)
        self._prefill.Drop(PrefillServiceDropRequest(tenant_id=TENANT, chunk_ids=ids), timeout=CALL_S)

    def to_disk(self, ids: Sequence[bytes]) -> None:
        """As `to_store`, and then out of the store's memory, by filling that with an object worth more."""
        self.to_store(ids)
        deadline_s = time.monotonic() + WAIT_S
        while not self._pushed_out(ids):
            if time.monotonic() > deadline_s:
                raise RuntimeError(f"waited {WAIT_S:g} s for every chunk to be on disk only")
            self.make_room()

    def _pushed_out(self, ids: Sequence[bytes]) -> bool:
        """Fills the store's memory; whether that left every chunk on disk only. One just read may have come back."""
        self._num_fillers += 1
        info, data = make_object(self._num_fillers, self._filler_bytes)
        info.compute_s = FILLER_VALUE_S
        header = PutHeader(tenant_id=FILLER_TENANT, info=info, durability=DURABILITY_RAM)
        self._store.Put(_put(header, data), timeout=CALL_S)
        self._filler_id = info.chunk_id
        until_s = time.monotonic() + FILL_AGAIN_S
        while set(self._tiers(ids)) != {TIER_DISK}:
            if time.monotonic() > until_s:
                return False
            time.sleep(0.05)
        return True

    def forget_stored(self, ids: Sequence[bytes]) -> None:
        """Drops chunks from the store alone, once they are there: they take none of its memory from the next ones."""
        self._wait_until_stored(ids)
        self._store.Delete(DeleteRequest(tenant_id=TENANT, chunk_ids=ids), timeout=CALL_S)

    def make_room(self) -> None:
        """Takes back what `to_disk` filled the store's memory with."""
        self._store.Delete(DeleteRequest(tenant_id=FILLER_TENANT, chunk_ids=[self._filler_id]), timeout=CALL_S)

    def _tiers(self, ids: Sequence[bytes]) -> list[Tier.ValueType | None]:
        """The tier of each; None for one that is not stored."""
        request = LookupRequest(tenant_id=TENANT, chunk_ids=ids, ignore_cost=True)
        entries = self._store.Lookup(request, timeout=CALL_S).entries
        return [entry.tier if entry.HasField("info") else None for entry in entries]

    def _wait_until_stored(self, ids: Sequence[bytes]) -> None:
        self._wait(lambda: None not in self._tiers(ids), "the store to have every chunk")

    def _wait(self, is_so: Callable[[], bool], what: str) -> None:
        deadline_s = time.monotonic() + WAIT_S
        while not is_so():
            if time.monotonic() > deadline_s:
                raise RuntimeError(f"waited {WAIT_S:g} s for {what}")
            time.sleep(0.05)


def _ids_of(system: System) -> IdSpace:
    """What the decode node published of its model is what the gateway derives ids from."""
    nodes = GatewayServiceStub(system.channel("gateway")).GetCluster(GetClusterRequest(), timeout=CALL_S).nodes
    model = next(node.model for node in nodes if node.role == NODE_ROLE_DECODE)
    recipe = Recipe(model.compute_dtype, model.num_sink_tokens)
    return IdSpace(tenant_key(DEFAULT_SECRET.encode(), TENANT), model.fingerprint, recipe)


def _put(header: PutHeader, data: bytes) -> Iterator[PutRequest]:
    yield PutRequest(header=header)
    for offset, piece, digest in frames(data):
        yield PutRequest(frame=Frame(offset=offset, data=piece, digest=digest))
