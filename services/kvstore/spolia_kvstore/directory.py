"""Who is in the cluster: membership under leases. Pure: time comes in as an argument, in monotonic seconds.

    (absent) ──renew──▶ member ──renew──▶ member, lease extended
                          └── leave, or no renewal before the lease ends ──▶ (absent)

A session is one heartbeat stream. A node that registers again through a newer session takes its place over, and the
old session can neither renew nor remove it. Sessions are numbered across all directories that share a backend, so a
node that moves to another directory is not lost when the first one sees its stream end.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from spolia.v1.directory_pb2 import NodeRecord, NodeRole
from spolia_core.errors import InvalidRequest
from spolia_core.ids import ID_BYTES
from spolia_node.addresses import is_address

MAX_HELD_CHUNKS = 4096


@dataclass(slots=True)
class _Member:
    record: NodeRecord
    session: int
    expires_at: float
    is_ours: bool = True  # its stream is to this directory


@dataclass(frozen=True, slots=True)
class RemoteLease:
    """A node that is registered with another directory."""

    record: NodeRecord
    session: int
    remaining_s: float


class Directory:
    """Members by node id. `version` grows with every change that a watcher would see; renewals alone are none."""

    def __init__(self, lease_s: float) -> None:
        self.lease_s = lease_s
        self.version = 0
        self._members: dict[str, _Member] = {}

    def __len__(self) -> int:
        return len(self._members)

    def renew(self, session: int, record: NodeRecord, now: float) -> None:
        """Registers the node, or renews its lease with the record as it is now. Keeps a copy.

        Raises `InvalidRequest` for a bad record, or when a newer session has taken the node over.
        """
        check_record(record)
        member = self._members.get(record.node_id)
        if member is not None and member.session > session:
            raise InvalidRequest(f"node {record.node_id!r} registered again meanwhile", field="record.node_id")
        if member is None or member.record != record:
            self.version += 1
        copy = NodeRecord()
        copy.CopyFrom(record)
        self._members[record.node_id] = _Member(copy, session, now + self.lease_s)

    def take_remote(self, leases: Collection[RemoteLease], now: float) -> list[str]:
        """Takes over what other directories keep: all of it. Returns the ids of the nodes that are gone.

        A member that is registered here stays as it is, unless it registered elsewhere since.
        """
        for lease in leases:
            member = self._members.get(lease.record.node_id)
            if member is not None and (
                member.session > lease.session or (member.is_ours and member.session == lease.session)
            ):
                continue
            if member is None or member.record != lease.record:
                self.version += 1
            self._members[lease.record.node_id] = _Member(lease.record, lease.session, now + lease.remaining_s, False)
        listed = {lease.record.node_id for lease in leases}
        return self._remove([n for n, member in self._members.items() if not member.is_ours and n not in listed])

    def keep_remote(self, until: float) -> None:
        """Keeps the members of other directories that long at least: nobody can say that they are gone."""
        for member in self._members.values():
            if not member.is_ours:
                member.expires_at = max(member.expires_at, until)

    def ours(self) -> list[tuple[int, NodeRecord]]:
        """Sessions and records of the nodes that are registered here."""
        return [(member.session, member.record) for member in self._members.values() if member.is_ours]

    def newest_session(self) -> int:
        """The largest session known."""
        return max((member.session for member in self._members.values()), default=0)

    def leave(self, session: int) -> list[str]:
        """Removes what this session still holds. Returns the ids of the nodes that are gone."""
        return self._remove([node_id for node_id, member in self._members.items() if member.session == session])

    def expire(self, now: float) -> list[str]:
        """Removes members whose lease has run out. Returns the ids of the nodes that are gone."""
        return self._remove([node_id for node_id, member in self._members.items() if member.expires_at <= now])

    def next_expiry(self) -> float | None:
        """When the next lease runs out, unless it is renewed."""
        return min((member.expires_at for member in self._members.values()), default=None)

    def role_of(self, node_id: str) -> int | None:
        """The role of a member; None for an id that nobody has."""
        member = self._members.get(node_id)
        return None if member is None else member.record.role

    def nodes(self, roles: Collection[int] = ()) -> list[NodeRecord]:
        """Members of these roles (all, when empty), by node id. Records are the directory's own: do not change them."""
        members = sorted(self._members.items())
        return [member.record for _, member in members if not roles or member.record.role in roles]

    def _remove(self, node_ids: list[str]) -> list[str]:
        for node_id in node_ids:
            del self._members[node_id]
        self.version += bool(node_ids)
        return node_ids


def check_record(record: NodeRecord) -> None:
    """Raises `InvalidRequest` naming the first field that is missing, malformed or too long."""
    if not record.node_id:
        raise InvalidRequest("record.node_id is missing", field="record.node_id")
    if not is_address(record.address):
        raise InvalidRequest(
            f"record.address must be host:port, got {record.address!r}",
            field="record.address",
            limit="host:port",
            actual=record.address,
        )
    if record.role not in NodeRole.values() or record.role == NodeRole.NODE_ROLE_UNSPECIFIED:
        raise InvalidRequest("record.role is missing or unknown", field="record.role", actual=str(record.role))
    _check_ids("record.held_chunks", record.held_chunks)
    _check_ids("record.held_prefixes", record.held_prefixes)


def _check_ids(field: str, ids: Sequence[bytes]) -> None:
    if len(ids) > MAX_HELD_CHUNKS:
        raise InvalidRequest(
            f"{field} has {len(ids)} ids, at most {MAX_HELD_CHUNKS} are kept",
            field=field,
            limit=f"at most {MAX_HELD_CHUNKS}",
            actual=str(len(ids)),
        )
    if any(len(chunk_id) != ID_BYTES for chunk_id in ids):
        raise InvalidRequest(f"{field} holds a wrong id", field=field, limit=f"{ID_BYTES} bytes")
