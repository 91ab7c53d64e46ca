"""What a port speaks where calls to it fail: one that speaks TLS and is called in plaintext, or the other way round,
looks to gRPC like one that is away.
"""

from __future__ import annotations

import socket
import ssl
import time
from contextlib import suppress
from enum import Enum

import grpc

from spolia.errors import is_of_a_node
from spolia_core.errors import InvalidRequest

PROBE_TIMEOUT_S = 1.0
FRAME_HEAD_BYTES = 9

_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes((0, 0, 0, 4, 0, 0, 0, 0, 0))
"""How a client of HTTP/2 begins, with settings that set nothing."""
_ALERT, _HANDSHAKE, _SETTINGS = 0x15, 0x16, 0x04


class Spoken(Enum):
    """A protocol as it is named to people."""

    PLAINTEXT = "plaintext"
    TLS = "TLS"
    HTTP1 = "HTTP/1.1"


def may_speak_otherwise(error: grpc.RpcError) -> bool:
    """Whether a call that failed so may have met a port that speaks another protocol."""
    return getattr(error, "code", lambda: None)() is grpc.StatusCode.UNAVAILABLE and not is_of_a_node(error)


def spoken_at(address: str, ours: Spoken, timeout_s: float) -> Spoken | None:
    """What is spoken at "host:port" where that is not `ours`; None where it is, and where nobody says within
    `timeout_s`, or `PROBE_TIMEOUT_S`.
    """
    host, _, port = address.rpartition(":")
    host = host.strip("[]")
    said = _client_hello(host) if ours is Spoken.PLAINTEXT else _PREFACE
    heard = _first_bytes(host, int(port), said, time.monotonic() + min(timeout_s, PROBE_TIMEOUT_S))
    if heard.startswith(b"HTTP/1."):
        return Spoken.HTTP1
    if ours is Spoken.PLAINTEXT:
        return Spoken.TLS if heard[:1] in (bytes([_ALERT]), bytes([_HANDSHAKE])) and heard[1:2] == b"\x03" else None
    is_settings = len(heard) == FRAME_HEAD_BYTES and heard[3] == _SETTINGS and heard[5:] == bytes(4)
    return Spoken.PLAINTEXT if is_settings else None


def gateway_speaks_otherwise(address: str, *, plaintext: bool, timeout_s: float) -> InvalidRequest | None:
    """What to tell a client of a gateway, `plaintext` or of TLS, where that is why its calls fail."""
    ours = Spoken.PLAINTEXT if plaintext else Spoken.TLS
    spoken = spoken_at(address, ours, timeout_s)
    if spoken is None:
        return None
    field, remedy = {
        Spoken.TLS: (
            "ca_file",
            "set ca_file, SPOLIA_CA_FILE or SPOLIA_TLS_DIR to the certificate of its authority; where that is a public "
            "one on another machine, leave out allow_plaintext and SPOLIA_ALLOW_PLAINTEXT",
        ),
        Spoken.PLAINTEXT: (
            "ca_file",
            "leave out ca_file, SPOLIA_CA_FILE and SPOLIA_TLS_DIR, and for another machine set allow_plaintext or "
            "SPOLIA_ALLOW_PLAINTEXT=1 (key, prompts and answers can be read on the way); or give the gateway tls_dir",
        ),
        Spoken.HTTP1: ("address", "name the gateway's port for gRPC, 7300 unless it was given another"),
    }[spoken]
    return _told(f"the gateway at {address}", spoken, ours, field, remedy)


def store_speaks_otherwise(address: str, *, plaintext: bool, timeout_s: float) -> InvalidRequest | None:
    """The same for an operator's tools and a store."""
    ours = Spoken.PLAINTEXT if plaintext else Spoken.TLS
    spoken = spoken_at(address, ours, timeout_s)
    if spoken is None:
        return None
    remedy = {
        Spoken.TLS: "set tls_dir or SPOLIA_TLS_DIR to a folder with an operator's certificate",
        Spoken.PLAINTEXT: "leave out tls_dir and SPOLIA_TLS_DIR, or give the store tls_dir",
        Spoken.HTTP1: "name the store's port for gRPC",
    }[spoken]
    return _told("it", spoken, ours, "tls_dir", remedy)


def _told(who: str, spoken: Spoken, ours: Spoken, field: str, remedy: str) -> InvalidRequest:
    message = f"{who} speaks {spoken.value}, and was called in {ours.value}: {remedy}"
    return InvalidRequest(message, field=field, limit=spoken.value, actual=ours.value)


def _client_hello(host: str) -> bytes:
    """How a client of TLS begins. No secret is in it."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.set_alpn_protocols(["h2"])
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    with suppress(ssl.SSLWantReadError):
        context.wrap_bio(incoming, outgoing, server_hostname=host).do_handshake()
    return outgoing.read()


def _first_bytes(host: str, port: int, said: bytes, until_s: float) -> bytes:
    """The first that a port says to `said`, up to the head of a frame; less where it says less, or nothing in time."""
    heard = b""
    with suppress(OSError), socket.create_connection((host, port), max(0.001, until_s - time.monotonic())) as peer:
        peer.sendall(said)
        while len(heard) < FRAME_HEAD_BYTES:
            peer.settimeout(max(0.001, until_s - time.monotonic()))
            more = peer.recv(FRAME_HEAD_BYTES - len(heard))
            if not more:
                break
            heard += more
    return heard
