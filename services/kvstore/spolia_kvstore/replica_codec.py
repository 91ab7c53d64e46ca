"""A replica as a field and a value of a Redis hash.

The field is `<tier>:<store id>`, the value a version byte and a serialized `ObjectInfo`. What a later release adds to
`ObjectInfo` is skipped; a value of another version, or one that is none, is no replica to this release.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from google.protobuf.message import DecodeError

from spolia.v1.common_pb2 import ObjectInfo
from spolia_kvstore.backend import Replica
from spolia_kvstore.object_info import info_of, record_of_info
from spolia_kvstore.objects import ObjectKey, ObjectRecord, Tier

VERSION = 1


def replica_field(store_id: str, tier: Tier) -> bytes:
    """Names a store's replica on a tier."""
    return f"{int(tier)}:{store_id}".encode()


def encode_replica(record: ObjectRecord) -> bytes:
    """The value; the tenant, the tier and the store are in the names."""
    return bytes([VERSION]) + info_of(record).SerializeToString()


def decode_replicas(key: ObjectKey, values: Mapping[bytes, bytes], live_stores: Collection[str]) -> list[Replica]:
    """Those of live stores, fastest tier first and then by store."""
    replicas = [replica for field, value in values.items() if (replica := _decode(key, field, value)) is not None]
    live = [replica for replica in replicas if replica.store_id in live_stores]
    return sorted(live, key=lambda replica: (replica.tier, replica.store_id))


def _decode(key: ObjectKey, field: bytes, value: bytes) -> Replica | None:
    if value[:1] != bytes([VERSION]):
        return None
    tier, _, store_id = field.partition(b":")
    try:
        info = ObjectInfo.FromString(value[1:])
        return Replica(record_of_info(key, info), Tier(int(tier)), store_id.decode())
    except (DecodeError, ValueError):
        return None
