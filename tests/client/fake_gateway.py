"""A gateway whose answers are written down beforehand, on a free port of this machine."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import grpc

from spolia.errors import DETAIL_KEY, Busy, NotSupported, SpoliaError, detail_of, status_of
from spolia.v1 import common_pb2, directory_pb2, gateway_pb2, kvstore_pb2
from spolia.v1.gateway_pb2_grpc import GatewayServiceServicer, add_GatewayServiceServicer_to_server

PATIENCE_S = 30.0

Call = Callable[..., Any]
"""A method of a client by name, called with the rest."""


@dataclass(frozen=True)
class Hang:
    """A step that waits until the caller has gone; `caller_gone` is set then."""


Step = gateway_pb2.GenerateResponse | SpoliaError | Hang


def delta(text: str, token_ids: list[int], token_index: int, text_offset: int) -> gateway_pb2.GenerateResponse:
    return gateway_pb2.GenerateResponse(
        delta=common_pb2.TokenDelta(text=text, token_ids=token_ids, token_index=token_index, text_offset=text_offset)
    )


def finish(num_generated_tokens: int, **fields: Any) -> gateway_pb2.GenerateResponse:
    values: dict[str, Any] = {
        "reason": common_pb2.FINISH_REASON_LENGTH,
        "num_prompt_tokens": 140,
        "num_generated_tokens": num_generated_tokens,
        "seed": 7,
        "reuse": REPORT,
    }
    return gateway_pb2.GenerateResponse(finish=common_pb2.Finish(**{**values, **fields}))


REPORT = common_pb2.ReuseReport(
    mode=common_pb2.REUSE_MODE_LINKED,
    sources=[
        common_pb2.SourceCount(source=common_pb2.TOKEN_SOURCE_COMPUTED, num_tokens=12),
        common_pb2.SourceCount(source=common_pb2.TOKEN_SOURCE_LINK, num_tokens=16),
        common_pb2.SourceCount(source=common_pb2.TOKEN_SOURCE_DEVICE, num_tokens=72),
        common_pb2.SourceCount(source=common_pb2.TOKEN_SOURCE_HOST, num_tokens=40),
    ],
    misses=[
        common_pb2.Miss(
            chunk_id=b"\1" * 32,
            kind=common_pb2.CHUNK_KIND_LOCAL,
            reason=common_pb2.MISS_REASON_STORE_LATE,
            num_tokens=30,
        )
    ],
    transfers=[
        common_pb2.TransferCount(plane=common_pb2.DATA_PLANE_GRPC, chunk_bytes=1000, live_bytes=200, inline_bytes=30)
    ],
    profile="default",
    link_tokens_per_chunk=16,
    nodes=["decode-1", "prefill-1"],
)

HELLO: list[Step] = [delta("Hé", [5], 0, 0), delta("", [6], 1, 2), delta("llo", [7, 8], 2, 2), finish(4)]
"""Four tokens in three deltas; the second holds its text back."""


@dataclass
class FakeGateway(GatewayServiceServicer):
    """Plays `script` for every Generate, or raises `failure` from every call; remembers what it was asked.

    `warm_failures` are raised at the document with this text, after the progress of those before it (documents are
    taken from the last to the first); the first `busy_times` calls to Warm are refused.
    """

    script: list[Step] = field(default_factory=lambda: list(HELLO))
    failure: SpoliaError | None = None
    hang: bool = False
    warm_failures: dict[str, SpoliaError] = field(default_factory=dict)
    busy_times: int = 0
    more_nodes: list[directory_pb2.NodeRecord] = field(default_factory=list)
    in_flight: list[gateway_pb2.RequestInFlight] = field(default_factory=list)
    has_template: bool = True
    may_link: bool = True
    directory_reachable: bool = True
    node_id: str = ""
    requests: list[Any] = field(default_factory=list)
    chats: list[Any] = field(default_factory=list)
    metadata: dict[str, str | bytes] = field(default_factory=dict)
    caller_gone: threading.Event = field(default_factory=threading.Event)
    address: str = ""

    def Generate(self, request: Any, context: Any) -> Iterator[gateway_pb2.GenerateResponse]:
        self._begin(request, context)
        if request.messages and not self.has_template:
            _abort(context, NotSupported("no chat template", field="messages"))
        if request.mode == common_pb2.REUSE_MODE_LINKED and not self.may_link:
            _abort(context, NotSupported("the profile forbids LINKED", field="profile"))
        for step in self.script:
            if isinstance(step, SpoliaError):
                _abort(context, step)
            elif isinstance(step, Hang):
                self._wait_until_caller_has_gone()
            else:
                yield step

    def Warm(self, request: Any, context: Any) -> Iterator[gateway_pb2.WarmResponse]:
        self._begin(request, context)
        if self.busy_times:
            self.busy_times -= 1
            _abort(context, Busy("full", retry_after_ms=1))
        for index in reversed(range(len(request.documents))):
            failure = self.warm_failures.get(request.documents[index].text)
            if failure is not None:
                _abort(context, failure)
            yield gateway_pb2.WarmResponse(
                document_index=index,
                num_tokens=len(request.documents[index].text),
                size_bytes=100,
                already_stored=index == 0,
                elapsed_ms=1.5,
                num_chunks=3,
                num_computed_chunks=0 if index == 0 else 2,
            )

    def Forget(self, request: Any, context: Any) -> gateway_pb2.ForgetResponse:
        self._begin(request, context)
        count = len(request.documents)
        return gateway_pb2.ForgetResponse(
            num_stored_dropped=count,
            stored_bytes_dropped=100 * count,
            num_resident_dropped=1,
            stored_tiers=[kvstore_pb2.TierCount(tier=common_pb2.TIER_DISK, num_objects=count, num_bytes=100 * count)],
        )

    def Tokenize(self, request: Any, context: Any) -> gateway_pb2.TokenizeResponse:
        self._begin(request, context)
        return gateway_pb2.TokenizeResponse(token_ids=list(request.text.encode()))

    def RenderChat(self, request: Any, context: Any) -> gateway_pb2.RenderChatResponse:
        """A template of its own: documents, then each message behind its role."""
        self.chats.append(request)
        if not self.has_template:
            _abort(context, NotSupported("no chat template", field="messages"))
        documents = [gateway_pb2.PromptPart(document=document) for document in request.documents]
        told = "".join(f"<{message.role}>{message.content}" for message in request.messages)
        return gateway_pb2.RenderChatResponse(parts=[*documents, gateway_pb2.PromptPart(text=f"{told}<assistant>")])

    def ListModels(self, request: Any, context: Any) -> gateway_pb2.ListModelsResponse:
        self._begin(request, context)
        model = gateway_pb2.ModelInfo(
            name="tiny",
            max_context_tokens=512,
            vocab_size=100,
            fingerprint=b"\2" * 32,
            modes=[common_pb2.REUSE_MODE_EXACT, common_pb2.REUSE_MODE_LINKED],
        )
        return gateway_pb2.ListModelsResponse(models=[model])

    def GetCluster(self, request: Any, context: Any) -> gateway_pb2.GetClusterResponse:
        self._begin(request, context)
        node = directory_pb2.NodeRecord(
            node_id="decode-1",
            role=directory_pb2.NODE_ROLE_DECODE,
            address="127.0.0.1:7",
            model=directory_pb2.ServedModel(name="tiny"),
            load=directory_pb2.NodeLoad(
                num_running=2,
                num_waiting=1,
                total_blocks=64,
                available_blocks=46,
                referenced_blocks=13,
                cached_blocks=12,
                in_transfer_blocks=3,
                lent_blocks=2,
            ),
            held_chunks=[b"\3" * 32],
            version="0.1.0",
        )
        nodes = [node, *self.more_nodes]
        return gateway_pb2.GetClusterResponse(
            nodes=nodes,
            directory_reachable=self.directory_reachable,
            requests=self.in_flight,
            gateway_node_id=self.node_id,
        )

    def _begin(self, request: Any, context: Any) -> None:
        self.requests.append(request)
        self.metadata = dict(context.invocation_metadata())
        if self.failure is not None:
            _abort(context, self.failure)
        # Called when the call ends, also where the server drops a handler without running it again.
        if (self.hang or Hang() in self.script) and not context.add_callback(self.caller_gone.set):
            self.caller_gone.set()
        if self.hang:
            self._wait_until_caller_has_gone()

    def _wait_until_caller_has_gone(self) -> None:
        if not self.caller_gone.wait(PATIENCE_S):
            raise AssertionError("the caller never went away")


def _abort(context: Any, error: SpoliaError) -> None:
    context.set_trailing_metadata(((DETAIL_KEY, detail_of(error).SerializeToString()),))
    context.abort(status_of(error), error.message)


def start(gateway: FakeGateway, port: int = 0, credentials: grpc.ServerCredentials | None = None) -> grpc.Server:
    """Serves `gateway`, under TLS where there are credentials; the caller stops the server."""
    server = grpc.server(ThreadPoolExecutor(max_workers=8))
    add_GatewayServiceServicer_to_server(gateway, server)
    at = f"127.0.0.1:{port}"
    bound = server.add_insecure_port(at) if credentials is None else server.add_secure_port(at, credentials)
    gateway.address = f"127.0.0.1:{bound}"
    server.start()
    return server
