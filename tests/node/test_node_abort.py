"""A call that is refused ends as told; one whose caller went meanwhile ends as cancelled, and nothing is logged."""

from __future__ import annotations

import asyncio

import grpc
import pytest

from spolia_core.errors import InvalidRequest
from spolia_node.interceptor import _abort

REFUSED = InvalidRequest("46 bytes are no request", limit="a request")


class Context:
    """A call whose abort ends as gRPC's would."""

    def __init__(self, outcome: BaseException) -> None:
        self.outcome = outcome
        self.told: list[object] = []

    async def abort(self, code: grpc.StatusCode, message: str, trailing: object) -> None:
        self.told = [code, message]
        raise self.outcome


async def test_a_refusal_is_told() -> None:
    context = Context(grpc.aio.AbortError())
    with pytest.raises(grpc.aio.AbortError):
        await _abort(context, grpc.StatusCode.INVALID_ARGUMENT, REFUSED)
    assert context.told == [grpc.StatusCode.INVALID_ARGUMENT, "46 bytes are no request"]


async def test_a_refusal_that_nobody_is_left_to_hear_is_a_cancelled_call() -> None:
    with pytest.raises(asyncio.CancelledError):
        await _abort(Context(RuntimeError('Failed "execute_batch"')), grpc.StatusCode.INVALID_ARGUMENT, REFUSED)


async def test_a_cancel_stays_one() -> None:
    with pytest.raises(asyncio.CancelledError):
        await _abort(Context(asyncio.CancelledError()), grpc.StatusCode.INVALID_ARGUMENT, REFUSED)
