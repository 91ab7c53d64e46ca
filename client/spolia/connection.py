"""Where a gateway is, how its channel behaves, and how calls on it end."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from spolia.argument_checks import wrong_type
from spolia_core.errors import InvalidRequest

DEFAULT_ADDRESS = "127.0.0.1:7300"
DEFAULT_MAX_MESSAGE_BYTES = 16 << 20
"""What nodes accept unless they are told otherwise."""

MAX_RECEIVED_BYTES = 64 << 20
"""A cluster's state may be longer than any request."""


class Cancellable(Protocol):
    """A call under way, blocking or not."""

    def cancel(self) -> object:
        """Ends it; does nothing once it has ended."""


_ADDRESS = re.compile(r"(?P<host>[^\s/]+):(?P<port>\d{1,5})")


def check_address(address: str) -> str:
    """Returns `address`; raises `InvalidRequest` unless it is "host:port"."""
    if not isinstance(address, str):
        raise wrong_type(address, "address", "str, host:port")
    match = _ADDRESS.fullmatch(address)
    if match is None or not 0 < int(match["port"]) < 65536:
        raise InvalidRequest(
            f"address must be host:port, got {address!r}", field="address", limit="host:port", actual=address
        )
    return address


def channel_options(address: str) -> list[tuple[str, int]]:
    """gRPC options of a channel to `address`."""
    options = [
        ("grpc.max_receive_message_length", MAX_RECEIVED_BYTES),
        # While a call is under way, a gateway whose machine vanished is noticed within about ten seconds.
        ("grpc.keepalive_time_ms", 5000),
        ("grpc.keepalive_timeout_ms", 5000),
        ("grpc.http2.max_pings_without_data", 0),
        # A gateway that was away for a moment is found again in about a second, not after minutes of back-off.
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.max_reconnect_backoff_ms", 1000),
    ]
    if _is_loopback(address):
        # An HTTP proxy from the environment cannot reach the caller's own machine.
        options.append(("grpc.enable_http_proxy", 0))
    return options


@contextmanager
def ended(call: Cancellable) -> Iterator[None]:
    """Ends `call` when the block is left early, by an error of the caller's own too."""
    try:
        yield
    finally:
        call.cancel()


def _is_loopback(address: str) -> bool:
    host = address.rpartition(":")[0].strip("[]")
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
