"""One good request, or more, for every call of every service: what fuzzing starts from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from chats import generate_chats, render_chats
from fuzz_world import FuzzWorld
from google.protobuf.message import Message
from hypothesis import strategies as st
from tiny_answers import generate_request
from tiny_cluster import LETTERS, TENANT, doc, ids_of, tokens

from spolia.v1 import common_pb2, decode_pb2, directory_pb2, gateway_pb2, kvstore_pb2, prefill_pb2
from spolia_core.digests import digest, frames
from spolia_core.reuse import ReuseMode
from spolia_core.sampling import SamplingParams

OWNER = "fuzz"
OBJECT = bytes(range(256)) * 8
TEXT = LETTERS[:40]


@dataclass(frozen=True)
class Method:
    """A call, at a node, and good requests for it: one after the other where it takes a stream."""

    node: str
    service: str
    name: str
    good: Sequence[Message]
    streams: bool = False
    """Whether it takes several requests."""
    is_endless: bool = False
    """Whether answers come for as long as the caller stays."""
    valid: st.SearchStrategy[Message] | None = None
    """Requests that are done, of which hardly one is drawn otherwise."""

    @property
    def path(self) -> str:
        """As gRPC names it."""
        return f"/spolia.v1.{self.service}/{self.name}"


def methods_of(world: FuzzWorld) -> list[Method]:
    """All of them but health and reflection, which are not ours."""
    return [*_gateway(), *_decode(world), *_prefill(world), *_kvstore(world), *_directory()]


def _gateway() -> list[Method]:
    def method(name: str, *good: Message, valid: st.SearchStrategy[Message] | None = None) -> Method:
        return Method("gateway", "GatewayService", name, good, valid=valid)

    document, part = gateway_pb2.Document(text=TEXT, name="name"), gateway_pb2.PromptPart
    parts = [part(document=document), part(text="Why?"), part(token_ids=gateway_pb2.TokenIds(ids=[1, 2, 3]))]
    sampling = common_pb2.SamplingParams(temperature=0.5, max_tokens=2, stop=["zz"], num_samples=2)
    held = common_pb2.SamplingParams(max_tokens=2, regex="[a-f]+", num_top_logprobs=2)
    asked = gateway_pb2.GenerateRequest(
        request_id="request", parts=parts, mode=common_pb2.REUSE_MODE_LINKED, sampling=sampling
    )
    exact = gateway_pb2.GenerateRequest(parts=parts[1:], mode=common_pb2.REUSE_MODE_EXACT, sampling=held)
    roles = ("system", "user", "assistant", "user")
    said = [gateway_pb2.ChatMessage(role=role, content=TEXT[:9]) for role in roles]
    chat = gateway_pb2.GenerateRequest(
        messages=said, documents=[document], mode=common_pb2.REUSE_MODE_LINKED, sampling=sampling
    )
    splitting = gateway_pb2.Splitting(splitter=gateway_pb2.SPLITTER_SENTENCE, max_tokens=32)
    warm = gateway_pb2.WarmRequest(documents=[document], splitting=splitting)
    return [
        method("Generate", asked, exact, chat, valid=generate_chats()),
        method("Warm", warm),
        method("Forget", gateway_pb2.ForgetRequest(documents=[document], splitting=splitting)),
        method("RenderChat", gateway_pb2.RenderChatRequest(messages=said, documents=[document]), valid=render_chats()),
        method("Tokenize", gateway_pb2.TokenizeRequest(text=TEXT)),
        method("ListModels", gateway_pb2.ListModelsRequest()),
        method("GetCluster", gateway_pb2.GetClusterRequest()),
    ]


def _decode(world: FuzzWorld) -> list[Method]:
    drawn = SamplingParams(temperature=0.7, seed=3, max_tokens=3, num_samples=2, num_top_logprobs=1)
    greedy = SamplingParams(temperature=0.0, max_tokens=2)
    parts = [doc(40, 1), tokens(5, 2), doc(20, 3), tokens(4, 4)]
    linked = generate_request(world.decode, parts, drawn, ReuseMode.LINKED)
    exact = generate_request(world.decode, [tokens(140, 5)], greedy)
    resumed = generate_request(world.decode, [tokens(30, 6)], greedy)
    resumed.resume.samples.add(token_ids=[1], num_text_code_points=1)
    chunk_ids = [part.chunk_id for part in linked.parts if part.chunk_id]
    dropped = decode_pb2.DropRequest(tenant_id=TENANT, chunk_ids=chunk_ids)
    stream = decode_pb2.StreamAnswersRequest(answer_stream=bytes(16))
    elsewhere = generate_request(world.decode, [tokens(20, 7)], greedy, answer_stream=b"x" * 16, answer_tag=1)
    many = decode_pb2.GenerateManyRequest
    named = [many(answer_stream=b"y" * 16)]
    for tag, request in enumerate((linked, exact, resumed)):
        request.answer_tag = tag
        named.append(many(requests=[decode_pb2.StreamedRequest(request=request, time_left_ms=5000)]))
    named.append(many(cancelled_tags=[0, 7]))
    return [
        Method("decode", "DecodeService", "Generate", [linked, exact, resumed, elsewhere]),
        Method("decode", "DecodeService", "StreamAnswers", [stream], is_endless=True),
        Method("decode", "DecodeService", "GenerateMany", named, streams=True),
        Method("decode", "DecodeService", "Drop", [dropped]),
    ]


def _prefill(world: FuzzWorld) -> list[Method]:
    engine = world.prefill.engine
    ids, request = ids_of(engine), prefill_pb2.PrefillRequest

    def start(**work: Message) -> prefill_pb2.PrefillRequest:
        common = {"request_id": "request", "tenant_id": TENANT, "accepted_codecs": ["raw"]}
        sinks = engine.recipe.num_sink_tokens
        return request(
            start=prefill_pb2.PrefillStart(
                **common, fingerprint=engine.adapter.fingerprint, num_sink_tokens=sinks, **work
            )
        )

    documents = [doc(20, seed).token_ids for seed in (7, 8)]
    chunks = [prefill_pb2.ChunkToCompile(chunk_id=ids.local(d), token_ids=d) for d in documents]
    compiled = prefill_pb2.CompileWork(chunks=chunks, inline_chunks=[chunks[1].chunk_id])
    context = prefill_pb2.ContextWork(token_ids=tokens(150, 9), num_cached_tokens=128, accepts_slices=True)
    parts = [common_pb2.TokenPart(token_ids=d, chunk_id=ids.local(d)) for d in documents]
    rows = [prefill_pb2.TokenRange(position=20, num_tokens=16)]
    linked = prefill_pb2.LinkWork(parts=[*parts, common_pb2.TokenPart(token_ids=tokens(5, 1))], rows=rows)
    ack = request(ack=prefill_pb2.LayerAck(layer=0, slice=0))
    cancel = request(cancel=prefill_pb2.PrefillCancel(reason="enough"))
    good = [start(context=context), start(compile=compiled), start(link=linked), ack, cancel]
    return [
        Method("prefill", "PrefillService", "Prefill", good, streams=True),
        Method(
            "prefill",
            "PrefillService",
            "Drop",
            [prefill_pb2.PrefillServiceDropRequest(tenant_id=TENANT, chunk_ids=[c.chunk_id for c in chunks])],
        ),
    ]


def _kvstore(world: FuzzWorld) -> list[Method]:
    def method(name: str, *good: Message, streams: bool = False) -> Method:
        return Method("store", "KVStoreService", name, good, streams)

    fingerprint = world.decode.engine.adapter.fingerprint
    chunk_id = ids_of(world.decode.engine).local(doc(40, 1).token_ids)
    named = {"tenant_id": TENANT, "chunk_ids": [chunk_id]}
    read = {**named, "accepted_codecs": ["raw"], "fingerprint": fingerprint}
    info = common_pb2.ObjectInfo(
        chunk_id=bytes(31) + b"z",
        kind=common_pb2.CHUNK_KIND_LOCAL,
        format_version=1,
        codec="raw",
        fingerprint=fingerprint,
        num_tokens=8,
        size_bytes=len(OBJECT),
        digest=digest(OBJECT),
    )
    header = kvstore_pb2.PutHeader(tenant_id=TENANT, info=info, durability=kvstore_pb2.DURABILITY_DISK)
    pieces = [common_pb2.Frame(offset=at, data=data, digest=found) for at, data, found in frames(OBJECT, 1024)]
    put = [kvstore_pb2.PutRequest(header=header), *(kvstore_pb2.PutRequest(frame=piece) for piece in pieces)]
    return [
        method("Lookup", kvstore_pb2.LookupRequest(**read)),
        method("Get", kvstore_pb2.GetRequest(**read)),
        method("Put", *put, streams=True),
        method("Claim", kvstore_pb2.ClaimRequest(**named, owner=OWNER, ttl_ms=100, wait_ms=10)),
        method("Unclaim", kvstore_pb2.UnclaimRequest(**named, owner=OWNER)),
        method("Pin", kvstore_pb2.PinRequest(**named, owner=OWNER, lease_ms=100)),
        method("Unpin", kvstore_pb2.UnpinRequest(**named, owner=OWNER)),
        method("Delete", kvstore_pb2.DeleteRequest(**named)),
        method("GetStats", kvstore_pb2.GetStatsRequest()),
        method("List", kvstore_pb2.ListRequest(tenant_id=TENANT, id_prefix=b"\x00", limit=10)),
        method("Verify", kvstore_pb2.VerifyRequest(**named)),
        method("Collect", kvstore_pb2.CollectRequest(idle_s=100.0, dry_run=True)),
    ]


def _directory() -> list[Method]:
    """At a store of its own: nodes that do not exist would keep the others' callers waiting."""
    record = directory_pb2.NodeRecord(
        node_id="decode-1",
        role=directory_pb2.NODE_ROLE_DECODE,
        address="127.0.0.1:9",
        model=directory_pb2.ServedModel(name="m", fingerprint=bytes(32), max_context_tokens=100, vocab_size=9),
        load=directory_pb2.NodeLoad(num_running=1, total_blocks=8),
        held_chunks=[bytes(32)],
        version="0.1.0",
    )
    return [
        Method(
            "directory",
            "DirectoryService",
            "Register",
            [directory_pb2.RegisterRequest(record=record)] * 2,
            streams=True,
            is_endless=True,
        ),
        Method(
            "directory",
            "DirectoryService",
            "Watch",
            [directory_pb2.WatchRequest(roles=[directory_pb2.NODE_ROLE_DECODE])],
            is_endless=True,
        ),
    ]
