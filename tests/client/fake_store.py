"""A KV store made of a dict, on a free port of this machine; it can be told to misbehave."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import grpc

from spolia.errors import DETAIL_KEY, SpoliaError, detail_of, status_of
from spolia.v1 import common_pb2, kvstore_pb2
from spolia.v1.kvstore_pb2_grpc import KVStoreServiceServicer, add_KVStoreServiceServicer_to_server
from spolia_core.digests import digest, frames

RAM, DISK = common_pb2.TIER_RAM, common_pb2.TIER_DISK
FRAME_BYTES = 100
FINGERPRINT = b"\xfe" * 32
Key = tuple[str, bytes]


def chunk_id(start: str) -> bytes:
    """An id that begins with these hex digits."""
    return bytes.fromhex(start.ljust(64, "0"))


@dataclass
class FakeObject:
    """What the store holds of a chunk."""

    tenant: str
    chunk_id: bytes
    data: bytes = b"kv" * 125
    tiers: list[Any] = field(default_factory=lambda: [RAM])
    state: Any = kvstore_pb2.OBJECT_STATE_SERVED
    age_s: float = 7200.0
    idle_s: float = 60.0
    hits: int = 3
    pins: dict[str, int] = field(default_factory=dict)

    @property
    def info(self) -> common_pb2.ObjectInfo:
        return common_pb2.ObjectInfo(
            chunk_id=self.chunk_id,
            kind=common_pb2.CHUNK_KIND_LOCAL,
            format_version=1,
            codec="raw",
            fingerprint=FINGERPRINT,
            num_tokens=48,
            size_bytes=len(self.data),
            digest=digest(self.data),
            replica="r1",
            compute_s=0.25,
        )

    @property
    def listed(self) -> kvstore_pb2.ListedObject:
        return kvstore_pb2.ListedObject(
            tenant_id=self.tenant,
            info=self.info,
            tiers=self.tiers,
            state=self.state,
            age_s=self.age_s,
            idle_s=self.idle_s,
            hits=self.hits,
            pins=[kvstore_pb2.PinLease(owner=owner, remaining_ms=ms) for owner, ms in self.pins.items()],
        )


@dataclass
class FakeStore(KVStoreServiceServicer):
    """Answers from `objects`; raises `failure` from every call; remembers what it was asked, by method."""

    node_id: str = "kvstore-1"
    objects: dict[Key, FakeObject] = field(default_factory=dict)
    failure: SpoliaError | None = None
    damage: str = ""
    """What Get does to objects: "frame", "whole", "short", "gap" or "found" (the store notices first)."""
    damaged: list[kvstore_pb2.DamagedCopy] = field(default_factory=list)
    dies_in_verify: bool = False
    collected: kvstore_pb2.CollectResponse = field(default_factory=kvstore_pb2.CollectResponse)
    hang: bool = False
    asked: list[tuple[str, Any]] = field(default_factory=list)
    address: str = ""

    def put(self, start: str, tenant: str = "acme", **fields: Any) -> FakeObject:
        made = FakeObject(tenant, chunk_id(start), **fields)
        self.objects[tenant, made.chunk_id] = made
        return made

    def requests(self, method: str) -> list[Any]:
        return [request for name, request in self.asked if name == method]

    def List(self, request: Any, context: Any) -> Iterator[kvstore_pb2.ListResponse]:
        self._begin("List", request, context)
        found = [
            one.listed
            for _, one in sorted(self.objects.items())
            if request.tenant_id in ("", one.tenant) and one.chunk_id.startswith(request.id_prefix)
        ]
        for one in found[: request.limit or None]:
            yield kvstore_pb2.ListResponse(objects=[one])

    def Get(self, request: Any, context: Any) -> Iterator[kvstore_pb2.GetResponse]:
        self._begin("Get", request, context)
        for index, wanted in enumerate(request.chunk_ids):
            one = self.objects.get((request.tenant_id, wanted))
            if one is None or self.damage == "found":
                reason = common_pb2.MISS_REASON_DIGEST if one else common_pb2.MISS_REASON_NOT_FOUND
                elsewhere = [kvstore_pb2.StoreLocation(node_id="another", address="127.0.0.1:1", tier=RAM)]
                entry = kvstore_pb2.LookupEntry(miss=reason, locations=elsewhere)  # and no `info`
                yield kvstore_pb2.GetResponse(header=kvstore_pb2.GetHeader(index=index, entry=entry))
                continue
            entry = kvstore_pb2.LookupEntry(info=one.info, tier=one.tiers[0])
            yield kvstore_pb2.GetResponse(header=kvstore_pb2.GetHeader(index=index, entry=entry))
            for frame in self._frames(one.data):
                yield kvstore_pb2.GetResponse(frame=frame)

    def Delete(self, request: Any, context: Any) -> kvstore_pb2.DeleteResponse:
        self._begin("Delete", request, context)
        keys = [(request.tenant_id, wanted) for wanted in request.chunk_ids]
        dropped = [self.objects.pop(key) for key in keys if key in self.objects]
        copies = [(tier, one) for one in dropped for tier in one.tiers]
        return kvstore_pb2.DeleteResponse(
            num_deleted=len(dropped),
            bytes_deleted=sum(len(one.data) for one in dropped),
            tiers=[
                kvstore_pb2.TierCount(tier=tier, num_objects=sum(t == tier for t, _ in copies)) for tier in (RAM, DISK)
            ],
        )

    def Pin(self, request: Any, context: Any) -> kvstore_pb2.PinResponse:
        self._begin("Pin", request, context)
        return kvstore_pb2.PinResponse(
            pinned=[(request.tenant_id, wanted) in self.objects for wanted in request.chunk_ids]
        )

    def Unpin(self, request: Any, context: Any) -> kvstore_pb2.UnpinResponse:
        self._begin("Unpin", request, context)
        held = [self.objects.get((request.tenant_id, wanted)) for wanted in request.chunk_ids]
        ended = [one for one in held if one is not None and one.pins.pop(request.owner, None) is not None]
        return kvstore_pb2.UnpinResponse(num_unpinned=len(ended))

    def Verify(self, request: Any, context: Any) -> Iterator[kvstore_pb2.VerifyResponse]:
        self._begin("Verify", request, context)
        total = sum(len(one.tiers) for one in self.objects.values())
        # Totals so far: each message names again what the one before named.
        yield kvstore_pb2.VerifyResponse(num_checked=1, bytes_checked=10, num_total=total, damaged=self.damaged)
        if self.dies_in_verify:
            context.abort(grpc.StatusCode.UNAVAILABLE, "the store goes away")
        yield kvstore_pb2.VerifyResponse(
            num_checked=total, bytes_checked=10 * total, num_total=total, damaged=self.damaged, done=True
        )

    def Collect(self, request: Any, context: Any) -> kvstore_pb2.CollectResponse:
        self._begin("Collect", request, context)
        return self.collected

    def GetStats(self, request: Any, context: Any) -> kvstore_pb2.GetStatsResponse:
        self._begin("GetStats", request, context)
        return kvstore_pb2.GetStatsResponse(
            node_id=self.node_id,
            num_objects=len(self.objects),
            num_pins=2,
            hits=30,
            misses=10,
            digest_failures=1,
            num_quarantined=4,
            backend="sqlite",
            backend_reachable=True,
            tiers=[
                kvstore_pb2.TierStats(
                    tier=RAM, num_objects=1, used_bytes=1 << 20, budget_bytes=4 << 20, hits=20, healthy=True
                ),
                kvstore_pb2.TierStats(
                    tier=DISK, used_bytes=1 << 30, budget_bytes=10 << 30, read_bytes_per_s=3e8, healthy=False
                ),
            ],
            tenants=[
                kvstore_pb2.TenantStats(tenant_id="acme", num_objects=2, num_bytes=2048, quota_bytes=4096),
                kvstore_pb2.TenantStats(tenant_id="bloom", num_objects=1, num_bytes=10, quota_objects=5),
            ],
        )

    def _frames(self, data: bytes) -> Iterator[common_pb2.Frame]:
        sent = [common_pb2.Frame(offset=o, data=d, digest=h) for o, d, h in frames(data, FRAME_BYTES)]
        if self.damage == "frame":
            sent[1].data = b"\0" + sent[1].data[1:]
        elif self.damage == "whole":  # damaged before its frames were cut
            sent = [common_pb2.Frame(offset=o, data=d, digest=h) for o, d, h in frames(b"\0" + data[1:], FRAME_BYTES)]
        elif self.damage == "short":
            sent = sent[:-1]
        elif self.damage == "gap":
            del sent[1]
        elif self.damage == "excess":
            sent += [common_pb2.Frame(offset=o, data=d, digest=h) for o, d, h in frames(data + data, FRAME_BYTES)][
                len(sent) :
            ]
        yield from sent

    def _begin(self, method: str, request: Any, context: Any) -> None:
        self.asked.append((method, request))
        if self.failure is not None:
            context.set_trailing_metadata(((DETAIL_KEY, detail_of(self.failure).SerializeToString()),))
            context.abort(status_of(self.failure), self.failure.message)
        if self.hang:
            caller_gone = threading.Event()
            if context.add_callback(caller_gone.set) and not caller_gone.wait(30):
                raise AssertionError("the caller never went away")


def start(store: FakeStore) -> grpc.Server:
    """Serves `store`; the caller stops the server."""
    server = grpc.server(ThreadPoolExecutor(max_workers=8))
    add_KVStoreServiceServicer_to_server(store, server)
    store.address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    return server
