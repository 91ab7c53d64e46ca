"""What a failed call to a node says about the node and about the request."""

from __future__ import annotations

from typing import Any, cast

import grpc

from spolia.errors import DETAIL_KEY, SpoliaError, Unavailable, error_from_rpc, error_of
from spolia.v1.decode_pb2 import TaggedFailure
from spolia_node.calls import inner_error

_TRANSPORT_CODES = frozenset(
    {
        grpc.StatusCode.ABORTED,
        grpc.StatusCode.CANCELLED,
        grpc.StatusCode.INTERNAL,
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.UNKNOWN,
    }
)
"""Codes gRPC itself ends a call with when the connection breaks or the peer is stopped."""


class NodeLost(Unavailable):
    """The connection to a node broke, or the node went away in the middle of a call. Go on elsewhere."""


def failure_of(error: grpc.RpcError, node_id: str, address: str) -> SpoliaError:
    """The error a call to a node failed with.

    Our nodes send an `ErrorDetail` with every error they raise. A transport code without one was not raised by the
    node: the node, or the way to it, is gone, and that is `NodeLost`.
    """
    call = cast(Any, error)  # both kinds of failed call have these methods; the base class does not declare them
    raised = any(key == DETAIL_KEY for key, _ in call.trailing_metadata() or ())
    if not raised and call.code() in _TRANSPORT_CODES:
        return NodeLost(f"node {node_id} at {address} was lost: {call.details() or call.code().name}")
    return inner_error(f"node {node_id} at {address}", error_from_rpc(error))


class RequestFailed(Exception):
    """A node's word that a request which came on a stream has ended without a finish."""

    def __init__(self, told: TaggedFailure) -> None:
        super().__init__(told.message)
        self.told = told

    def of(self, node_id: str, address: str) -> SpoliaError:
        """What it means here: as the same end of a call does."""
        code = _CODES.get(self.told.code, grpc.StatusCode.UNKNOWN)
        detail = self.told.detail if self.told.HasField("detail") else None
        return inner_error(f"node {node_id} at {address}", error_of(code, self.told.message, detail))


_CODES = {code.value[0]: code for code in grpc.StatusCode}
