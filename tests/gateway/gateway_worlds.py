"""Small worlds for the gateway's tests: tiny tokenizers, and fakes of every node a gateway talks to."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import grpc
from hypothesis import settings
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from spolia.v1 import (
    common_pb2,
    decode_pb2,
    decode_pb2_grpc,
    directory_pb2,
    directory_pb2_grpc,
    gateway_pb2,
    gateway_pb2_grpc,
    kvstore_pb2,
    kvstore_pb2_grpc,
    prefill_pb2,
    prefill_pb2_grpc,
)
from spolia_core.errors import Busy, Cancelled
from spolia_gateway.config import GatewayConfig
from spolia_gateway.node import GatewayNode
from spolia_node.deadline import Deadline
from spolia_node.interceptor import ErrorInterceptor
from spolia_node.membership import ClusterView

MODEL = "tiny"
FINGERPRINT = b"\x07" * 32
SECRET = "spolia-development"
LINES = ["the stones of one building", "are cut and set again in another", "<s>[user] what was it? [end]", "é€ 漢字"]
WAIT_S = 10.0
LAWFUL = settings(derandomize=True, deadline=None, max_examples=60, database=None)

# --- tokenizers ---------------------------------------------------------------------------------------------------


def byte_level_tokenizer(*, add_prefix_space: bool = False, bos: bool = True) -> Tokenizer:
    """A byte-level BPE with <s>, </s> and [user] as special tokens, like most models of today."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<s>", "</s>", "[user]"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(LINES, trainer)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
        )
    return tokenizer


def sentencepiece_tokenizer(style: str) -> Tokenizer:
    """A SentencePiece-like BPE that puts "▁" before what it encodes: `style` is metaspace, first, or prepend."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    if style == "prepend":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        scheme = "first" if style == "first" else "always"
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Metaspace(prepend_scheme=scheme)])
    trainer = trainers.BpeTrainer(vocab_size=120, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False)
    tokenizer.train_from_iterator(LINES[:2], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


def write_model(folder: Path, tokenizer: Tokenizer, **config: object) -> Path:
    """A model directory without weights: what a gateway reads of one."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


# --- records ------------------------------------------------------------------------------------------------------


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
    draining: bool = False,
    **load: int,
) -> directory_pb2.NodeRecord:
    return directory_pb2.NodeRecord(
        node_id=node_id,
        role=role,
        address=address,
        model=served_model() if model is None else model,
        held_chunks=held,
        draining=draining,
        load=directory_pb2.NodeLoad(**load),
    )


# --- fakes --------------------------------------------------------------------------------------------------------


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
        start = len(resume.token_ids) if resume is not None else 0
        sent = resume.num_text_code_points if resume is not None else 0
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


# --- the world ----------------------------------------------------------------------------------------------------


@dataclass
class World:
    """A gateway among fakes. `stub` is a client's."""

    directory: FakeDirectory
    store: FakeStore
    node: GatewayNode
    stub: Any
    channel: grpc.aio.Channel
    directory_server: grpc.aio.Server
    decodes: dict[str, FakeDecode] = field(default_factory=dict)
    prefills: dict[str, FakePrefill] = field(default_factory=dict)

    async def sees(self, predicate: Callable[[ClusterView], bool]) -> None:
        """Returns once the gateway's view of the cluster is such."""
        await self.node.cluster.wait_for(predicate, Deadline.after(WAIT_S))

    async def idle(self) -> None:
        """Returns once no call is under way at the gateway."""
        await asyncio.wait_for(self.node.server._interceptor.wait_idle(), WAIT_S)

    async def generate(self, request: gateway_pb2.GenerateRequest, timeout: float = WAIT_S) -> Streamed:
        """The whole stream, checked delta by delta as a strict client would."""
        streamed = Streamed()
        async for response in self.stub.Generate(request, timeout=timeout):
            streamed.take(response)
        return streamed


@dataclass
class Streamed:
    """What a client has at the end of a stream."""

    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    finish: common_pb2.Finish | None = None

    def take(self, response: gateway_pb2.GenerateResponse) -> None:
        assert self.finish is None
        if response.HasField("finish"):
            self.finish = response.finish
            return
        if response.delta.token_ids:
            assert response.delta.token_index == len(self.token_ids)
        if response.delta.text:
            assert response.delta.text_offset == len(self.text)
        self.token_ids.extend(response.delta.token_ids)
        self.text += response.delta.text


