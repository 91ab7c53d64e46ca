"""Ports for servers that are started later, or again."""

from __future__ import annotations

import contextlib
import random
import socket

CLUSTER_BUS = 10_000
"""So far above its own port a node of a Redis Cluster has another."""

_CANDIDATES = range(10_000, 32_768 - CLUSTER_BUS)
"""With their buses below 32768: what Linux gives to whoever asks for any port, at any moment, begins there."""

_NUM_TRIES = 500
_draw = random.SystemRandom()  # processes that were given the same seed draw different ports


def free_port() -> int:
    """One that nobody listens on, nor on its bus. Nobody is given it before it is bound, unless by this function."""
    for port in _draw.sample(_CANDIDATES, _NUM_TRIES):
        with socket.socket() as own, socket.socket() as bus, contextlib.suppress(OSError):
            own.bind(("127.0.0.1", port))
            bus.bind(("127.0.0.1", port + CLUSTER_BUS))
            return port
    raise AssertionError(f"{_NUM_TRIES} ports below 32768 are taken")
