"""What the store knows of an object, apart from its bytes."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

from spolia_core.reuse import ChunkKind


class Tier(IntEnum):
    """Where an object lives. Values equal the protos' enum numbers; a lower tier is faster."""

    RAM = 1
    """In this process's memory; gone when it ends."""
    DISK = 2
    """In a file."""


class ObjectKey(NamedTuple):
    """Names an object. The tenant is part of the name: another tenant's id is simply not found."""

    tenant_id: str
    chunk_id: bytes


@dataclass(frozen=True, slots=True)
class ObjectRecord:
    """An object as announced and listed. `digest` is XXH3-128 of it all; `replica` is "" until it is stored.

    `compute_s` is the computation it takes the place of, in seconds; 0 where nobody measured it.
    """

    key: ObjectKey
    kind: ChunkKind
    format_version: int
    codec: str
    fingerprint: bytes
    num_tokens: int
    size_bytes: int
    digest: bytes
    replica: str = ""
    compute_s: float = 0.0
