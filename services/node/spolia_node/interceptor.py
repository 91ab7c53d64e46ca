"""One place where a server's exceptions become gRPC statuses, and where its calls are counted and can be ended."""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import aclosing, closing, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import grpc
import structlog
from google.protobuf.message import DecodeError, Message

from spolia.errors import DETAIL_KEY, detail_of, status_of
from spolia_core.errors import InternalError, InvalidRequest, NotSupported, SpoliaError, Unavailable
from spolia_node.logs import get_log
from spolia_node.stall_watch import StallWatch
from spolia_node.tracing import NO_SPAN, Metadata, Span

REQUEST_ID_KEY = "x-request-id"
MAX_REQUEST_ID_CHARS = 128
MAX_MESSAGE_CHARS = 512
"""Of an error. Trailers hold about 8 KiB; the message is percent-encoded there, up to three bytes for each of UTF-8."""

Observe = Callable[[str, grpc.StatusCode, float], None]
"""Takes the full method name, the status code and the seconds of a call that ended."""

Check = Callable[[str, Any], None]
"""Takes the full method name and gRPC's context of a call that begins; raises to refuse it."""

Admit = Callable[[str, Metadata], None]
"""Takes the full method name and the metadata of a call that begins; raises `SpoliaError` to refuse it unread."""

EnterSpan = Callable[[str, Metadata], Span]
"""Takes the full method name and the metadata of a call that begins; gives the span around it."""

STALLED_READER_S = 60.0
"""How long a response may wait for its reader; one that takes nothing for so long counts as gone."""

log = get_log(__name__)


