"""The client for asyncio."""

from __future__ import annotations

import os
import time
from collections.abc import Awaitable, Callable, Iterable
from functools import cached_property
from types import TracebackType
from typing import TYPE_CHECKING, TypeVar, Unpack

import grpc

from spolia.answers import Answer, WarmProgress, cluster_of, forgotten_of, models_of, parts_of
from spolia.connection import DEFAULT_ADDRESS, DEFAULT_MAX_MESSAGE_BYTES, ended, open_door
from spolia.lifetime import Lifetime
from spolia.options import GenerateOptions, SplitterName, check_options
from spolia.parts import ChatMessage, Documents, Part, Parts
from spolia.prompts import Prompt, chat_of, document_list, prompt_of
from spolia.requests import DEFAULT_RETRY_S, Outgoing, RequestBuilder, RequestT
from spolia.results import Cluster, Forgotten, Model, Result, WarmedDocument
from spolia.retries import AsyncPatientStream, AsyncServerStream
from spolia.stream import AsyncStream
from spolia.v1.gateway_pb2_grpc import GatewayServiceStub

if TYPE_CHECKING:
    from spolia.v1.gateway_pb2_grpc import GatewayServiceAsyncStub

T = TypeVar("T")


class AsyncClient:
    """Talks to a gateway from asyncio; the twin of `Client`, with the same arguments, answers and errors.

    Belongs to the event loop that makes its first call; close it, or use it in an `async with` block. Any number of
    tasks may share one. Cancelling a task that waits here ends its request and frees what it held in the cluster.

    >>> async with AsyncClient() as client:
    ...     answers = await asyncio.gather(*(client.generate([handbook, q], mode="linked") for q in questions))
    """

    def __init__(
        self,
        address: str = DEFAULT_ADDRESS,
        *,
        timeout_s: float = 60.0,
        retry_s: float = DEFAULT_RETRY_S,
        model: str = "",
        max_message_bytes: int = DEFAULT_MAX_MESSAGE_BYTES,
        api_key: str | None = None,
        ca_file: str | os.PathLike[str] | None = None,
        allow_plaintext: bool | None = None,
    ) -> None:
        self._lifetime = Lifetime()
        self._door = open_door(address, api_key, ca_file, allow_plaintext)
        self._requests = RequestBuilder(timeout_s, model, max_message_bytes, self._door.api_key, retry_s)

    async def generate(self, parts: Parts, **options: Unpack[GenerateOptions]) -> Result:
        """Answers a prompt and waits for the whole answer. `GenerateOptions` lists the keyword arguments."""
        check_options(options, "AsyncClient.generate")
        async with self.stream(parts, **options) as stream:
            return await stream.result()

    def stream(self, parts: Parts, **options: Unpack[GenerateOptions]) -> AsyncStream:
        """Starts an answer and returns at once; see `AsyncStream`. `GenerateOptions` lists the keyword arguments."""
        check_options(options, "AsyncClient.stream")
        return self._stream(prompt_of(parts), options)

    async def chat(
        self, messages: Iterable[ChatMessage], documents: Documents = (), **options: Unpack[GenerateOptions]
    ) -> Result:
        """Answers a chat, which the model's own template writes as a prompt; see `Client.chat`."""
        check_options(options, "AsyncClient.chat")
        async with self.stream_chat(messages, documents, **options) as stream:
            return await stream.result()

    def stream_chat(
        self, messages: Iterable[ChatMessage], documents: Documents = (), **options: Unpack[GenerateOptions]
    ) -> AsyncStream:
        """Starts the answer of a chat and returns at once; see `Client.chat` and `AsyncStream`."""
        check_options(options, "AsyncClient.stream_chat")
        return self._stream(chat_of(messages, documents), options)

    async def warm(
        self,
        documents: Documents,
        *,
        splitter: SplitterName | None = None,
        split_max_tokens: int | None = None,
        cache_salt: str = "",
        on_progress: Callable[[WarmedDocument], None] | None = None,
        timeout_s: float | None = None,
    ) -> list[WarmedDocument]:
        """Has the KV of `documents` computed and stored before anyone asks about them; see `Client.warm`."""
        given = document_list(documents)
        progress = WarmProgress(given, on_progress)
        outgoing_requests = self._requests.warm(
            given, timeout_s, splitter=splitter, split_max_tokens=split_max_tokens, cache_salt=cache_salt
        )
        for outgoing in outgoing_requests:
            progress.begin(outgoing.request)
            call = self._streamed(self._stub.Warm, outgoing)
            with self._lifetime.errors(), ended(call):
                async for response in call:
                    progress.add(response)
        return progress.result()

    async def forget(
        self,
        documents: Documents,
        *,
        splitter: SplitterName | None = None,
        split_max_tokens: int | None = None,
        cache_salt: str = "",
        timeout_s: float | None = None,
    ) -> Forgotten:
        """Drops the KV of `documents`, text, splitting, salt as they were given, on every tier and node. Idempotent."""
        outgoing = self._requests.forget(
            document_list(documents),
            timeout_s,
            splitter=splitter,
            split_max_tokens=split_max_tokens,
            cache_salt=cache_salt,
        )
        return forgotten_of([await self._answered(self._stub.Forget, each) for each in outgoing])

    async def tokenize(self, text: str, *, timeout_s: float | None = None) -> list[int]:
        """Token ids of `text` as a part of a prompt: no special tokens, no dummy prefix."""
        return list((await self._answered(self._stub.Tokenize, self._requests.tokenize(text, timeout_s))).token_ids)

    async def render_chat(
        self, messages: Iterable[ChatMessage], documents: Documents = (), *, timeout_s: float | None = None
    ) -> list[Part]:
        """A chat as a prompt, written with the model's own template; see `Client.render_chat`."""
        outgoing = self._requests.render_chat(chat_of(messages, documents), timeout_s)
        return parts_of(await self._answered(self._stub.RenderChat, outgoing))

    async def models(self, *, timeout_s: float | None = None) -> list[Model]:
        """The models the cluster serves now."""
        return models_of(await self._answered(self._stub.ListModels, self._requests.models(timeout_s)))

    async def cluster(self, *, timeout_s: float | None = None) -> Cluster:
        """The nodes, how busy they are and what they hold."""
        return cluster_of(await self._answered(self._stub.GetCluster, self._requests.cluster(timeout_s)))

    async def close(self) -> None:
        """Ends every call under way, with `Cancelled`, and the connection. May be called twice.

        A call made afterwards raises `InvalidRequest`.
        """
        self._lifetime.close()
        await self._channel.close(grace=None)

    def _stream(self, prompt: Prompt, options: GenerateOptions) -> AsyncStream:
        sent_s = time.monotonic()
        outgoing = self._requests.generate(prompt, **options)
        call = self._streamed(self._stub.Generate, outgoing)
        return AsyncStream(call, Answer(outgoing.request_id, sent_s), self._lifetime)

    def _streamed(
        self, method: Callable[..., AsyncServerStream[T]], outgoing: Outgoing[RequestT]
    ) -> AsyncPatientStream[T]:
        def begin() -> AsyncServerStream[T]:
            with self._lifetime.call():
                return outgoing.send(method)

        return AsyncPatientStream(begin, outgoing.patience(self._lifetime, self._door))

    async def _answered(self, method: Callable[..., Awaitable[T]], outgoing: Outgoing[RequestT]) -> T:
        with self._lifetime.call():
            return await outgoing.patience(self._lifetime, self._door).acall(lambda: outgoing.send(method))

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    # Made at the first call, so that a client may be built before the loop runs that will use it.
    @cached_property
    def _channel(self) -> grpc.aio.Channel:
        return self._door.aio_channel()

    @cached_property
    def _stub(self) -> GatewayServiceAsyncStub:
        return GatewayServiceStub(self._channel)
