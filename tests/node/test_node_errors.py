"""What a handler raises is what its caller meets; what a handler holds is freed when its call ends."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest
import structlog
from call_failures import failure, raising
from node_worlds import SHAPES, World, serving

from spolia.errors import DETAIL_KEY, ERROR_KINDS, STATUS_OF, detail_of, error_from_rpc, status_of
from spolia.v1.kvstore_pb2 import ClaimRequest, GetRequest
from spolia.v1.kvstore_pb2_grpc import KVStoreServiceStub
from spolia_core.errors import (
    Busy,
    Cancelled,
    DataCorrupt,
    DeadlineExceeded,
    Forbidden,
    InternalError,
    InvalidRequest,
    NotSupported,
    SpoliaError,
    Unauthenticated,
    Unavailable,
)
from spolia_node.config import NodeConfig


def rpc_error(code: grpc.StatusCode, details: str = "", detail: bytes | None = None) -> grpc.aio.AioRpcError:
    trailing = grpc.aio.Metadata() if detail is None else grpc.aio.Metadata((DETAIL_KEY, detail))
    return grpc.aio.AioRpcError(code, grpc.aio.Metadata(), trailing, details, None)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ERROR_KINDS.values())
async def test_every_class_crosses_every_shape_of_call_with_all_its_fields(kind: type[SpoliaError], shape: str):
    raised = kind("größer als 4", field="sampling.top_p", limit="(0, 1]", actual="1.5 × 2", retry_after_ms=250)
    async with serving(raising(raised)) as world:
        failed = await failure(world, shape)
    met = error_from_rpc(failed)
    assert type(met) is kind
    assert vars(met) == vars(raised)
    assert failed.code() is STATUS_OF[kind]


def test_every_class_has_a_code_of_its_own():
    assert set(STATUS_OF) == set(ERROR_KINDS.values())
    assert len(set(STATUS_OF.values())) == len(STATUS_OF)


@pytest.mark.parametrize("shape", SHAPES)
async def test_an_unexpected_exception_is_internal_and_keeps_its_text_to_the_log(shape: str):
    with structlog.testing.capture_logs() as lines:
        async with serving(raising(KeyError("s3cret"))) as world:
            failed = await failure(world, shape)
    met = error_from_rpc(failed)
    assert type(met) is InternalError
    assert "KeyError" in met.message
    assert "s3cret" not in met.message
    (line,) = [line for line in lines if line["log_level"] == "error"]
    assert line["method"].startswith("/spolia.v1.")
    assert line["exc_info"]


GARBAGE = b"\xff\xff\xff"
AS_BYTES = {
    "unary_unary": ("/spolia.v1.KVStoreService/GetStats", "spolia.v1.GetStatsRequest"),
    "unary_stream": ("/spolia.v1.KVStoreService/Get", "spolia.v1.GetRequest"),
    "stream_unary": ("/spolia.v1.KVStoreService/Put", "spolia.v1.PutRequest"),
    "stream_stream": ("/spolia.v1.DirectoryService/Register", "spolia.v1.RegisterRequest"),
}


async def read_all(call: Any) -> list[Any]:
    return [answer async for answer in call]


@pytest.mark.parametrize("num_good", [0, 1])
@pytest.mark.parametrize("shape", SHAPES)
async def test_bytes_that_are_no_message_are_an_invalid_request_naming_its_type(
    shape: str, num_good: int, caplog: pytest.LogCaptureFixture
):
    method, message_type = AS_BYTES[shape]
    requests: Any = GARBAGE if shape.startswith("unary") else iter([b""] * num_good + [GARBAGE])
    with structlog.testing.capture_logs() as lines:
        async with serving() as world:
            call = getattr(world.channel, shape)(method)(requests, timeout=30)
            with pytest.raises(grpc.aio.AioRpcError) as failed:
                await (call if shape.endswith("unary") else read_all(call))
            assert await world.unary_unary(timeout=30) == 1
    met = error_from_rpc(failed.value)
    assert (type(met), failed.value.code()) == (InvalidRequest, grpc.StatusCode.INVALID_ARGUMENT)
    assert message_type in met.message
    assert [line for line in lines if line["log_level"] == "error"] == []
    assert caplog.records == []


async def test_a_subclass_travels_as_its_nearest_listed_class():
    class PoolFull(Busy):
        pass

    async with serving(raising(PoolFull("no blocks", retry_after_ms=5))) as world:
        met = error_from_rpc(await failure(world, "unary_unary"))
    assert type(met) is Busy
    assert met.retry_after_ms == 5
    assert status_of(PoolFull("")) is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert status_of(SpoliaError("")) is grpc.StatusCode.INTERNAL


async def test_texts_too_long_for_trailers_or_not_unicode_still_arrive():
    raised = InvalidRequest("ü" * 100_000, field="\udcff", limit="x" * 100_000, actual="€" * 100_000)
    async with serving(raising(raised)) as world:
        met = error_from_rpc(await failure(world, "unary_unary"))
    assert type(met) is InvalidRequest
    assert met.message.startswith("üüü")
    assert met.message.endswith("…")
    assert (met.field, met.limit[:3], met.actual[-1]) == ("?", "xxx", "…")


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        *((code, kind) for kind, code in STATUS_OF.items() if kind is not Cancelled),
        (grpc.StatusCode.UNKNOWN, InternalError),
        (grpc.StatusCode.UNIMPLEMENTED, NotSupported),
        (grpc.StatusCode.ABORTED, Unavailable),
        (grpc.StatusCode.OUT_OF_RANGE, InvalidRequest),
        (grpc.StatusCode.UNAUTHENTICATED, Unauthenticated),
        (grpc.StatusCode.PERMISSION_DENIED, Forbidden),
    ],
)
def test_without_a_detail_the_code_decides(code: grpc.StatusCode, kind: type[SpoliaError]):
    met = error_from_rpc(rpc_error(code, "why"))
    assert type(met) is kind
    assert met.message == "why"


def test_a_cancel_counts_as_the_callers_only_when_made_here():
    """A stopping server cancels calls it has not looked at: those are to be retried elsewhere."""
    cancelled = grpc.StatusCode.CANCELLED
    assert type(error_from_rpc(rpc_error(cancelled, "CANCELLED"))) is Unavailable
    assert type(error_from_rpc(rpc_error(cancelled, "Stream removed"))) is Unavailable
    assert type(error_from_rpc(rpc_error(cancelled, "the server said: Channel closed!"))) is Unavailable
    assert type(error_from_rpc(rpc_error(grpc.StatusCode.UNAVAILABLE, "Stream removed"))) is Unavailable
    assert type(error_from_rpc(rpc_error(grpc.StatusCode.INTERNAL, "Internal error from Core"))) is Unavailable
    assert type(error_from_rpc(rpc_error(grpc.StatusCode.INTERNAL, "an invariant broke"))) is InternalError
    for made_here in ("Locally cancelled by application!", "Channel closed!", "Stream removed (Channel closed!)"):
        assert type(error_from_rpc(rpc_error(cancelled, made_here))) is Cancelled
    raised = detail_of(Cancelled("given up")).SerializeToString()
    assert type(error_from_rpc(rpc_error(cancelled, "given up", raised))) is Cancelled


def test_a_blocking_call_cancelled_here_is_cancelled():
    with grpc.insecure_channel("127.0.0.1:1") as channel:
        call: Any = KVStoreServiceStub(channel).Get(GetRequest(), wait_for_ready=True, timeout=30)
        call.cancel()
        with pytest.raises(grpc.RpcError) as failed:
            next(call)
    assert type(error_from_rpc(failed.value)) is Cancelled


@pytest.mark.parametrize("closed_before_reading", [True, False])
async def test_a_blocking_call_whose_channel_is_closed_here_is_cancelled_and_one_whose_server_stops_is_not(
    closed_before_reading: bool,
):
    entered = asyncio.Event()

    async def hold(_context: Any) -> None:
        entered.set()
        await asyncio.Event().wait()

    async with serving(hold) as world:
        channels = [grpc.insecure_channel(world.server.address) for _ in range(2)]
        calls: list[Any] = [KVStoreServiceStub(channel).Get(GetRequest(), timeout=30) for channel in channels]
        for call in calls:
            await asyncio.to_thread(next, call)
        reading = None if closed_before_reading else asyncio.to_thread(failure_of_next, calls[0])
        task = None if reading is None else asyncio.create_task(reading)
        await asyncio.wait_for(entered.wait(), 30)
        channels[0].close()
        failed = await (task or asyncio.to_thread(failure_of_next, calls[0]))
        assert type(error_from_rpc(failed)) is Cancelled
    assert type(error_from_rpc(await asyncio.to_thread(failure_of_next, calls[1]))) is Unavailable
    channels[1].close()


def failure_of_next(call: Any) -> grpc.RpcError:
    with pytest.raises(grpc.RpcError) as failed:
        next(call)
    return failed.value


def test_a_detail_of_an_unknown_class_or_of_no_sense_leaves_the_code_to_decide():
    newer = detail_of(Busy("", field="pool"))
    newer.kind = "Throttled"
    met = error_from_rpc(rpc_error(grpc.StatusCode.UNAVAILABLE, "why", newer.SerializeToString()))
    assert (type(met), met.field) == (Unavailable, "pool")
    met = error_from_rpc(rpc_error(grpc.StatusCode.DATA_LOSS, "why", b"\xff\xff\xff"))
    assert type(met) is DataCorrupt


def test_an_error_without_words_is_named_by_its_code():
    assert error_from_rpc(rpc_error(grpc.StatusCode.NOT_FOUND)).message == "NOT_FOUND"


async def test_a_peer_that_is_not_there_is_unavailable():
    async with serving() as world:
        address = world.server.address
    async with grpc.aio.insecure_channel(address) as channel:
        gone = World(world.server, channel)
        assert type(error_from_rpc(await failure(gone, "unary_unary"))) is Unavailable


async def test_a_message_larger_than_the_limit_is_refused_and_not_worth_a_retry():
    config = NodeConfig(max_message_bytes=5 << 20)
    async with serving(config=config) as world:
        big = GetRequest(tenant_id="t" * (6 << 20))
        with pytest.raises(grpc.aio.AioRpcError) as failed:
            async for _ in world.store.Get(big, timeout=30):
                pass
        assert failed.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert type(error_from_rpc(failed.value)) is InvalidRequest
        fits = GetRequest(tenant_id="t" * (4 << 20))
        assert len([r async for r in world.store.Get(fits, timeout=30)]) == 2


async def test_a_method_nobody_wrote_is_unimplemented():
    async with serving() as world:
        with pytest.raises(grpc.aio.AioRpcError) as failed:
            await world.store.Claim(ClaimRequest(), timeout=30)
    assert failed.value.code() is grpc.StatusCode.UNIMPLEMENTED
    assert type(error_from_rpc(failed.value)) is NotSupported


async def test_the_callers_deadline_is_met_as_such():
    async def never(_context: Any) -> None:
        await asyncio.Event().wait()

    async with serving(never) as world:
        with pytest.raises(grpc.aio.AioRpcError) as failed:
            await world.unary_unary(timeout=0.2)
    assert type(error_from_rpc(failed.value)) is DeadlineExceeded
