"""Names in Redis. Every name begins with the prefix, so that an ACL can grant `~prefix:*` and `&prefix:*` and no more.

    prefix:{<tenant's SHA-256>.<chunk id>}:replicas   hash: tier and store -> replica (replica_codec.py)
    prefix:{<tenant's SHA-256>.<chunk id>}:claim      string: the owner, with the claim's time to live
    prefix:{<tenant's SHA-256>.<chunk id>}:buried     string: it was deleted on purpose; forgotten after some days
    prefix:{members}:records                          hash: node id -> session and record
    prefix:{members}:expiries                         sorted set: node id -> when its lease runs out, in ms
    prefix:{members}:session                          string: the last session given
    prefix:{members}:probe                            string: written to see whether Redis takes writes

Braces are Redis Cluster's hash tags: what stands between them decides the node, so a script may touch all names of a
chunk, or all of the members'. A tenant may be any text and is hashed; its chunks never share a name with another's.
"""

from __future__ import annotations

import re
from base64 import urlsafe_b64encode
from dataclasses import dataclass
from functools import lru_cache
from hashlib import sha256

from spolia_core.errors import InvalidRequest
from spolia_kvstore.objects import ObjectKey

_PREFIX = re.compile(r"[A-Za-z0-9_.:-]{1,64}")


@dataclass(frozen=True, slots=True)
class RedisKeys:
    """Names under one prefix. Channels carry the database too: Redis's own are of the whole server.

    Raises `InvalidRequest` for a prefix that could be taken for a hash tag.
    """

    prefix: str
    db: int = 0

    def __post_init__(self) -> None:
        if not _PREFIX.fullmatch(self.prefix):
            limit = "1 … 64 letters, digits or _ . : -"
            message = f"redis_prefix must be {limit}, got {self.prefix!r}"
            raise InvalidRequest(message, field="redis_prefix", limit=limit, actual=self.prefix)

    def replicas(self, key: ObjectKey) -> str:
        """Hash of an object's replicas."""
        return f"{self.prefix}:{{{_tag(key)}}}:replicas"

    def claim(self, key: ObjectKey) -> str:
        """The claim on an object."""
        return f"{self.prefix}:{{{_tag(key)}}}:claim"

    def buried(self, key: ObjectKey) -> str:
        """That an object was deleted on purpose."""
        return f"{self.prefix}:{{{_tag(key)}}}:buried"

    def member(self, name: str) -> str:
        """One of the members' names: "records", "expiries", "session", "probe"."""
        return f"{self.prefix}:{{members}}:{name}"

    @property
    def claims_channel(self) -> str:
        """News of claims that ended."""
        return f"{self.prefix}:news:{self.db}:claims"

    @property
    def members_channel(self) -> str:
        """News that members changed."""
        return f"{self.prefix}:news:{self.db}:members"


def claim_news(key: ObjectKey) -> bytes:
    """What is published when the claim on `key` ends."""
    return f"{key.chunk_id.hex()}:{key.tenant_id}".encode()


def claim_of_news(payload: bytes) -> ObjectKey | None:
    """The key; None for what is no news of a claim."""
    chunk_id, mark, tenant_id = payload.partition(b":")
    try:
        return ObjectKey(tenant_id.decode(), bytes.fromhex(chunk_id.decode())) if mark else None
    except ValueError:
        return None


def _tag(key: ObjectKey) -> str:
    return f"{_tenant_tag(key.tenant_id)}.{key.chunk_id.hex()}"


@lru_cache(maxsize=1024)
def _tenant_tag(tenant_id: str) -> str:
    return urlsafe_b64encode(sha256(tenant_id.encode()).digest()).decode().rstrip("=")
