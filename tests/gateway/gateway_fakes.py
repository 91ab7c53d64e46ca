"""Fakes of every node a gateway talks to, and what they say of themselves."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import grpc

from spolia.v1 import (
    common_pb2,
    decode_pb2,
    decode_pb2_grpc,
    directory_pb2,
    directory_pb2_grpc,
    kvstore_pb2,
    kvstore_pb2_grpc,
    prefill_pb2,
    prefill_pb2_grpc,
)
from spolia_core.errors import Busy, Cancelled

MODEL = "tiny"
FINGERPRINT = b"\x07" * 32
SECRET = "spolia-development"
WAIT_S = 30.0
"""How long what must happen may take; a test that passes does not wait."""


def served_model(**changes: Any) -> directory_pb2.ServedModel:
    values: dict[str, Any] = {
        "name": MODEL,
        "fingerprint": FINGERPRINT,
        "max_context_tokens": 256,
        "vocab_size": 320,
        "supports_linked": True,
        "compute_dtype": "float32",
    }
    return directory_pb2.ServedModel(**(values | changes))


def record(
    node_id: str,
    role: directory_pb2.NodeRole.ValueType = directory_pb2.NODE_ROLE_DECODE,
    address: str = "nowhere:1",
    *,
    model: directory_pb2.ServedModel | None = None,
    held: Iterable[bytes] = (),
    prefixes: Iterable[bytes] = (),
    draining: bool = False,
    **load: int,
) -> directory_pb2.NodeRecord:
    return directory_pb2.NodeRecord(
        node_id=node_id,
        role=role,
        address=address,
        model=served_model() if model is None else model,
        held_chunks=held,
        held_prefixes=prefixes,
        draining=draining,
        load=directory_pb2.NodeLoad(**load),
    )


class FakeDirectory(directory_pb2_grpc.DirectoryServiceServicer):
    """Says what the test says, and keeps what registers."""

    def __init__(self) -> None:
        self.nodes: dict[str, directory_pb2.NodeRecord] = {}
        self.changed = asyncio.Event()

    def put(self, *records: directory_pb2.NodeRecord) -> None:
        self.nodes.update({node.node_id: node for node in records})
        self.notify()

    def remove(self, node_id: str) -> None:
        self.nodes.pop(node_id, None)
        self.notify()

    def notify(self) -> None:
        self.changed.set()
        self.changed = asyncio.Event()

    async def lacks(self, node_id: str) -> None:
        """Returns once no such node is registered."""
        while node_id in self.nodes:
            await asyncio.wait_for(self.changed.wait(), WAIT_S)

    async def Register(self, request_iterator: Any, context: Any) -> AsyncIterator[directory_pb2.RegisterResponse]:
        node_id = ""
        try:
            async for request in request_iterator:
                node_id = request.record.node_id
                self.put(request.record)
                yield directory_pb2.RegisterResponse(lease_ms=3000)
        finally:
            self.remove(node_id)

    async def Watch(self, request: Any, context: Any) -> AsyncIterator[directory_pb2.WatchResponse]:
        while True:
            changed = self.changed
            yield directory_pb2.WatchResponse(nodes=self.nodes.values())
            await changed.wait()


class FakeStore(kvstore_pb2_grpc.KVStoreServiceServicer):
    """Knows ids and sizes, by tenant. What a gateway does not call is left to the generated base class.

    `lookup_error` fails look-ups, and `lookup_hold` keeps them from ending until it is set.
    """

    def __init__(self) -> None:
        self.objects: dict[tuple[str, bytes], int] = {}
        self.delete_error: Exception | None = None
        self.lookup_error: Exception | None = None
        self.lookup_hold: asyncio.Event | None = None
        self.lookups: list[kvstore_pb2.LookupRequest] = []

    async def Lookup(self, request: kvstore_pb2.LookupRequest, context: Any) -> kvstore_pb2.LookupResponse:
        self.lookups.append(request)
        if self.lookup_hold is not None:
            await self.lookup_hold.wait()
        if self.lookup_error is not None:
            raise self.lookup_error
        return kvstore_pb2.LookupResponse(entries=[self._entry(request.tenant_id, i) for i in request.chunk_ids])

    def _entry(self, tenant_id: str, chunk_id: bytes) -> kvstore_pb2.LookupEntry:
        size = self.objects.get((tenant_id, chunk_id))
        if size is None:
            return kvstore_pb2.LookupEntry(miss=common_pb2.MISS_REASON_NOT_FOUND)
        info = common_pb2.ObjectInfo(chunk_id=chunk_id, size_bytes=size)
        return kvstore_pb2.LookupEntry(info=info, tier=common_pb2.TIER_RAM)

    async def GetStats(self, request: kvstore_pb2.GetStatsRequest, context: Any) -> kvstore_pb2.GetStatsResponse:
        return kvstore_pb2.GetStatsResponse(used_bytes=900, budget_bytes=1000, num_pins=2)

    async def Delete(self, request: kvstore_pb2.DeleteRequest, context: Any) -> kvstore_pb2.DeleteResponse:
        if self.delete_error is not None:
            raise self.delete_error
        sizes = [
            self.objects.pop((request.tenant_id, i))
            for i in request.chunk_ids
            if (request.tenant_id, i) in self.objects
        ]
        return kvstore_pb2.DeleteResponse(num_deleted=len(sizes), bytes_deleted=sum(sizes))


@dataclass(frozen=True)
class Answer:
    """What the fake model says: ids, and the text that is final once the first n of them are known."""

    token_ids: tuple[int, ...]
    text_after: tuple[str, ...]

    def deltas(self, resume: decode_pb2.Resume | None) -> list[decode_pb2.DecodeServiceGenerateResponse]:
        """One delta per token from where `resume` stands; the first also carries text that was held back until then."""
        stood = resume.samples[0] if resume is not None else decode_pb2.ResumedSample()
        start, sent = len(stood.token_ids), stood.num_text_code_points
        steps = []
        for index in range(start, len(self.token_ids)):
            final = self.text_after[index]
            steps.append(delta(index, (self.token_ids[index],), final[sent:], sent))
            sent = len(final)
        return steps


UTF8_ANSWER = Answer((70, 71, 72, 73, 74, 75), ("H", "H", "H", "H漢", "H漢é", "H漢é!"))
"""Ids 71 to 73 are the three bytes of one character: after 71 and 72 nothing more of the text is final."""


def delta(index: int, ids: Sequence[int], text: str, offset: int) -> decode_pb2.DecodeServiceGenerateResponse:
    return decode_pb2.DecodeServiceGenerateResponse(
        delta=common_pb2.TokenDelta(token_index=index, token_ids=ids, text=text, text_offset=offset)
    )


def finish(node_id: str, num_tokens: int, seed: int = 0) -> decode_pb2.DecodeServiceGenerateResponse:
    return decode_pb2.DecodeServiceGenerateResponse(
        finish=common_pb2.Finish(
            reason=common_pb2.FINISH_REASON_LENGTH,
            num_generated_tokens=num_tokens,
            seed=seed,
            reuse=common_pb2.ReuseReport(mode=common_pb2.REUSE_MODE_EXACT, nodes=[node_id]),
        )
    )


Script = Callable[["FakeDecode", decode_pb2.DecodeServiceGenerateRequest, Any], AsyncIterator[Any]]


async def answers(
    node: FakeDecode, request: decode_pb2.DecodeServiceGenerateRequest, context: Any
) -> AsyncIterator[decode_pb2.DecodeServiceGenerateResponse]:
    """The whole answer, as a decode node in order gives it."""
    for step in UTF8_ANSWER.deltas(request.resume if request.HasField("resume") else None):
        yield step
    yield finish(node.node_id, len(UTF8_ANSWER.token_ids), request.sampling.seed)


async def hangs(node: FakeDecode, request: Any, context: Any) -> AsyncIterator[Any]:
    """One token, then nothing until the call ends."""
    yield UTF8_ANSWER.deltas(None)[0]
    await asyncio.Event().wait()


def fails_after(num_tokens: int, error: Exception | grpc.StatusCode | None) -> Script:
    """Part of the answer; then an error of ours, a bare status as a broken connection gives, or (None) a silent end."""

    async def script(node: FakeDecode, request: Any, context: Any) -> AsyncIterator[Any]:
        for step in UTF8_ANSWER.deltas(request.resume if request.HasField("resume") else None)[:num_tokens]:
            yield step
        if isinstance(error, grpc.StatusCode):
            await context.abort(error, "the connection broke")
        elif error is not None:
            raise error

    return script


@dataclass
class FakeDecode(decode_pb2_grpc.DecodeServiceServicer):
    """A decode node that follows its script and remembers what it was asked."""

    node_id: str
    script: Script = answers
    requests: list[decode_pb2.DecodeServiceGenerateRequest] = field(default_factory=list)
    remaining_s: list[float] = field(default_factory=list)
    metadata: list[dict[str, str]] = field(default_factory=list)
    drops: list[decode_pb2.DropRequest] = field(default_factory=list)
    drop_error: Exception | None = None
    num_running: int = 0
    started: asyncio.Event = field(default_factory=asyncio.Event)
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    server: Any = None
    address: str = ""

    async def Generate(self, request: Any, context: Any) -> AsyncIterator[Any]:
        self.requests.append(request)
        self.remaining_s.append(context.time_remaining())
        self.metadata.append(dict(context.invocation_metadata()))
        self.num_running += 1
        self.started.set()
        try:
            async for event in self.script(self, request, context):
                yield event
        finally:
            self.num_running -= 1
            self.ended.set()

    async def Drop(self, request: decode_pb2.DropRequest, context: Any) -> decode_pb2.DropResponse:
        self.drops.append(request)
        if self.drop_error is not None:
            raise self.drop_error
        return decode_pb2.DropResponse(num_dropped=len(request.chunk_ids))


@dataclass
class FakePrefill(prefill_pb2_grpc.PrefillServiceServicer):
    """Compiles chunks into a fake store. `hold` keeps work from ending until it is set; `error` fails every call,
    and the first `busy_times` are refused.

    With `outcome` INLINE nothing is stored, as when a store is full.
    """

    node_id: str
    store: FakeStore
    error: Exception | None = None
    busy_times: int = 0
    hold: asyncio.Event | None = None
    outcome: prefill_pb2.ChunkOutcome.ValueType = prefill_pb2.CHUNK_OUTCOME_STORED
    compiled: list[bytes] = field(default_factory=list)
    starts: list[prefill_pb2.PrefillStart] = field(default_factory=list)
    num_running: int = 0
    max_running: int = 0
    started: asyncio.Event = field(default_factory=asyncio.Event)
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    drops: list[prefill_pb2.PrefillServiceDropRequest] = field(default_factory=list)
    server: Any = None
    address: str = ""

    async def Drop(self, request: Any, context: Any) -> prefill_pb2.PrefillServiceDropResponse:
        self.drops.append(request)
        if self.error is not None:
            raise self.error
        return prefill_pb2.PrefillServiceDropResponse(num_dropped=len(request.chunk_ids))

    async def Prefill(self, request_iterator: Any, context: Any) -> AsyncIterator[prefill_pb2.PrefillResponse]:
        requests = aiter(request_iterator)
        start = (await anext(requests)).start
        self.starts.append(start)
        self.num_running += 1
        self.max_running = max(self.max_running, self.num_running)
        self.started.set()
        half_closed = asyncio.ensure_future(anext(requests, None))
        try:
            if self.error is not None:
                raise self.error
            if len(self.starts) <= self.busy_times:
                raise Busy("full", retry_after_ms=5)
            if self.hold is not None:
                await self.hold.wait()
            # As in the contract: half-closing before the end cancels the work. Give a careless caller time to do it.
            await asyncio.wait({half_closed}, timeout=0.02)
            if half_closed.done():
                raise Cancelled("the caller closed the stream")
            for chunk in start.compile.chunks:
                yield prefill_pb2.PrefillResponse(chunk=self._compile(start.tenant_id, chunk))
            yield prefill_pb2.PrefillResponse(done=prefill_pb2.PrefillDone())
        finally:
            half_closed.cancel()
            self.num_running -= 1
            self.ended.set()

    def _compile(self, tenant_id: str, chunk: prefill_pb2.ChunkToCompile) -> prefill_pb2.ChunkReady:
        size = 64 * len(chunk.token_ids)
        self.compiled.append(chunk.chunk_id)
        if self.outcome != prefill_pb2.CHUNK_OUTCOME_INLINE:
            self.store.objects[tenant_id, chunk.chunk_id] = size
        return prefill_pb2.ChunkReady(
            outcome=self.outcome,
            info=common_pb2.ObjectInfo(chunk_id=chunk.chunk_id, size_bytes=size, num_tokens=len(chunk.token_ids)),
            num_computed_tokens=len(chunk.token_ids),
        )
