"""A call made of bytes: sent, perhaps left half-way, and judged by how it ended."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import grpc
from fuzz_world import FuzzWorld
from good_messages import Method, methods_of
from google.protobuf.message import DecodeError

from spolia.errors import DETAIL_KEY
from spolia.v1 import kvstore_pb2
from spolia.v1.common_pb2 import ErrorDetail

CODE = grpc.StatusCode
DEADLINE_S = 0.6
HELD_OPEN_S = 0.03
MAX_RESPONSES = 200

ALLOWED = {
    CODE.OK,
    CODE.CANCELLED,
    CODE.INVALID_ARGUMENT,
    CODE.DEADLINE_EXCEEDED,
    CODE.NOT_FOUND,
    CODE.ALREADY_EXISTS,
    CODE.PERMISSION_DENIED,
    CODE.UNAUTHENTICATED,
    CODE.RESOURCE_EXHAUSTED,
    CODE.FAILED_PRECONDITION,
    CODE.OUT_OF_RANGE,
    CODE.UNIMPLEMENTED,
}
"""INTERNAL, UNKNOWN and UNAVAILABLE would say that a node broke or went away. DATA_LOSS is for a damaged upload."""
OURS = {CODE.CANCELLED, CODE.DEADLINE_EXCEEDED}
"""What a fuzzed call may end with because its caller left."""
BROKEN_OFF = "Internal error from Core"
"""What gRPC's client says, without asking the server, when it writes to a call that has ended. What the server said
of the call is in its metrics, which `FuzzWorld.at_rest` looks at."""
UNDONE_BY = {"Pin": "Unpin", "Claim": "Unclaim"}
"""Leases may last for an hour: given back at once, or nothing would be at rest."""


class Leaving(Enum):
    """How a caller ends its side."""

    AFTER_ALL = "after all"
    AT_ONCE = "at once"
    AFTER_FIRST = "after the first response"
    NEVER = "never, until the call is cut"


@dataclass(frozen=True, repr=False)
class FuzzedCall:
    """One call."""

    method: Method
    requests: Sequence[bytes]
    leaving: Leaving
    key: str | None = None

    def __repr__(self) -> str:
        return f"{self.method.path} leaving {self.leaving.value}, key {self.key}: {list(self.requests)!r}"

    async def make(self, world: FuzzWorld, statuses: Counter[str]) -> None:
        """Makes it, counts its status, and fails when that is no answer to what was sent."""
        metadata = () if self.key is None else (("authorization", f"Bearer {self.key}"),)
        stub = world.channels[self.method.node].stream_stream(self.method.path)
        call: Any = stub(timeout=DEADLINE_S, metadata=metadata)
        try:
            await self._send(call)
            await self._read(call)
        except TimeoutError:
            pass  # it is left here
        except Exception:  # some of gRPC's own, of no public class: the call ended under a write; its code says how
            if not call.done():
                raise
        finally:
            call.cancel()
        code = await call.code()
        details = await call.details()
        told = "BROKEN_OFF" if details == BROKEN_OFF else code.name
        statuses[f"{self.method.service}.{self.method.name} {told}"] += 1
        await self._undo(world)
        self._judge(code, details, tuple(await call.trailing_metadata() or ()))

    async def _send(self, call: Any) -> None:
        for request in self.requests:
            await call.write(request)
        if self.leaving is not Leaving.NEVER:
            await call.done_writing()

    async def _read(self, call: Any) -> None:
        if self.leaving is Leaving.AT_ONCE:
            return
        is_cut = self.leaving is Leaving.NEVER or self.method.is_endless
        patience_s = HELD_OPEN_S if is_cut else DEADLINE_S * 4
        num = 0
        async with asyncio.timeout(patience_s):
            while (await call.read()) is not grpc.aio.EOF:
                num += 1
                if self.leaving is Leaving.AFTER_FIRST or num >= MAX_RESPONSES:
                    return

    def _judge(self, code: grpc.StatusCode, details: str, trailers: Sequence[tuple[str, Any]]) -> None:
        if details == BROKEN_OFF:
            return
        allowed = ALLOWED | ({CODE.DATA_LOSS} if self.method.name == "Put" else set())
        assert code in allowed, (code, details, self)
        if code is CODE.OK or code in OURS:
            return
        found = [value for key, value in trailers if key == DETAIL_KEY]
        assert found, ("no node of ours said that", code, details, self)
        detail = ErrorDetail.FromString(found[0])
        if code is CODE.INVALID_ARGUMENT:
            assert detail.field or detail.limit, ("neither field nor limit", details, self)

    async def _undo(self, world: FuzzWorld) -> None:
        undone_by = UNDONE_BY.get(self.method.name)
        if undone_by is None:
            return
        for request in self.requests:
            try:
                lease = getattr(kvstore_pb2, f"{self.method.name}Request").FromString(request)
            except DecodeError:
                continue
            given = {"tenant_id": lease.tenant_id, "chunk_ids": lease.chunk_ids, "owner": lease.owner}
            back = getattr(kvstore_pb2, f"{undone_by}Request")(**given).SerializeToString()
            path = f"/spolia.v1.{self.method.service}/{undone_by}"
            try:
                await world.channels[self.method.node].unary_unary(path)(back, timeout=DEADLINE_S)
            except grpc.aio.AioRpcError:  # what was refused had not been given
                continue


def use_everything(world: FuzzWorld) -> None:
    """Makes every call once, as it should be: what is opened on first use is there before anything is counted."""
    for method in methods_of(world):
        for good in [method.good] if method.streams else [[each] for each in method.good]:
            data = [message.SerializeToString() for message in good]
            world.run(FuzzedCall(method, data, Leaving.AFTER_ALL, world.keys["operator"]).make(world, Counter()))