async def serve(stack: AsyncExitStack, *registrars: Callable[[grpc.aio.Server], None]) -> tuple[grpc.aio.Server, str]:
    """A server of fakes on a free port, stopped when the stack closes."""
    server = grpc.aio.server(interceptors=(ErrorInterceptor(),))
    for register in registrars:
        register(server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    stack.push_async_callback(lambda: server.stop(None))
    return server, f"127.0.0.1:{port}"


@asynccontextmanager
async def world(
    model: Path,
    *,
    decodes: Sequence[FakeDecode] = (),
    num_prefills: int = 0,
    served: directory_pb2.ServedModel | None = None,
    **changes: Any,
) -> AsyncIterator[World]:
    """Starts fakes and a gateway, waits until it knows them all, stops everything, and sees that no task is left.

    Each decode node is busier than the one before it, so a short prompt is tried on them in the order given.
    """
    before = asyncio.all_tasks()
    async with AsyncExitStack() as stack:
        directory = FakeDirectory()
        store = FakeStore()  # type: ignore[abstract]  # what it lacks answers UNIMPLEMENTED, and no gateway calls it
        directory_server, directory_address = await serve(
            stack,
            partial(directory_pb2_grpc.add_DirectoryServiceServicer_to_server, directory),
            partial(kvstore_pb2_grpc.add_KVStoreServiceServicer_to_server, store),
        )
        prefills = [FakePrefill(f"prefill-{i}", store) for i in range(num_prefills)]
        for fake in decodes:
            fake.server, fake.address = await serve(
                stack, partial(decode_pb2_grpc.add_DecodeServiceServicer_to_server, fake)
            )
            directory.put(
                record(fake.node_id, address=fake.address, model=served, num_running=10 * len(directory.nodes))
            )
        for other in prefills:
            other.server, other.address = await serve(
                stack, partial(prefill_pb2_grpc.add_PrefillServiceServicer_to_server, other)
            )
            directory.put(record(other.node_id, directory_pb2.NODE_ROLE_PREFILL, other.address, model=served))
        fixed: dict[str, Any] = {"port": 0, "directory": directory_address, "model": model, "model_name": MODEL}
        config = GatewayConfig(**fixed, **({"drain_timeout_s": 0.2} | changes))
        node = GatewayNode(config)
        stack.push_async_callback(node.close)
        stack.push_async_callback(node.server.stop_at_once)
        address = await node.start()
        channel = grpc.aio.insecure_channel(address)
        stack.push_async_callback(lambda: channel.close(None))
        stub = gateway_pb2_grpc.GatewayServiceStub(channel)
        made = World(
            directory,
            store,
            node,
            stub,
            channel,
            directory_server,
            {fake.node_id: fake for fake in decodes},
            {fake.node_id: fake for fake in prefills},
        )
        await made.sees(
            lambda view: (
                len(view.nodes(directory_pb2.NODE_ROLE_DECODE)) == len(decodes)
                and len(view.nodes(directory_pb2.NODE_ROLE_PREFILL)) == num_prefills
                and view.reachable
            )
        )
        yield made
    left = asyncio.all_tasks() - before
    if left:  # cancelled calls of the fakes take a moment to unwind
        _, left = await asyncio.wait(left, timeout=WAIT_S)
    assert not left, f"tasks left behind: {left}"


def text_request(*texts: str, **changes: Any) -> gateway_pb2.GenerateRequest:
    """A request whose parts are live texts."""
    return gateway_pb2.GenerateRequest(parts=[gateway_pb2.PromptPart(text=text) for text in texts], **changes)


def document_part(text: str, name: str = "") -> gateway_pb2.PromptPart:
    return gateway_pb2.PromptPart(document=gateway_pb2.Document(text=text, name=name))


def ids_part(*ids: int) -> gateway_pb2.PromptPart:
    return gateway_pb2.PromptPart(token_ids=gateway_pb2.TokenIds(ids=ids))
