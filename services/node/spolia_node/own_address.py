"""The address by which others reach this machine, where it has several or is given a new one at every start."""

from __future__ import annotations

import socket
import time
from collections.abc import Sequence

from spolia_core.errors import InvalidRequest
from spolia_node.logs import get_log

SETTING = "advertise_host"

NAME_WAIT_S = 30.0
"""How long unknown names are asked for again: where all start at once, the directory's comes with its container."""
NAME_PAUSE_S = 0.5

log = get_log(__name__)


def address_towards(peers: Sequence[str]) -> str:
    """The IP address from which this machine reaches the first of `peers`, "host:port", that it has a route to.

    Sends nothing to them. While there is none and some name has no address, tries again until `NAME_WAIT_S` are over.
    Raises `InvalidRequest`, saying what was tried, where there is none then.
    """
    if not peers:
        raise InvalidRequest(
            f"{SETTING} auto needs directory: it is the address from which that is reached", field=SETTING
        )
    until_s, has_told = time.monotonic() + NAME_WAIT_S, False
    while True:
        errors: dict[str, OSError] = {}
        for peer in peers:
            try:
                return _source_towards(peer)
            except OSError as error:
                errors[peer] = error
        problems = "; ".join(f"{peer}: {error.strerror}" for peer, error in errors.items())
        is_nameless = any(isinstance(error, socket.gaierror) for error in errors.values())
        if not is_nameless or time.monotonic() + NAME_PAUSE_S > until_s:
            raise InvalidRequest(f"{SETTING} auto found no way to the directory: {problems}", field=SETTING)
        if not has_told:
            log.warning("waiting for the directory's name", problems=problems, limit_s=NAME_WAIT_S)
            has_told = True
        time.sleep(NAME_PAUSE_S)


def _source_towards(peer: str) -> str:
    host, _, port = peer.rpartition(":")
    failed: OSError | None = None
    for family, kind, protocol, _, address in socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_DGRAM):
        try:
            with socket.socket(family, kind, protocol) as probe:
                probe.connect(address)  # of a datagram socket: chooses the route, and sends nothing
                return str(probe.getsockname()[0])
        except OSError as error:
            failed = error
    raise failed or OSError(0, "it has no address")
