"""Who is let in: at the gateway without a key, at nodes without a certificate."""

from __future__ import annotations

import socket
import ssl
import time
from pathlib import Path

import grpc

from spolia.client import Client
from spolia.connection import Door, channel_options, is_loopback
from spolia.doctor.finding import Finding, State
from spolia.errors import SpoliaError, Unauthenticated
from spolia.results import Cluster
from spolia_core.key_book import KEY_PREFIX
from spolia_core.node_name import AUTHORITY_FILE, node_dns_name

EXPIRY_WARNING_DAYS = 14.0
CONNECT_TIMEOUT_S = 3.0
NO_KEY = KEY_PREFIX + "nobody-has-this-key"


def keys_are_asked_for(door: Door, timeout_s: float) -> Finding:
    """Whether the gateway refuses a key that was never made."""
    with Client(door.address, api_key=NO_KEY, timeout_s=timeout_s, retry_s=0) as client:
        try:
            client.models()
        except Unauthenticated:
            return Finding("keys", State.OK, "a key that was never made is refused")
        except SpoliaError as error:
            return Finding("keys", State.FAILED, f"a wrong key is answered by {type(error).__name__}: {error.message}")
    return _open("keys", "the gateway asks nobody for a key, and serves all as one tenant", door.address)


def gateway_tls(door: Door) -> Finding:
    """Whether the connection to the gateway is under TLS, and how long its certificate is good for."""
    if door.plaintext:
        return _open("tls", "the connection to the gateway is plaintext", door.address)
    try:
        expires_s, protocol = _certificate_of(door)
    except (OSError, ssl.SSLError) as error:
        return Finding("tls", State.FAILED, f"no TLS with {door.address}: {error}")
    days = (expires_s - time.time()) / 86400
    facts = {"days_left": round(days, 1), "protocol": protocol}
    state = State.FAILED if days <= 0 else State.WARNING if days < EXPIRY_WARNING_DAYS else State.OK
    return Finding("tls", state, f"{protocol}; the gateway's certificate ends in {days:.0f} days", facts)


def nodes_ask_for_certificates(cluster: Cluster | None, tls_dir: str) -> Finding:
    """Whether every inner node refuses who has no certificate, in plaintext and under TLS."""
    if cluster is None:
        return Finding("node doors", State.SKIPPED, "needs an operator's key, to know the nodes")
    nodes = [node for node in cluster.nodes if node.role != "gateway"]
    reached = [node for node in nodes if _answers_tcp(node.address)]
    if not reached:
        return Finding("node doors", State.SKIPPED, "no node can be connected to from here; run it beside them")
    opened = [node for node in reached if _lets_in(node.address, node.role, tls_dir)]
    facts = {"reached": [node.node_id for node in reached], "open": [node.node_id for node in opened]}
    if opened:
        said = f"{len(opened)} of {len(reached)} nodes serve anyone who connects"
        local = all(is_loopback(node.address) for node in opened)
        return Finding("node doors", State.WARNING if local else State.FAILED, said + _where(local=local), facts)
    return Finding("node doors", State.OK, f"{len(reached)} nodes refuse who has no certificate", facts)


def _open(check: str, said: str, address: str) -> Finding:
    local = is_loopback(address)
    return Finding(check, State.WARNING if local else State.FAILED, said + _where(local=local))


def _where(*, local: bool) -> str:
    return "; only this machine can connect" if local else ""


def _certificate_of(door: Door) -> tuple[float, str]:
    """When the gateway's certificate ends, in seconds since 1970, and the protocol spoken."""
    host, _, port = door.address.rpartition(":")
    host = host.strip("[]")
    authority = door.authority_pem.decode("ascii", "replace") if door.authority_pem is not None else None
    context = ssl.create_default_context(cadata=authority)
    context.set_alpn_protocols(["h2"])
    with (
        socket.create_connection((host, int(port)), CONNECT_TIMEOUT_S) as plain,
        context.wrap_socket(plain, server_hostname=host) as secured,
    ):
        shown = secured.getpeercert() or {}
        return ssl.cert_time_to_seconds(str(shown["notAfter"])), secured.version() or ""


def _answers_tcp(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_TIMEOUT_S).close()
    except OSError:
        return False
    return True


def _lets_in(address: str, role: str, tls_dir: str) -> bool:
    """Whether a caller without a certificate has its health check answered, other than by an error."""
    options: list[tuple[str, int | str]] = [
        *channel_options(address),
        ("grpc.ssl_target_name_override", node_dns_name(role)),
        ("grpc.use_local_subchannel_pool", 1),
    ]
    channels = [grpc.insecure_channel(address, options=options)]
    authority = Path(tls_dir) / AUTHORITY_FILE
    if tls_dir and authority.exists():
        credentials = grpc.ssl_channel_credentials(authority.read_bytes())
        channels.append(grpc.secure_channel(address, credentials, options=options))
    try:
        return any(_is_healthy(channel) for channel in channels)
    finally:
        for channel in channels:
            channel.close()


def _is_healthy(channel: grpc.Channel) -> bool:
    check: grpc.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary("/grpc.health.v1.Health/Check")
    try:
        check(b"", timeout=CONNECT_TIMEOUT_S)
    except grpc.RpcError:
        return False
    return True
