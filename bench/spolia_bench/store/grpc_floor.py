"""What gRPC itself takes to move an object's frames between two Python processes: the floor of every Get and Put.

A server that keeps nothing and checks nothing: Get sends frames of zeros, Put reads and forgets. Data and digests have
the sizes of real ones. Messages of Get are made beforehand and read as bytes; those of Put are made as they are sent,
by protobuf's classes, as both ends of a Put do.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from functools import cache
from typing import Any

import grpc

from spolia.v1.common_pb2 import Frame
from spolia.v1.kvstore_pb2 import DESCRIPTOR, GetRequest, PutRequest, PutResponse
from spolia.v1.kvstore_pb2_grpc import (
    KVStoreServiceServicer,
    KVStoreServiceStub,
    add_KVStoreServiceServicer_to_server,
)
from spolia_core.digests import DIGEST_BYTES, FRAME_BYTES
from spolia_node.channels import channel_options, connection_options
from spolia_node.frame_messages import frame_message, open_get

SERVICE = DESCRIPTOR.services_by_name["KVStoreService"].full_name
MAX_MESSAGE_BYTES = 16 << 20
LIMIT_S = 30.0
_ZEROS = bytes(FRAME_BYTES)
_DIGEST = bytes(DIGEST_BYTES)


class _Mover(KVStoreServiceServicer):
    async def Get(self, request: GetRequest, context: Any) -> AsyncIterator[Any]:
        """As many bytes as the tenant's name says."""
        for data in _pieces(int(request.tenant_id)):
            yield _message(len(data))

    async def Put(self, request_iterator: AsyncIterator[PutRequest], context: Any) -> PutResponse:
        """Reads to the end."""
        async for _ in request_iterator:
            pass
        return PutResponse()


async def rates(num_bytes: int, repeats: int) -> dict[str, float]:
    """Megabytes per second of gRPC alone, for objects of `num_bytes`, one after the other."""
    async with _mover() as channel:
        found: dict[str, float] = {}
        with _timed(found, "grpc_get", num_bytes * repeats):
            for _ in range(repeats):
                await _get(channel, num_bytes)
        stub = KVStoreServiceStub(channel)
        with _timed(found, "grpc_put", num_bytes * repeats):
            for _ in range(repeats):
                await stub.Put((PutRequest(frame=_frame(data)) for data in _pieces(num_bytes)), timeout=LIMIT_S)
        return found


async def get_rate(num_bytes: int, num_streams: int, repeats: int) -> float:
    """Megabytes per second of gRPC alone, for `num_streams` objects of `num_bytes` at once: the best of `repeats`."""
    best = 0.0
    async with _mover() as channel:
        for _ in range(repeats):
            found: dict[str, float] = {}
            with _timed(found, "get", num_bytes * num_streams):
                await asyncio.gather(*(_get(channel, num_bytes) for _ in range(num_streams)))
            best = max(best, found["get"])
    return best


@asynccontextmanager
async def _mover() -> AsyncIterator[grpc.aio.Channel]:
    """A channel to such a server, in a process of its own."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "spolia_bench.store.grpc_floor",
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    assert process.stdout is not None
    try:
        port = int(await asyncio.wait_for(process.stdout.readline(), LIMIT_S))
        async with grpc.aio.insecure_channel(
            f"127.0.0.1:{port}", options=channel_options(MAX_MESSAGE_BYTES)
        ) as channel:
            await KVStoreServiceStub(channel).Put(iter(()), timeout=LIMIT_S)  # connects
            yield channel
    finally:
        process.kill()
        await process.wait()


async def _get(channel: grpc.aio.Channel, num_bytes: int) -> None:
    num_received = 0
    async for message in open_get(channel, GetRequest(tenant_id=str(num_bytes)), LIMIT_S, ()):
        num_received += len(message)
    if num_received < num_bytes:
        raise RuntimeError(f"{num_received} of {num_bytes} bytes came")


@contextmanager
def _timed(found: dict[str, float], name: str, num_bytes: int) -> Iterator[None]:
    started = time.perf_counter()
    yield
    found[name] = num_bytes / (time.perf_counter() - started) / 1e6


def _pieces(num_bytes: int) -> Iterator[bytes]:
    for start in range(0, num_bytes, FRAME_BYTES):
        yield _ZEROS if num_bytes - start >= FRAME_BYTES else _ZEROS[: num_bytes - start]


def _frame(data: bytes) -> Frame:
    return Frame(data=data, digest=_DIGEST)


@cache
def _message(num_bytes: int) -> bytes:
    return frame_message(0, [_ZEROS[:num_bytes]], _DIGEST)


async def _serve() -> None:
    server = grpc.aio.server(options=connection_options(MAX_MESSAGE_BYTES))
    mover = _Mover()  # type: ignore[abstract]  # the floor needs no more calls
    add_KVStoreServiceServicer_to_server(mover, server)
    get: Any = grpc.unary_stream_rpc_method_handler(mover.Get, GetRequest.FromString)
    server.add_registered_method_handlers(SERVICE, {"Get": get})
    print(server.add_insecure_port("127.0.0.1:0"), flush=True)
    await server.start()
    await server.wait_for_termination()


if __name__ == "__main__":
    asyncio.run(_serve())
