"""The blocking client."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import TypeVar, Unpack

from spolia.answers import Answer, WarmProgress, cluster_of, forgotten_of, models_of, parts_of
from spolia.connection import DEFAULT_ADDRESS, DEFAULT_MAX_MESSAGE_BYTES, ended, open_door
from spolia.lifetime import Lifetime
from spolia.options import GenerateOptions, SplitterName, check_options
from spolia.parts import ChatMessage, Documents, Part, Parts
from spolia.prompts import Prompt, chat_of, document_list, prompt_of
from spolia.requests import DEFAULT_RETRY_S, Outgoing, RequestBuilder, RequestT
from spolia.results import Cluster, Forgotten, Model, Result, WarmedDocument
from spolia.retries import PatientStream, ServerStream
from spolia.stream import Stream
from spolia.v1.gateway_pb2_grpc import GatewayServiceStub

T = TypeVar("T")


class Client:
    """Talks to a gateway. Any number of threads may share one; close it, or use it in a `with` block.

    `timeout_s`, at most ten years, limits every call that names no limit of its own. For `retry_s` of that, a call of
    which nothing has come yet is made again while the gateway cannot be reached, or no node is there for it: so they
    may be replaced under way. 0 asks once. `model` may stay empty where the cluster serves one. `max_message_bytes` is
    the longest request the gateway takes. Calls raise the classes of `spolia.errors` only: `InvalidRequest` names the
    field to fix, `Busy` and `Unavailable` may be tried again, `DeadlineExceeded` when time ran out. Nothing is sent
    before the first call.

    `api_key` says who asks (default: SPOLIA_API_KEY). A gateway on another machine is reached under TLS; `ca_file`
    (default: SPOLIA_CA_FILE) holds the certificate of its authority where that is one's own, and makes TLS of a local
    connection too. `allow_plaintext` goes without TLS: key, prompts and answers can be read on the way.

    >>> with Client("127.0.0.1:7300") as client:
    ...     handbook = Document(Path("handbook.md").read_text(), name="handbook")
    ...     answer = client.generate([handbook, "How many days of leave?"], mode="linked", max_tokens=40)
    >>> answer.text, answer.reuse.num_reused_tokens
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
        self._channel = self._door.channel()
        self._stub = GatewayServiceStub(self._channel)

    def generate(self, parts: Parts, **options: Unpack[GenerateOptions]) -> Result:
        """Answers a prompt and waits for the whole answer. `GenerateOptions` lists the keyword arguments.

        >>> client.generate("Twice two is", max_tokens=4).text
        """
        check_options(options, "Client.generate")
        with self.stream(parts, **options) as stream:
            return stream.result()

    def stream(self, parts: Parts, **options: Unpack[GenerateOptions]) -> Stream:
        """Starts an answer and returns at once; see `Stream`. `GenerateOptions` lists the keyword arguments."""
        check_options(options, "Client.stream")
        return self._stream(prompt_of(parts), options)

    def chat(
        self, messages: Iterable[ChatMessage], documents: Documents = (), **options: Unpack[GenerateOptions]
    ) -> Result:
        """Answers a chat, which the model's own template writes as a prompt, and waits for the whole answer.

        Documents stand where the template puts them. Raises `NotSupported` for a model without a template (field
        "messages"). `GenerateOptions` lists the other keyword arguments; `no_bos` changes nothing here.

        >>> client.chat([ChatMessage("user", "How many days of leave?")], [handbook], mode="linked").text
        """
        check_options(options, "Client.chat")
        with self.stream_chat(messages, documents, **options) as stream:
            return stream.result()

    def stream_chat(
        self, messages: Iterable[ChatMessage], documents: Documents = (), **options: Unpack[GenerateOptions]
    ) -> Stream:
        """Starts the answer of a chat and returns at once; see `chat` and `Stream`."""
        check_options(options, "Client.stream_chat")
        return self._stream(chat_of(messages, documents), options)

    def warm(
        self,
        documents: Documents,
        *,
        splitter: SplitterName | None = None,
        split_max_tokens: int | None = None,
        cache_salt: str = "",
        on_progress: Callable[[WarmedDocument], None] | None = None,
        timeout_s: float | None = None,
    ) -> list[WarmedDocument]:
        """Has the KV of `documents` computed and stored before anyone asks about them. Idempotent.

        They are cut into chunks as prompts with the same `splitter` and `split_max_tokens` will name them, and found by
        prompts with an equal `cache_salt` only; see `GenerateOptions`. Calls `on_progress` in this thread as each is
        done, in any order; returns all in the order given. `timeout_s` limits the whole.

        >>> client.warm([Document(text, name="handbook")], on_progress=lambda done: print(done.name))
        """
        given = document_list(documents)
        progress = WarmProgress(given, on_progress)
        outgoing_requests = self._requests.warm(
            given, timeout_s, splitter=splitter, split_max_tokens=split_max_tokens, cache_salt=cache_salt
        )
        for outgoing in outgoing_requests:
            progress.begin(outgoing.request)
            call = self._streamed(self._stub.Warm, outgoing)
            with self._lifetime.errors(), ended(call):
                for response in call:
                    progress.add(response)
        return progress.result()

    def forget(
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
        return forgotten_of([self._answered(self._stub.Forget, each) for each in outgoing])

    def tokenize(self, text: str, *, timeout_s: float | None = None) -> list[int]:
        """Token ids of `text` as a part of a prompt: no special tokens, no dummy prefix."""
        return list(self._answered(self._stub.Tokenize, self._requests.tokenize(text, timeout_s)).token_ids)

    def render_chat(
        self, messages: Iterable[ChatMessage], documents: Documents = (), *, timeout_s: float | None = None
    ) -> list[Part]:
        """A chat as a prompt, written with the model's own template: parts to look at or to change, and to give to
        `generate` or `stream` with `no_bos=True`; `chat` answers it as it is. Documents stay documents, where the
        template puts them. Raises `NotSupported` where the model has no template (field "messages").

        >>> parts = client.render_chat([ChatMessage("user", "How many days of leave?")], [handbook])
        >>> client.generate(parts, no_bos=True, mode="linked").text
        """
        outgoing = self._requests.render_chat(chat_of(messages, documents), timeout_s)
        return parts_of(self._answered(self._stub.RenderChat, outgoing))

    def models(self, *, timeout_s: float | None = None) -> list[Model]:
        """The models the cluster serves now."""
        return models_of(self._answered(self._stub.ListModels, self._requests.models(timeout_s)))

    def cluster(self, *, timeout_s: float | None = None) -> Cluster:
        """The nodes, how busy they are and what they hold."""
        return cluster_of(self._answered(self._stub.GetCluster, self._requests.cluster(timeout_s)))

    def close(self) -> None:
        """Ends every call under way, with `Cancelled`, and the connection. May be called twice.

        A call made afterwards raises `InvalidRequest`.
        """
        self._lifetime.close()
        self._channel.close()

    def _stream(self, prompt: Prompt, options: GenerateOptions) -> Stream:
        sent_s = time.monotonic()
        outgoing = self._requests.generate(prompt, **options)
        call = self._streamed(self._stub.Generate, outgoing)
        return Stream(call, Answer(outgoing.request_id, sent_s), self._lifetime)

    def _streamed(self, method: Callable[..., ServerStream[T]], outgoing: Outgoing[RequestT]) -> PatientStream[T]:
        def begin() -> ServerStream[T]:
            with self._lifetime.call():
                return outgoing.send(method)

        return PatientStream(begin, outgoing.patience(self._lifetime, self._door))

    def _answered(self, method: Callable[..., T], outgoing: Outgoing[RequestT]) -> T:
        with self._lifetime.call():
            return outgoing.patience(self._lifetime, self._door).call(lambda: outgoing.send(method))

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