class ErrorInterceptor(grpc.aio.ServerInterceptor):
    """Wraps every handler, which must be async: a coroutine function or an async generator.

    `SpoliaError` becomes its status code, message and `ErrorDetail`; bytes that are no request become `InvalidRequest`;
    any other exception becomes INTERNAL and is logged with its traceback; cancellation passes. A generator is closed
    before its call ends, so its `finally` blocks have run by then. `observe` is called once for each call, which runs
    inside the span that `enter` gives; `admit`, where there is one, before gRPC takes a message from the wire, and
    `check` before one is parsed.
    """

    def __init__(self, observe: Observe | None = None, enter: EnterSpan = lambda method, metadata: NO_SPAN) -> None:
        self.admit: Admit | None = None
        self.check: Check | None = None
        self._observe = observe
        self._enter_span = enter
        self._running: dict[asyncio.Task[Any], str] = {}
        self._ended_with: dict[asyncio.Task[Any], SpoliaError] = {}
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def num_running(self) -> int:
        """Calls under way."""
        return len(self._running)

    def end_running(self, error: SpoliaError, *, of_services: Sequence[str] = ()) -> int:
        """Cancels calls under way; their callers get `error`. All of them, or those of the named services. How many."""
        tasks = [t for t, method in self._running.items() if not of_services or service_of(method) in of_services]
        for task in tasks:
            self._ended_with[task] = error
            task.cancel()
        return len(tasks)

    async def wait_idle(self) -> None:
        """Returns when no call is under way."""
        await self._idle.wait()

    async def run_inside(self, method: str, metadata: Metadata, work: Awaitable[None]) -> SpoliaError | None:
        """One of the calls that travel together in another, in a task of its own: counted, traced and ended as one that
        came by itself. What its caller is to be told; None when it ended well.

        Raises `CancelledError` when its task was cancelled: nobody waits to be told.
        """
        with self._enter_span(method, metadata) as span, self._counted(method, span) as call:
            try:
                await work
            except BaseException as error:
                answer = self._answer_to(error, call.task, method)
                if answer is None:
                    raise
                call.code = status_of(answer)
                return answer
            return None

    async def intercept_service(self, continuation: Any, handler_call_details: Any) -> Any:
        """Wraps the handler of one call; what gRPC calls."""
        handler, method = await continuation(handler_call_details), handler_call_details.method
        if handler is None:
            return None
        if self.admit is not None:
            try:
                self.admit(method, handler_call_details.invocation_metadata or ())
            except SpoliaError as error:
                return self._refusing(method, error)
        return self._wrapped(handler, method)

    def _refusing(self, method: str, error: SpoliaError) -> Any:
        """For a call of any kind: only where requests are a stream does gRPC read none before the handler asks."""

        async def refuse(_received: Any, context: Any) -> Any:
            with self._enter_span(method, context.invocation_metadata() or ()) as span:
                return await self._run(method, context, _raising(error), span)

        return grpc.stream_stream_rpc_method_handler(refuse)

    def _wrapped(self, handler: Any, method: str) -> Any:
        behaviour, factory = _behaviour_of(handler)

        parse = _parser(handler.request_deserializer)
        read = partial(_ParsedRequests, parse) if handler.request_streaming else parse

        async def invoke(received: Any, context: Any) -> Any:
            with self._enter_span(method, context.invocation_metadata() or ()) as span:
                return await self._run(
                    method, context, self._checked_call(method, behaviour, read, received, context), span
                )

        # Requests come as bytes: gRPC answers UNKNOWN, and logs a traceback, when a deserializer of its own raises.
        return factory(invoke, None, handler.response_serializer)

    async def _checked_call(self, method: str, behaviour: Any, read: Any, received: Any, context: Any) -> Any:
        if self.check is not None:
            self.check(method, context)
        return await _call(behaviour, read, received, context)

    async def _run(self, method: str, context: Any, work: Awaitable[Any], span: Span) -> Any:
        _bind_request_id(context)
        with self._counted(method, span) as call:
            try:
                return await work
            except grpc.aio.AbortError:
                call.code = _code_of(context)
                raise
            except _CallerGone:
                raise asyncio.CancelledError from None
            except BaseException as error:
                answer = self._answer_to(error, call.task, method)
                if answer is None:  # the caller is gone
                    raise
                call.code = status_of(answer)
                await _abort(context, call.code, answer)

    @contextmanager
    def _counted(self, method: str, span: Span) -> Iterator[_Counted]:
        """Around a call: what it ends with is counted, and told to its span. Ends as CANCELLED unless that is said."""
        call, started = _Counted(self._enter(method)), time.monotonic()
        try:
            yield call
        except BaseException:
            if call.code is grpc.StatusCode.OK:
                call.code = grpc.StatusCode.CANCELLED
            raise
        finally:
            self._leave(call.task)
            span.set(status=call.code.name)
            if call.code not in (grpc.StatusCode.OK, grpc.StatusCode.CANCELLED):
                span.fail(call.code.name)
            if self._observe is not None:
                self._observe(method, call.code, time.monotonic() - started)

    def _answer_to(self, error: BaseException, task: asyncio.Task[Any], method: str) -> SpoliaError | None:
        """What the caller is told; None lets `error` pass."""
        if isinstance(error, asyncio.CancelledError):
            if task in self._ended_with:
                task.uncancel()
                return self._ended_with[task]
            # Not a cancel of this call, but of something it awaited: gRPC would leave the caller without an answer.
            return None if task.cancelling() else Unavailable(f"work of {method} was cancelled inside this node")
        if isinstance(error, SpoliaError):
            if isinstance(error, InternalError):
                log.exception("internal error", method=method)
            return error
        if isinstance(error, Exception):
            log.exception("unexpected exception", method=method)
            return InternalError(f"unexpected {type(error).__name__} in {method}; this node's log has the traceback")
        return None

    def _enter(self, method: str) -> asyncio.Task[Any]:
        task = asyncio.current_task()
        if task is None:
            raise AssertionError("handlers run in tasks")
        self._running[task] = method
        self._idle.clear()
        return task

    def _leave(self, task: asyncio.Task[Any]) -> None:
        self._running.pop(task, None)
        self._ended_with.pop(task, None)
        if not self._running:
            self._idle.set()


def service_of(method: str) -> str:
    """The service in a full method name, "/package.Service/Method"."""
    return method.strip("/").rpartition("/")[0]


