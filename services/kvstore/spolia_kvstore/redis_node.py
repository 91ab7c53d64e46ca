"""Where one process of a Redis installation listens."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class RedisNode:
    """A Redis, a node of a Redis Cluster, or a Sentinel."""

    host: str
    port: int
