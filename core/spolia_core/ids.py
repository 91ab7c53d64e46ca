"""Chunk ids: what a chunk is, hashed under the tenant's key.

Tokens alone do not name KV: the same tokens under another model, another recipe or behind another prefix have other
keys and values. All of it enters the id, so a lookup can never hand out the wrong KV, and a tenant can neither hit nor
guess another tenant's ids without its key.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import blake3

from spolia_core.reuse import PREFIX_CHUNK_TOKENS, ChunkKind

ID_BYTES = 32
FORMAT_VERSION = 1

SHARED_TENANT = "shared"
"""Every tenant reads its chunks too. Written by whoever the gateway authenticated as this tenant: operators."""

MAX_TENANT_BYTES = 128


def is_tenant_id(text: str) -> bool:
    """Whether a tenant may be called that: it stands in log lines, metrics and paths."""
    return text.isascii() and text.isprintable() and 0 < len(text) <= MAX_TENANT_BYTES


@dataclass(frozen=True, slots=True)
class Recipe:
    """How KV was computed, apart from the model: dummy sink tokens before a local chunk, and the compute dtype."""

    compute_dtype: str
    num_sink_tokens: int = 0


@lru_cache(maxsize=1024)  # each request asks for its tenant's, on every node
def tenant_key(cluster_secret: bytes, tenant_id: str, cache_salt: str = "") -> bytes:
    """The 32-byte key under which a tenant's ids are made. The secret stays on the nodes; clients never see ids.

    With another `cache_salt`, it is another key: no id made under the one is found under the other.
    """
    context = "spolia.v1 tenant key"
    key = blake3.blake3(cluster_secret + b"\0" + tenant_id.encode(), derive_key_context=context).digest()
    if not cache_salt:
        return key
    return blake3.blake3(key + cache_salt.encode(), derive_key_context="spolia.v1 salted tenant key").digest()


def pack_token_ids(token_ids: Sequence[int]) -> bytes:
    """Token ids as little-endian uint32, four bytes each."""
    packed = array("I", token_ids)
    if packed.itemsize != 4:  # pragma: no cover - no supported platform
        raise AssertionError("array('I') must have 4-byte items")
    if sys.byteorder == "big":  # pragma: no cover - an id is the same on every platform
        packed.byteswap()
    return packed.tobytes()


@dataclass(frozen=True, slots=True)
class IdSpace:
    """All ids of one tenant, one model and one recipe."""

    key: bytes
    fingerprint: bytes
    recipe: Recipe

    def local(self, token_ids: Sequence[int]) -> bytes:
        """Id of a local chunk."""
        return self._id(ChunkKind.LOCAL, b"", pack_token_ids(token_ids))

    def prefix(self, predecessor: bytes | None, token_ids: Sequence[int]) -> bytes:
        """Id of a prefix chunk behind `predecessor` (None: it starts at position 0)."""
        return self._id(ChunkKind.PREFIX, predecessor or b"", pack_token_ids(token_ids))

    def linked(
        self,
        predecessor: bytes | None,
        placements: Sequence[Placement],
        profile: str,
        token_ids: Sequence[int],
    ) -> bytes:
        """Id of a linked chunk: live tokens behind `placements`, every reused range before them, in order."""
        name = profile.encode()
        sizes = len(placements).to_bytes(8, "little") + len(name).to_bytes(8, "little")
        layout = b"".join(placement.pack() for placement in placements)
        return self._id(ChunkKind.LINKED, predecessor or b"", sizes + layout + name + pack_token_ids(token_ids))

    def prefix_chain(self, token_ids: Sequence[int], predecessor: bytes | None = None) -> Iterator[bytes]:
        """Ids of the full `PREFIX_CHUNK_TOKENS` blocks of `token_ids`, first to last; a last partial block has none."""
        for start in range(0, len(token_ids) - PREFIX_CHUNK_TOKENS + 1, PREFIX_CHUNK_TOKENS):
            predecessor = self.prefix(predecessor, token_ids[start : start + PREFIX_CHUNK_TOKENS])
            yield predecessor

    def _id(self, kind: ChunkKind, predecessor: bytes, payload: bytes) -> bytes:
        # Every part that may vary in length is counted before it, so no two inputs share one byte sequence.
        hasher = blake3.blake3(key=self.key)
        dtype = self.recipe.compute_dtype.encode()
        sizes = (len(self.fingerprint), len(dtype), len(predecessor))
        header = (int(kind), FORMAT_VERSION, self.recipe.num_sink_tokens, *sizes)
        hasher.update(b"".join(n.to_bytes(4, "little") for n in header))
        hasher.update(self.fingerprint + dtype + predecessor)
        hasher.update(payload)
        return hasher.digest()


@dataclass(frozen=True, slots=True)
class Placement:
    """Tokens `start` … `end` of a local chunk, standing at `offset` + start … in a context, its first k recomputed."""

    chunk_id: bytes
    offset: int
    start: int
    end: int
    num_link_tokens: int

    def pack(self) -> bytes:
        """Fixed-width bytes for hashing."""
        numbers = (self.offset, self.start, self.end, self.num_link_tokens)
        return self.chunk_id + b"".join(n.to_bytes(8, "little", signed=True) for n in numbers)
