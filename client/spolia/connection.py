"""Where a gateway is, how its channel behaves, and how calls on it end."""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import grpc

from spolia.argument_checks import wrong_type
from spolia_core.errors import InvalidRequest
from spolia_core.node_name import AUTHORITY_FILE

DEFAULT_ADDRESS = "127.0.0.1:7300"
DEFAULT_MAX_MESSAGE_BYTES = 16 << 20
"""What nodes accept unless they are told otherwise."""

MAX_KEY_CHARS = 256
API_KEY_ENV = "SPOLIA_API_KEY"
CA_FILE_ENV = "SPOLIA_CA_FILE"
TLS_DIR_ENV = "SPOLIA_TLS_DIR"
PLAINTEXT_ENV = "SPOLIA_ALLOW_PLAINTEXT"

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


@dataclass(frozen=True, slots=True)
class Door:
    """How to reach a gateway, and what to show there. `repr` leaves the key out."""

    address: str
    api_key: str = field(repr=False)
    authority_pem: bytes | None
    """Who may vouch for the gateway; None: whom gRPC believes by itself."""
    plaintext: bool

    def channel(self) -> grpc.Channel:
        """A new channel, which has not connected yet."""
        options = channel_options(self.address)
        if self.plaintext:
            return grpc.insecure_channel(self.address, options=options)
        return grpc.secure_channel(self.address, grpc.ssl_channel_credentials(self.authority_pem), options=options)

    def aio_channel(self) -> grpc.aio.Channel:
        """The same for asyncio."""
        options = channel_options(self.address)
        if self.plaintext:
            return grpc.aio.insecure_channel(self.address, options=options)
        credentials = grpc.ssl_channel_credentials(self.authority_pem)
        return grpc.aio.secure_channel(self.address, credentials, options=options)


def open_door(
    address: str, api_key: str | None, ca_file: str | os.PathLike[str] | None, allow_plaintext: bool | None
) -> Door:
    """The arguments of a client, with SPOLIA_API_KEY, SPOLIA_CA_FILE (else `ca.crt` in SPOLIA_TLS_DIR) and
    SPOLIA_ALLOW_PLAINTEXT for those not given.

    Raises `InvalidRequest` for an address or a key that cannot be one, and a file that cannot be read.
    """
    check_address(address)
    key = _checked_key(os.environ.get(API_KEY_ENV, "") if api_key is None else api_key)
    named = _authority_of_environment() if ca_file is None else os.fspath(ca_file)
    authority = _authority_in(named) if named else None
    return Door(address, key, authority, authority is None and allows_plaintext(address, allow_plaintext))


def allows_plaintext(address: str, allow: bool | None = None) -> bool:
    """Whether TLS may be gone without: on this machine, and elsewhere when that is said, here or by the environment."""
    if allow is None:
        allow = os.environ.get(PLAINTEXT_ENV, "").strip().lower() in ("1", "true", "yes", "on")
    return allow or is_loopback(address)


def _authority_of_environment() -> str:
    folder = os.environ.get(TLS_DIR_ENV, "")
    return os.environ.get(CA_FILE_ENV, "") or (str(Path(folder) / AUTHORITY_FILE) if folder else "")


def _checked_key(key: object) -> str:
    if not isinstance(key, str):
        raise wrong_type(key, "api_key", "str")
    if not (key.isascii() and key.isprintable()) or len(key) > MAX_KEY_CHARS:
        raise InvalidRequest(f"api_key must be at most {MAX_KEY_CHARS} characters of printable ASCII", field="api_key")
    return key


def _authority_in(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise InvalidRequest(
            f"ca_file {path} cannot be read: {error.strerror}", field="ca_file", actual=path
        ) from error


def channel_options(address: str) -> list[tuple[str, int | str]]:
    """gRPC options of a channel to `address`."""
    options: list[tuple[str, int | str]] = [
        # A name with several addresses is several gateways: calls go to all that answer, in turn.
        ("grpc.lb_policy_name", "round_robin"),
        ("grpc.max_receive_message_length", MAX_RECEIVED_BYTES),
        # While a call is under way, a gateway whose machine vanished is noticed within about ten seconds.
        ("grpc.keepalive_time_ms", 5000),
        ("grpc.keepalive_timeout_ms", 5000),
        ("grpc.http2.max_pings_without_data", 0),
        # A gateway that was away for a moment is found again in about a second, not after minutes of back-off.
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.max_reconnect_backoff_ms", 1000),
    ]
    if is_loopback(address):
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


def is_loopback(address: str) -> bool:
    """Whether "host:port" is this machine itself."""
    host = address.rpartition(":")[0].strip("[]")
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
