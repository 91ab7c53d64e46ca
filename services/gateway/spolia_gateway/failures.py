"""What a failed call to a node says about the node and about the request.

A client is told what it can act on: the kind of error, which request, and what to do. What a node or gRPC said of
itself names addresses, which are nobody's business outside; it stays with the error as a note, for the log.
"""

from __future__ import annotations

import re
from typing import Any, TypeVar, cast

import grpc

from spolia.errors import error_from_rpc, error_of, is_of_a_node
from spolia.v1.decode_pb2 import TaggedFailure
from spolia.v1.directory_pb2 import NodeRecord
from spolia_core.errors import (
    AlreadyStored,
    Busy,
    Cancelled,
    DataCorrupt,
    DeadlineExceeded,
    Forbidden,
    InternalError,
    InvalidRequest,
    NotFound,
    NotSupported,
    SpoliaError,
    Unauthenticated,
    Unavailable,
)

T = TypeVar("T", bound=SpoliaError)

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

_OF_THE_REQUEST = (AlreadyStored, Busy, InvalidRequest, NotFound, NotSupported)
"""What a node says in one of these it says of the request, or of the room for it: its words are for the client."""

_WORDS: dict[type[SpoliaError], str] = {
    Unavailable: "node {node} cannot go on with {work} now; try again",
    DeadlineExceeded: "{work} ran out of time on node {node}; give it more",
    DataCorrupt: "node {node} met damaged data in {work}; try again",
    InternalError: "{work} failed on node {node}, whose log says why; tell those who run this gateway",
}
"""What a client is told of the others, by the nearest class."""

_REFUSED = "node {node} refuses this gateway, and so cannot take {work}; tell those who run it"
_ENDED = "node {node} ended {work}; try again"
_UNEXPLAINED = "node {node} refuses {work}: {code}"

_TOO_LARGE = re.compile(r"\w+ message larger than max \(\d+ vs\. \d+\)")
"""gRPC's own words for a message that is not taken; they name nothing but sizes."""


class NodeLost(Unavailable):
    """The connection to a node broke, or the node went away in the middle of a call. Go on elsewhere."""


def lost(node: NodeRecord, work: str, why: str) -> NodeLost:
    """The error of `work`, a request's for example, whose node has gone; `why` is for the log."""
    return _noted(NodeLost(f"node {node.node_id} was lost while it worked on {work}; try again"), node, why)


def failure_of(error: grpc.RpcError, node: NodeRecord, work: str) -> SpoliaError:
    """The error a call to a node failed with, in words for the client of `work`.

    Our nodes send an `ErrorDetail` with every error they raise. A transport code without one was not raised by the
    node: the node, or the way to it, is gone, and that is `NodeLost`.
    """
    call = cast(Any, error)  # both kinds of failed call have these methods; the base class does not declare them
    raised = is_of_a_node(error)
    if not raised and call.code() in _TRANSPORT_CODES:
        return lost(node, work, f"{call.code().name}: {call.details()}")
    return _told(error_from_rpc(error), call.code(), node, work, raised=raised)


class RequestFailed(Exception):
    """A node's word that a request which came on a stream has ended without a finish."""

    def __init__(self, told: TaggedFailure) -> None:
        super().__init__(told.message)
        self.told = told

    def of(self, node: NodeRecord, work: str) -> SpoliaError:
        """What it means here: as the same end of a call does."""
        code = _CODES.get(self.told.code, grpc.StatusCode.UNKNOWN)
        detail = self.told.detail if self.told.HasField("detail") else None
        return _told(error_of(code, self.told.message, detail), code, node, work, raised=detail is not None)


def said_inside(error: SpoliaError) -> str:
    """What those inside said of it, with addresses: for the log, and for nobody else. Empty where nothing was kept."""
    return "; ".join(getattr(error, "__notes__", ()))


def _told(error: SpoliaError, code: grpc.StatusCode, node: NodeRecord, work: str, *, raised: bool) -> SpoliaError:
    """`error` for the client. A node that refuses this gateway, or gives a request up that nobody else did, is as good
    as away: no client is to blame for that.
    """
    if _TOO_LARGE.fullmatch(error.message) or (raised and isinstance(error, _OF_THE_REQUEST)):
        return error
    kind, why = type(error), f"{code.name}: {error.message}"
    if isinstance(error, Unauthenticated | Forbidden):
        kind, words, why = Unavailable, _REFUSED, f"it refuses this node; look at its certificates: {error.message}"
    elif isinstance(error, Cancelled):  # not by this gateway, which would not wait to hear of it
        kind, words = Unavailable, _ENDED
    else:
        words = next((_WORDS[cls] for cls in kind.__mro__ if cls in _WORDS), _UNEXPLAINED)
    message = words.format(node=node.node_id, work=work, code=code.name)
    told = kind(message, field=error.field, retry_after_ms=error.retry_after_ms)
    return _noted(told, node, why)


def _noted(error: T, node: NodeRecord, why: str) -> T:
    error.add_note(f"{node.address}: {why}")
    return error


_CODES = {code.value[0]: code for code in grpc.StatusCode}
