"""What gRPC itself takes to move an object's frames between two Python processes: the floor of every Get and Put.

A server that keeps nothing and checks nothing: Get sends frames of zeros, Put reads and forgets. Data and digests have
the sizes of real ones and are made beforehand; each message is made as it is sent, as it must be.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any

import grpc

from spolia.v1.common_pb2 import Frame
from spolia.v1.kvstore_pb2 import GetRequest, GetResponse, PutRequest, PutResponse
from spolia.v1.kvstore_pb2_grpc import (
    KVStoreServiceServicer,
    KVStoreServiceStub,
    add_KVStoreServiceServicer_to_server,
)
from spolia_core.digests import DIGEST_BYTES, FRAME_BYTES
from spolia_node.channels import channel_options, connection_options

MAX_MESSAGE_BYTES = 16 << 20
_ZEROS = bytes(FRAME_BYTES)
_DIGEST = bytes(DIGEST_BYTES)


class _Mover(KVStoreServiceServicer):
    async def Get(self, request: GetRequest, context: Any) -> AsyncIterator[GetResponse]:
        """As many bytes as the tenant's name says."""
        for data in _pieces(int(request.tenant_id)):
            yield GetResponse(frame=_frame(data))

    async def Put(self, request_iterator: AsyncIterator[PutRequest], context: Any) -> PutResponse:
        """Reads to the end."""
        async for _ in request_iterator:
            pass
        return PutResponse()


async def rates(num_bytes: int, repeats: int) -> dict[str, float]:
    """Megabytes per second of gRPC alone, for objects of `num_bytes`."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "spolia_bench.store.grpc_floor",
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    assert process.stdout is not None
    try:
        port = int(await asyncio.wait_for(process.stdout.readline(), 30))
        async with grpc.aio.insecure_channel(
            f"127.0.0.1:{port}", options=channel_options(MAX_MESSAGE_BYTES)
        ) as channel:
            stub = KVStoreServiceStub(channel)
            await stub.Put(iter(()), timeout=30)  # connects
            found: dict[str, float] = {}
            with _timed(found, "grpc_get", num_bytes * repeats):
                for _ in range(repeats):
                    async for _ in stub.Get(GetRequest(tenant_id=str(num_bytes)), timeout=30):
                        pass
            with _timed(found, "grpc_put", num_bytes * repeats):
                for _ in range(repeats):
                    await stub.Put((PutRequest(frame=_frame(data)) for data in _pieces(num_bytes)), timeout=30)
            return found
    finally:
        process.kill()
        await process.wait()


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


async def _serve() -> None:
    server = grpc.aio.server(options=connection_options(MAX_MESSAGE_BYTES))
    add_KVStoreServiceServicer_to_server(_Mover(), server)  # type: ignore[abstract]  # the floor needs no more calls
    print(server.add_insecure_port("127.0.0.1:0"), flush=True)
    await server.start()
    await server.wait_for_termination()


if __name__ == "__main__":
    asyncio.run(_serve())
