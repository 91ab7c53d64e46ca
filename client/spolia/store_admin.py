"""What operators do to stores: look, check, pin, drop, collect. Needs grpcio and protobuf only."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import TypeVar

from spolia import chunk_prefix, store_answers
from spolia.argument_checks import (
    check_not_empty,
    checked_bool,
    checked_items,
    checked_text,
    checked_timeout,
    checked_uint32,
)
from spolia.client import Client
from spolia.connection import DEFAULT_ADDRESS, ended
from spolia.lifetime import Lifetime
from spolia.store_download import file_when_whole, new_hasher, receive
from spolia.store_fan_out import Question, StoreConnection, about, ask_all, callers_own
from spolia.store_requests import Batch, batches_of, checked_idle_s, checked_lease_ms
from spolia.store_results import (
    Collected,
    Deleted,
    Downloaded,
    Listing,
    ObjectName,
    PerStore,
    StoredObject,
    StoreStats,
    Verified,
    VerifyProgress,
    tier_rank,
)
from spolia.v1 import kvstore_pb2
from spolia_core.errors import InternalError, InvalidRequest, NotFound, SpoliaError, Unavailable

T = TypeVar("T")

DEFAULT_OWNER = "operator"
"""Who pins where nobody says."""


class StoreAdmin:
    """Talks to KV stores directly, to all of them at once. Close it, or use it in a `with` block.

    Every method asks all stores side by side, within `timeout_s` unless it is given a limit of its own. A store that
    does not answer is left out: look at `failed` of what is returned. When none answers, the first one's error is
    raised. Calls raise the classes of `spolia.errors` only. An interrupt during a call closes the whole.

    Stores with certificates want an operator's: `tls_dir` is a folder with `operator.crt`, `operator.key` and `ca.crt`
    (default: SPOLIA_TLS_DIR).

    >>> with StoreAdmin.of_cluster("127.0.0.1:7300") as stores:
    ...     idle = [found for found in stores.list_objects().objects if found.idle_s > 86400 and not found.pins]
    ...     stores.delete(idle)
    """

    def __init__(
        self,
        addresses: Iterable[str],
        *,
        timeout_s: float = 60.0,
        tls_dir: str | os.PathLike[str] | None = None,
    ) -> None:
        given = list(dict.fromkeys(checked_items(addresses, "addresses", "an iterable of host:port")))
        check_not_empty(given, "addresses", "store")
        self._timeout_s = checked_timeout(timeout_s)
        self._lifetime = Lifetime()
        self._stores = [StoreConnection(str(address), tls_dir) for address in given]

    @classmethod
    def of_cluster(cls, address: str = DEFAULT_ADDRESS, *, timeout_s: float = 60.0) -> StoreAdmin:
        """For every store that the gateway at `address` knows now. Raises `Unavailable` when it knows none."""
        with Client(address, timeout_s=timeout_s, retry_s=0) as client:
            nodes = client.cluster().nodes
        stores = [node.address for node in nodes if node.role == "kvstore"]
        if not stores:
            raise Unavailable(f"the gateway at {address} knows no kvstore node")
        return cls(stores, timeout_s=timeout_s)

    @property
    def addresses(self) -> tuple[str, ...]:
        """Where the stores are."""
        return tuple(store.address for store in self._stores)

    def list_objects(
        self, *, tenant_id: str = "", id_prefix: str = "", limit: int = 0, timeout_s: float | None = None
    ) -> Listing:
        """What the stores hold, by tenant and id, an object at several stores once; also what is never served.

        Empty arguments ask for all tenants', all ids (`id_prefix` is hex digits), and any number.
        """
        prefix = chunk_prefix.checked_prefix(id_prefix)
        checked_uint32(limit, "limit")
        # What is among the first of all is among the first of each store that has it. Stores do not see an odd digit.
        listed = self._list([prefix], tenant_id, limit if len(prefix) % 2 == 0 else 0, timeout_s)
        objects = [found for found in listed.objects if found.chunk_id.hex().startswith(prefix)]
        return Listing(tuple(objects[:limit] if limit else objects), listed.failed)

    def find(self, ids: Iterable[str], *, tenant_id: str = "", timeout_s: float | None = None) -> Listing:
        """The objects that `ids` name, in that order, each once. An id is given by 4 of its hex digits or more.

        Raises `NotFound` when an id names no object, `InvalidRequest` when it names several: also when several tenants
        have it and `tenant_id` is empty.
        """
        given = checked_items(ids, "ids", "an iterable of str")
        prefixes = [chunk_prefix.checked_prefix(one, min_digits=chunk_prefix.MIN_DIGITS) for one in given]
        check_not_empty(prefixes, "ids", "id")
        listing = self._list(chunk_prefix.prefixes_to_ask(prefixes), tenant_id, 0, timeout_s)
        whole = not listing.failed
        by_id = chunk_prefix.ById(listing.objects)
        found = [chunk_prefix.the_one(by_id, prefix, whole=whole) for prefix in prefixes]
        return Listing(tuple({(one.tenant_id, one.chunk_id): one for one in found}.values()), listing.failed)

    def stats(self, *, timeout_s: float | None = None) -> PerStore[StoreStats]:
        """What each store holds and has counted since it started."""
        question = self._question(timeout_s)

        def ask(store: StoreConnection) -> StoreStats:
            request = kvstore_pb2.GetStatsRequest()
            response = store.stub.GetStats(request, timeout=question.timeout_s, metadata=question.metadata)
            return store_answers.stats_of(response)

        return self._ask_all(ask)

    def download(self, found: StoredObject, path: Path, *, timeout_s: float | None = None) -> Downloaded:
        """Writes the bytes of an object to `path`, from the fastest tier that gives a good copy of it.

        Every frame and the whole are checked against their digests; `path` is replaced when all was good, and else
        left as it was. Stores are tried in turn, each in its part of the time; when none gives a good copy, the first
        one's error is raised. Needs xxhash (extra `node`); `InvalidRequest` says so.
        """
        question = self._question(timeout_s)
        new_hasher()  # says that it is missing before anything is asked
        replicas = sorted(found.replicas, key=lambda r: tier_rank(r.tiers[0] if r.tiers else ""))
        if not replicas:
            raise NotFound(f"no store is known to hold object {found.chunk_id.hex()}", field="found.replicas")
        failed: dict[str, SpoliaError] = {}
        for number, replica in enumerate(replicas):
            store = self._store_at(replica.store)
            try:
                # One that hangs leaves the others their time.
                part = question.part(1 / (len(replicas) - number))
                return self._download_from(store, found, path, part, failed)
            except InvalidRequest:
                raise  # of the file, or of this client: no other store helps
            except SpoliaError as error:
                failed[store.address] = about(store.address, error)
        raise next(iter(failed.values()))

    def delete(self, objects: Iterable[ObjectName], *, timeout_s: float | None = None) -> PerStore[Deleted]:
        """Drops objects from every tier of every store, pinned or not. Idempotent.

        A store that fails may have dropped some.
        """
        batches = batches_of(objects)
        question = self._question(timeout_s)

        def ask(store: StoreConnection) -> Deleted:
            dropped = Deleted()
            for tenant_id, chunk_ids in batches:
                request = kvstore_pb2.DeleteRequest(tenant_id=tenant_id, chunk_ids=chunk_ids)
                response = store.stub.Delete(request, timeout=question.timeout_s, metadata=question.metadata)
                dropped += store_answers.deleted_of(response)
            return dropped

        return self._ask_all(ask)

    def pin(
        self,
        objects: Iterable[ObjectName],
        *,
        lease_s: float,
        owner: str = DEFAULT_OWNER,
        timeout_s: float | None = None,
    ) -> PerStore[tuple[ObjectName, ...]]:
        """Keeps objects from eviction for `lease_s`, at most an hour; renews where `owner` has the pin already.

        Returns which of them each store holds and has pinned.
        """
        batches = batches_of(objects)
        lease_ms = checked_lease_ms(lease_s)
        checked_text(owner, "owner")
        question = self._question(timeout_s)

        def ask(store: StoreConnection) -> tuple[ObjectName, ...]:
            pinned: list[ObjectName] = []
            for tenant_id, chunk_ids in batches:
                request = kvstore_pb2.PinRequest(
                    tenant_id=tenant_id, chunk_ids=chunk_ids, owner=owner, lease_ms=lease_ms
                )
                response = store.stub.Pin(request, timeout=question.timeout_s, metadata=question.metadata)
                if len(response.pinned) != len(chunk_ids):
                    raise InternalError(f"{len(response.pinned)} answers came for {len(chunk_ids)} pins")
                marked = zip(chunk_ids, response.pinned, strict=True)
                pinned += [ObjectName(tenant_id, chunk_id) for chunk_id, is_pinned in marked if is_pinned]
            return tuple(pinned)

        return self._ask_all(ask)

    def unpin(
        self, objects: Iterable[ObjectName], *, owner: str = DEFAULT_OWNER, timeout_s: float | None = None
    ) -> PerStore[int]:
        """Ends the pins that `owner` has on objects; returns how many each store ended. Idempotent."""
        batches = batches_of(objects)
        checked_text(owner, "owner")
        question = self._question(timeout_s)

        def ask(store: StoreConnection) -> int:
            num_unpinned = 0
            for tenant_id, chunk_ids in batches:
                request = kvstore_pb2.UnpinRequest(tenant_id=tenant_id, chunk_ids=chunk_ids, owner=owner)
                response = store.stub.Unpin(request, timeout=question.timeout_s, metadata=question.metadata)
                num_unpinned += response.num_unpinned
            return num_unpinned

        return self._ask_all(ask)

    def verify(
        self,
        objects: Iterable[ObjectName] | None = None,
        *,
        tenant_id: str = "",
        on_progress: Callable[[VerifyProgress], None] | None = None,
        timeout_s: float | None = None,
    ) -> PerStore[Verified]:
        """Has the stores read copies on every tier and check their digests; damaged ones are taken out of service.

        Without `objects` all of `tenant_id` are checked, of all tenants where that is empty too. Calls `on_progress`
        as the stores report, from several threads; what it raises closes the whole and is raised here.
        """
        everything: list[Batch] = [(checked_text(tenant_id, "tenant_id"), [])]
        batches = everything if objects is None else batches_of(objects)
        question = self._question(timeout_s)

        def ask(store: StoreConnection) -> Verified:
            verified, num_total = Verified(), 0
            for tenant, chunk_ids in batches:
                request = kvstore_pb2.VerifyRequest(tenant_id=tenant, chunk_ids=chunk_ids)
                call = store.stub.Verify(request, timeout=question.timeout_s, metadata=question.metadata)
                before, total_before = verified, num_total
                with ended(call):
                    for part, part_total in store_answers.verified_of(call):
                        verified, num_total = before + part, total_before + part_total
                        if on_progress is not None:
                            with callers_own():
                                on_progress(VerifyProgress(store.address, verified, num_total))
            return verified

        return self._ask_all(ask)

    def collect(
        self,
        *,
        drop_unknown: bool = False,
        idle_s: float = 0.0,
        dry_run: bool = False,
        timeout_s: float | None = None,
    ) -> PerStore[Collected]:
        """Has the stores collect what is of no use: files without a row, rows without a file, what is in quarantine.

        With `drop_unknown` also objects of a format or codec they do not know, with `idle_s` those that nobody pins
        and nobody read or looked up for so long. With `dry_run` they only count.
        """
        request = kvstore_pb2.CollectRequest(
            drop_unknown=checked_bool(drop_unknown, "drop_unknown"),
            idle_s=checked_idle_s(idle_s),
            dry_run=checked_bool(dry_run, "dry_run"),
        )
        question = self._question(timeout_s)

        def ask(store: StoreConnection) -> Collected:
            response = store.stub.Collect(request, timeout=question.timeout_s, metadata=question.metadata)
            return store_answers.collected_of(response)

        return self._ask_all(ask)

    def close(self) -> None:
        """Ends every call under way and the connections. May be called twice."""
        self._lifetime.close()
        for store in self._stores:
            store.close()

    def __enter__(self) -> StoreAdmin:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _list(self, prefixes: Sequence[str], tenant_id: str, limit: int, timeout_s: float | None) -> Listing:
        """What the stores list for any of `prefixes`, whose odd last digits they do not see."""
        checked_text(tenant_id, "tenant_id")
        requests = [
            kvstore_pb2.ListRequest(tenant_id=tenant_id, id_prefix=chunk_prefix.whole_bytes(prefix), limit=limit)
            for prefix in prefixes
        ]
        question = self._question(timeout_s)

        def ask(store: StoreConnection) -> list[kvstore_pb2.ListedObject]:
            found: dict[tuple[str, bytes], kvstore_pb2.ListedObject] = {}
            for request in requests:
                call = store.stub.List(request, timeout=question.timeout_s, metadata=question.metadata)
                with ended(call):
                    found |= {(o.tenant_id, o.info.chunk_id): o for response in call for o in response.objects}
            return list(found.values())

        listed = self._ask_all(ask)
        return Listing(tuple(store_answers.merged(listed.answers)), listed.failed)

    def _ask_all(self, ask: Callable[[StoreConnection], T]) -> PerStore[T]:
        return ask_all(self._stores, ask, self._lifetime, self.close)

    def _question(self, timeout_s: float | None) -> Question:
        return Question(self._timeout_s if timeout_s is None else checked_timeout(timeout_s))

    def _store_at(self, address: str) -> StoreConnection:
        for store in self._stores:
            if store.address == address:
                return store
        raise InvalidRequest(f"{address} is none of these stores", field="store", actual=address)

    def _download_from(
        self,
        store: StoreConnection,
        found: StoredObject,
        path: Path,
        question: Question,
        failed: dict[str, SpoliaError],
    ) -> Downloaded:
        request = kvstore_pb2.GetRequest(tenant_id=found.tenant_id, chunk_ids=[found.chunk_id], ignore_cost=True)
        with self._lifetime.call(), file_when_whole(path) as file:
            call = store.stub.Get(request, timeout=question.timeout_s, metadata=question.metadata)
            with ended(call):
                received = receive(call, found, file.write)
        return Downloaded(store.address, received.tier, received.size_bytes, received.digest, failed)
