"""The address by which others reach this machine, where it has several or is given a new one at every start."""

from __future__ import annotations

import socket
from collections.abc import Sequence

from spolia_core.errors import InvalidRequest

SETTING = "advertise_host"


def address_towards(peers: Sequence[str]) -> str:
    """The IP address from which this machine reaches the first of `peers`, "host:port", that it has a route to.

    Sends nothing. Raises `InvalidRequest`, saying what was tried, where there is none.
    """
    if not peers:
        raise InvalidRequest(
            f"{SETTING} auto needs directory: it is the address from which that is reached", field=SETTING
        )
    problems = []
    for peer in peers:
        try:
            return _source_towards(peer)
        except OSError as error:
            problems.append(f"{peer}: {error.strerror}")
    raise InvalidRequest(f"{SETTING} auto found no way to the directory: {'; '.join(problems)}", field=SETTING)


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
