"""Calls to other nodes: gRPC's ways to fail, let out as ours."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

import grpc

from spolia.errors import Cancelled, Forbidden, SpoliaError, Unauthenticated, Unavailable, error_from_rpc


@contextmanager
def call_errors(address: str) -> Iterator[None]:
    """Around a call to `address`: raises what its failure stands for, `Unavailable` where the peer went away.

    A peer or a closed channel that cancels the call counts as gone; only a cancel of this task passes as one.
    """
    try:
        yield
    except grpc.RpcError as error:
        raise _raised(address, error) from error
    except (asyncio.InvalidStateError, grpc.aio.UsageError) as error:
        raise Unavailable(f"{address} went away: {error}") from error
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task is None or task.cancelling():
            raise
        raise Unavailable(f"the channel to {address} was closed") from None


def inner_error(address: str, error: SpoliaError) -> SpoliaError:
    """What a node's error means one call further out. A node that refuses this one is as good as away.

    Nobody's caller is to blame for that, and to be told that its key is.
    """
    if isinstance(error, Unauthenticated | Forbidden):
        return Unavailable(f"{address} refuses this node; look at its certificates: {error}")
    return error


def _raised(address: str, error: grpc.RpcError) -> Exception:
    known = error_from_rpc(error)
    if isinstance(known, Cancelled):
        return Unavailable(f"{address} ended the call: {known}")
    return inner_error(address, known)