def _behaviour_of(handler: Any) -> tuple[Callable[..., Any], Callable[..., Any]]:
    if handler.request_streaming and handler.response_streaming:
        return handler.stream_stream, grpc.stream_stream_rpc_method_handler
    if handler.request_streaming:
        return handler.stream_unary, grpc.stream_unary_rpc_method_handler
    if handler.response_streaming:
        return handler.unary_stream, grpc.unary_stream_rpc_method_handler
    return handler.unary_unary, grpc.unary_unary_rpc_method_handler


def _parser(deserialize: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    kind = getattr(deserialize, "__self__", None)  # of `Message.FromString`, the class
    name = kind.DESCRIPTOR.full_name if isinstance(kind, type) and issubclass(kind, Message) else "the request"

    def parse(received: bytes) -> Any:
        try:
            return deserialize(received)
        except DecodeError as error:
            raise InvalidRequest(f"{len(received)} bytes are no {name}: {error}", limit=name) from error

    return parse


class _ParsedRequests:
    """The requests of a stream, parsed one by one as the handler asks for them."""

    def __init__(self, parse: Callable[[bytes], Any], received: AsyncIterator[bytes]) -> None:
        self._parse = parse
        self._received = received

    def __aiter__(self) -> _ParsedRequests:
        return self

    async def __anext__(self) -> Any:
        return self._parse(await anext(self._received))


async def _call(behaviour: Callable[..., Any], read: Callable[[Any], Any], received: Any, context: Any) -> Any:
    request = read(received)
    try:
        result = behaviour(request, context)
    except NotImplementedError:  # the generated base class, which is not async: nobody wrote this method
        unserved = NotSupported("this node does not serve that method")
        return await _abort(context, grpc.StatusCode.UNIMPLEMENTED, unserved)
    if inspect.isasyncgen(result):
        return await _pump(result, context)
    if inspect.isawaitable(result):
        return await result
    raise AssertionError(f"{behaviour} is not async")


async def _pump(responses: AsyncIterator[Any], context: Any) -> None:
    # gRPC would leave a generator that it stopped reading to the garbage collector, and with it what its cleanup frees.
    with closing(StallWatch(STALLED_READER_S)) as watch:
        async with aclosing(responses) as open_responses:  # type: ignore[type-var]  # always a generator
            async for response in open_responses:
                try:
                    with watch:
                        await context.write(response)
                except Exception as error:  # time is up, or gRPC's own, of no public class: the call ended in the write
                    raise _CallerGone from error


async def _raising(error: SpoliaError) -> None:
    raise error


@dataclass(slots=True)
class _Counted:
    task: asyncio.Task[Any]
    code: grpc.StatusCode = grpc.StatusCode.OK


class _CallerGone(Exception):
    """A response could not be written: nobody is there to read it."""


def told_message(error: SpoliaError) -> str:
    """Its message as it travels: short, and text that UTF-8 can hold."""
    message = error.message.encode("utf-8", "replace").decode()
    return message if len(message) <= MAX_MESSAGE_CHARS else message[: MAX_MESSAGE_CHARS - 1] + "…"


async def _abort(context: Any, code: grpc.StatusCode, error: SpoliaError) -> None:
    """Ends the call; raises `grpc.aio.AbortError`, or CancelledError where its caller has gone and hears nothing."""
    message = told_message(error)
    try:
        await context.abort(code, message, ((DETAIL_KEY, detail_of(error).SerializeToString()),))
    except grpc.aio.AbortError:
        raise
    except Exception:  # gRPC's own, of no public class: the call ended before it was told why
        raise asyncio.CancelledError from None


def _bind_request_id(context: Any) -> None:
    for key, value in context.invocation_metadata() or ():
        if key == REQUEST_ID_KEY:
            structlog.contextvars.bind_contextvars(request_id=str(value)[:MAX_REQUEST_ID_CHARS])


_CODES = {code.value[0]: code for code in grpc.StatusCode}


def _code_of(context: Any) -> grpc.StatusCode:
    code = context.code()
    return code if isinstance(code, grpc.StatusCode) else _CODES.get(code, grpc.StatusCode.UNKNOWN)
