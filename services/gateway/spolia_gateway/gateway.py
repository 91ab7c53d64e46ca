"""What a gateway does, without gRPC's server side: from messages to the nodes that do the work."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import aclosing, contextmanager

from spolia.v1 import common_pb2, directory_pb2, gateway_pb2
from spolia_core.errors import Busy
from spolia_core.ids import SHARED_TENANT, IdSpace
from spolia_core.splitting import Splitting
from spolia_gateway.caller import Caller
from spolia_gateway.chat_prompt import ChatPrompts
from spolia_gateway.compile_call import WarmRequest
from spolia_gateway.config import GatewayConfig
from spolia_gateway.documents import DocumentChunk, check_documents, chunks_of, stored_chunks_of
from spolia_gateway.forget import Forgetter
from spolia_gateway.generation import Generator
from spolia_gateway.generation_request import GenerationRequest
from spolia_gateway.limits import check_cache_salt, request_id_of
from spolia_gateway.metrics import GatewayMetrics
from spolia_gateway.request import CheckedRequest
from spolia_gateway.requests_in_flight import RequestsInFlight
from spolia_gateway.routing import Demand
from spolia_gateway.served_models import Model, ServedModels, check_model_name, choose_model
from spolia_gateway.shared_documents import SharedDocuments
from spolia_gateway.splitting import read_splitting
from spolia_gateway.tenant_use import TenantUse
from spolia_gateway.tokenizer import Form, PartTokenizer, cache_scope
from spolia_gateway.turnstile import Turnstile
from spolia_gateway.warm import Warmer
from spolia_node.channels import ChannelPool
from spolia_node.deadline import Deadline
from spolia_node.membership import ClusterView
from spolia_node.store_client import StoreClient
from spolia_node.tracing import current_span, span

BUSY_RETRY_MS = 500
SHORT_PROMPT_BYTES = 1 << 10
"""Prompts that are tokenized at once: it takes 0.3 ms at most, as long as to hand them to a thread and back."""

ROLES = (
    directory_pb2.NODE_ROLE_GATEWAY,
    directory_pb2.NODE_ROLE_PREFILL,
    directory_pb2.NODE_ROLE_DECODE,
    directory_pb2.NODE_ROLE_KVSTORE,
)


class Gateway:
    """The front door's work. Keeps no state of a request beyond its stream; owns none of what it is given.

    Every call checks its input first and raises `InvalidRequest` before anything is tokenized or any node is asked.
    """

    def __init__(
        self,
        config: GatewayConfig,
        tokenizer: PartTokenizer,
        chats: ChatPrompts,
        cluster: ClusterView,
        channels: ChannelPool,
        metrics: GatewayMetrics,
        use: TenantUse,
    ) -> None:
        self.use = use
        self._config = config
        self._tokenizer = tokenizer
        self._chats = chats
        self._cluster = cluster
        self._served = ServedModels()
        self._metrics = metrics
        store = StoreClient.of(channels, cluster, config.directory)
        policy = config.retry_policy
        self._generator = Generator(cluster, channels, policy, metrics)
        self._warmer = Warmer(cluster, channels, store, policy, config.warm_concurrency)
        self._forgetter = Forgetter(cluster, channels, store)
        self._shared = SharedDocuments(store, config.cluster_secret, metrics) if config.shared_documents else None
        self._requests = RequestsInFlight()
        self.turnstile = Turnstile()
        """For those who take generations in, before they look at one."""
        self.num_running = 0
        """Generations and warmings under way."""

    async def close(self) -> None:
        """Ends what is kept open to nodes."""
        await self._generator.close()

    @property
    def ready(self) -> bool:
        """Whether a request could be served now: a decode node serves the model this gateway tokenizes for."""
        return any(model.key.name == self._config.served_name for model in self._models())

    async def generate(
        self, message: gateway_pb2.GenerateRequest, caller: Caller, deadline: Deadline
    ) -> AsyncGenerator[gateway_pb2.GenerateResponse, None]:
        """See GatewayService.Generate. Closing the iterator frees everything on every node."""
        latency, around = self._metrics.request_arrived(), current_span()
        with self._running(caller):
            if message.messages or message.documents:
                message = await deadline.wait(self._chats.spelled_out(message), "writing the chat as a prompt")
            checked = CheckedRequest.check(message, self._config.limits, self._config.splitting)
            around.set(request_id=checked.request_id, mode=checked.mode.name.lower())
            with self._requests.holding(checked.request_id, caller.tenant_id, checked.mode) as progress:
                request, demand = await self._tokenized(checked, self._model(message.model), caller.tenant_id, deadline)
                progress.tokenized(request.prompt.num_tokens)
                around.set(num_prompt_tokens=request.prompt.num_tokens)
                with self.use.request_tokens(caller, request.max_tokens, "sampling.max_tokens"):
                    async with aclosing(self._generator.run(request, demand, progress, deadline)) as events:
                        async for event in events:
                            num_tokens = len(event.delta.token_ids)
                            latency.passed_on(num_tokens, request.mode, event.delta.sample_index)
                            progress.passed_on(num_tokens)
                            if event.HasField("finish"):
                                latency.finished(request.mode)
                                around.set(num_generated_tokens=progress.num_generated_tokens)
                            yield event

    async def warm(
        self, message: gateway_pb2.WarmRequest, caller: Caller, deadline: Deadline
    ) -> AsyncGenerator[gateway_pb2.WarmResponse, None]:
        """See GatewayService.Warm. Closing the iterator cancels what is not done."""
        tenant_id = caller.tenant_id
        with self._running(caller):
            request_id = request_id_of(message.request_id)
            check_documents(message.documents, self._config.limits)
            splitting = read_splitting(message.splitting, self._config.splitting)
            check_cache_salt(message.cache_salt)
            model = self._model(message.model)
            cut = await self._chunks(chunks_of, message, splitting, model, tenant_id, deadline)
            request = WarmRequest(request_id, tenant_id, model.key, cut, message.cache_salt)
            with self.use.request_tokens(caller, request.num_tokens, "documents"):
                async with aclosing(self._warmer.run(request, deadline)) as responses:
                    async for response in responses:
                        yield response

    async def forget(
        self, message: gateway_pb2.ForgetRequest, caller: Caller, deadline: Deadline
    ) -> gateway_pb2.ForgetResponse:
        """See GatewayService.Forget. Covers every fingerprint under which the model is served now."""
        tenant_id = caller.tenant_id
        with self.use.request(caller):
            check_documents(message.documents, self._config.limits)
            splitting = read_splitting(message.splitting, self._config.splitting)
            check_cache_salt(message.cache_salt)
            name = self._model(message.model).key.name
            models = [model for model in self._models() if model.key.name == name]
            chunk_ids: list[bytes] = []
            shared_ids: list[bytes] = []
            for model in models:
                cut = await self._chunks(stored_chunks_of, message, splitting, model, tenant_id, deadline)
                chunks = [chunk for document in cut for chunk in document]
                chunk_ids.extend(dict.fromkeys(chunk.chunk_id for chunk in chunks))
                if tenant_id != SHARED_TENANT and not message.cache_salt:
                    # A shared document that was gone when it was needed was compiled anew, and stored for this tenant.
                    ids = self._ids(model, SHARED_TENANT)
                    shared_ids.extend(dict.fromkeys(ids.local(chunk.token_ids) for chunk in chunks))
            return await self._forgetter.run(tenant_id, chunk_ids, deadline, stored_too=shared_ids)

    async def tokenize(
        self, message: gateway_pb2.TokenizeRequest, caller: Caller, deadline: Deadline
    ) -> gateway_pb2.TokenizeResponse:
        """See GatewayService.Tokenize. Empty text has no tokens. Needs no other node."""
        check_model_name(message.model, self._config.served_name)
        self._config.limits.check_bytes([len(message.text.encode())], "text")
        with self.use.request(caller):
            encoding = asyncio.to_thread(self._tokenizer.encode, message.text, Form.BODY, tenant_id=caller.tenant_id)
            return gateway_pb2.TokenizeResponse(token_ids=await deadline.wait(encoding, "tokenizing"))

    async def prompt_ids(self, message: gateway_pb2.GenerateRequest, caller: Caller, deadline: Deadline) -> list[int]:
        """The token ids of a request's prompt, as `generate` would read it. Needs no other node."""
        check_model_name(message.model, self._config.served_name)
        checked = CheckedRequest.check(message, self._config.limits, self._config.splitting)
        with self.use.request(caller):
            encoding = asyncio.to_thread(checked.token_ids, self._tokenizer, caller.tenant_id)
            return await deadline.wait(encoding, "tokenizing")

    def list_models(self) -> gateway_pb2.ListModelsResponse:
        """See GatewayService.ListModels. Every model a decode node serves; this gateway takes requests for its own."""
        return gateway_pb2.ListModelsResponse(models=[_model_info(model) for model in self._models()])

    def get_cluster(self) -> gateway_pb2.GetClusterResponse:
        """See GatewayService.GetCluster; for operators. Draining nodes are listed; those found dead are not."""
        nodes = [node for role in ROLES for node in self._cluster.nodes(role, include_draining=True)]
        return gateway_pb2.GetClusterResponse(
            nodes=nodes,
            directory_reachable=self._cluster.reachable,
            requests=self._requests.told(),
            gateway_node_id=self._config.node_id,
            clock_ms=round(time.time() * 1000),
        )

    def _models(self) -> Sequence[Model]:
        return self._served.of(self._cluster.nodes(directory_pb2.NODE_ROLE_DECODE))

    def _model(self, wanted: str) -> Model:
        check_model_name(wanted, self._config.served_name)
        return choose_model(self._config.served_name, self._models())

    def _ids(self, model: Model, tenant_id: str, cache_salt: str = "") -> IdSpace:
        return model.key.id_space(self._config.cluster_secret, tenant_id, cache_salt)

    async def _chunks(
        self,
        cut: Callable[..., tuple[tuple[DocumentChunk, ...], ...]],
        message: gateway_pb2.WarmRequest | gateway_pb2.ForgetRequest,
        splitting: Splitting,
        model: Model,
        tenant_id: str,
        deadline: Deadline,
    ) -> tuple[tuple[DocumentChunk, ...], ...]:
        work = asyncio.to_thread(
            cut,
            message.documents,
            model,
            self._ids(model, tenant_id, message.cache_salt),
            self._tokenizer,
            cache_scope(tenant_id, message.cache_salt),
            splitting=splitting,
            limits=self._config.limits,
        )
        return await deadline.wait(work, "tokenizing the documents")

    async def _tokenized(
        self, checked: CheckedRequest, model: Model, tenant_id: str, deadline: Deadline
    ) -> tuple[GenerationRequest, Demand]:
        with span("tokenize") as tokenizing:
            if checked.num_content_bytes <= SHORT_PROMPT_BYTES:
                request, demand = self._prepare(checked, model, tenant_id)
            else:
                work = asyncio.to_thread(self._prepare, checked, model, tenant_id)
                request, demand = await deadline.wait(work, f"tokenizing request {checked.request_id}")
            tokenizing.set(num_tokens=request.prompt.num_tokens, num_chunks=len(demand.chunk_tokens))
            if self._shared is not None and not checked.message.cache_salt:
                request, demand = await self._shared.apply(request, demand, deadline)
            return request, demand

    def _prepare(self, checked: CheckedRequest, model: Model, tenant_id: str) -> tuple[GenerationRequest, Demand]:
        ids = self._ids(model, tenant_id, checked.message.cache_salt)
        request = checked.build(model, ids, self._tokenizer, tenant_id)
        return request, Demand.of(request.prompt, request.mode, ids)

    @contextmanager
    def _running(self, caller: Caller) -> Iterator[None]:
        """Counts a request as long as it runs. Raises `Busy` when there are as many as are taken, in all or of this
        tenant.
        """
        limit = self._config.max_requests
        if self.num_running >= limit:
            raise Busy(
                f"this gateway has {limit} requests under way, the most it takes",
                limit=str(limit),
                retry_after_ms=BUSY_RETRY_MS,
            )
        with self.use.request(caller):
            self.num_running += 1
            try:
                yield
            finally:
                self.num_running -= 1


def _model_info(model: Model) -> gateway_pb2.ModelInfo:
    linked = [common_pb2.REUSE_MODE_LINKED] if model.supports_linked and not model.linked_refusal else []
    return gateway_pb2.ModelInfo(
        name=model.key.name,
        max_context_tokens=model.max_context_tokens,
        vocab_size=model.vocab_size,
        fingerprint=model.key.fingerprint,
        modes=[common_pb2.REUSE_MODE_EXACT, *linked],
        profile=model.profile,
        policy=model.policy,
        linked_refusal=model.linked_refusal,
        can_force_linked=model.supports_linked and bool(model.linked_refusal),
    )
