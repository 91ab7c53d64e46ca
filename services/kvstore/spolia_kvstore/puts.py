"""Puts: from what is announced to an object that can be found and is as safe as was promised. First Put wins."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import count

from spolia_core.errors import AlreadyStored, Busy, DataCorrupt, NotSupported
from spolia_kvstore.catalog import Totals
from spolia_kvstore.claims import Claims
from spolia_kvstore.counters import Counters
from spolia_kvstore.entry import Reader
from spolia_kvstore.objects import ObjectKey, ObjectRecord, Tier
from spolia_kvstore.quotas import Tenants
from spolia_kvstore.ram_tier import StoredObject, Upload
from spolia_kvstore.shared_index import SharedIndex
from spolia_kvstore.tiers import Tiers
from spolia_kvstore.verify import check_complete, check_frame, check_record
from spolia_node.logs import get_log

log = get_log(__name__)


class Puts:
    """Uploads to one store, whose parts it moves together. Used from one event loop."""

    def __init__(
        self,
        tiers: Tiers,
        tenants: Tenants,
        claims: Claims,
        index: SharedIndex,
        counters: Counters,
        *,
        name: str,
        max_object_bytes: int,
    ) -> None:
        self._tiers = tiers
        self._tenants = tenants
        self._claims = claims
        self._index = index
        self._counters = counters
        self._name = name
        self._max_object_bytes = max_object_bytes
        self._started_ns = time.time_ns()
        self._replica_numbers = count(1)

    async def begin(self, record: ObjectRecord, claim_owner: str, *, durable: bool = False) -> Upload:
        """Checks the announcement and reserves memory; end it with `finish` or `abort`.

        Raises `InvalidRequest`, `AlreadyStored` (the owner's claim is over then), `Busy`, or `NotSupported` for a
        durability there is no tier for.
        """
        check_record(record, self._max_object_bytes)
        if durable and self._tiers.disk is None:
            raise NotSupported(
                "this store has no disk tier", field="durability", limit="DURABILITY_RAM", actual="DURABILITY_DISK"
            )
        try:
            skipped_file_id = await self._check_new(record, durable=durable)
            await self._keep_quota(record)
            upload = await self._tiers.reserve(record)
        except AlreadyStored:
            await self._keep_promise(record.key, durable=durable)
            if claim_owner:
                await self._claims.release([record.key], claim_owner)
            raise
        upload.skipped_file_id = skipped_file_id
        return upload

    def append_frame(self, upload: Upload, offset: int, data: bytes | memoryview, frame_digest: bytes) -> None:
        """Checks and keeps the next frame. Raises `InvalidRequest` or `DataCorrupt`."""
        with self._noting_damage(upload.record):
            check_frame(upload.record, upload.num_received, offset, data, frame_digest)
        self._tiers.ram.append(upload, data)

    async def finish(self, upload: Upload, *, durable: bool = False) -> ObjectRecord:
        """Checks the whole object and lets it be found, under the replica's name that is returned. Ends its claim.

        Raises `InvalidRequest`, `DataCorrupt`, `AlreadyStored` when another upload of this chunk was faster, or `Busy`
        when the disk could not take it: it is in memory all the same.
        """
        record = upload.record
        check_complete(record, upload.num_received)
        with self._noting_damage(record):
            upload.verifier.finish()
        record = replace(record, replica=f"{self._name}/{self._started_ns:x}-{next(self._replica_numbers)}")
        try:
            await self._keep_quota(record)  # others may have come since the upload began
            stored = await self._let_be_found(upload, record)
        except AlreadyStored:
            await self._keep_promise(record.key, durable=durable)
            raise
        self._counters.puts += 1
        self._tiers.ram.open(stored)  # nothing may evict it before it is as safe as it was promised to be
        try:
            await self._announced(record)
            if durable and not await self._tiers.writes.persist(stored):
                raise _not_durable()
        finally:
            self._tiers.ram.close(stored)
        return record

    def abort(self, upload: Upload) -> None:
        """Frees an upload that did not finish. Does nothing after `finish`."""
        self._tiers.ram.abort(upload)

    async def _check_new(self, record: ObjectRecord, *, durable: bool) -> str:
        """Raises `AlreadyStored` when nothing is gained by an upload. Returns the id of the file that is skipped for
        being slow, if there is one."""
        found = self._tiers.find([record.key]).get(record.key)
        if found is not None and Reader().misses(found.record, found.tier, self._tiers.gate) is None:
            raise AlreadyStored(f"chunk {record.key.chunk_id.hex()} is stored already", field="info.chunk_id")
        elsewhere = await self._index.locate([record.key], with_shared=False)
        for there in elsewhere.values():
            if there.is_on_disk or not durable:
                raise AlreadyStored(
                    f"chunk {record.key.chunk_id.hex()} is stored already, at {there.locations[0].store_id}",
                    field="info.chunk_id",
                )
        return found.row.file_id if found is not None and found.row is not None else ""

    async def _let_be_found(self, upload: Upload, record: ObjectRecord) -> StoredObject:
        """Puts a new object into memory; in the place of one on disk that is skipped for being slow, on disk first."""
        old = self._tiers.row(record.key)
        if old is None:
            return self._tiers.commit(upload, record, upload.verifier.head)
        if old.file_id != upload.skipped_file_id:
            raise AlreadyStored(f"chunk {record.key.chunk_id.hex()} was stored meanwhile", field="info.chunk_id")

        def on_replaced() -> None:
            self._tenants.add(record.key.tenant_id, record.size_bytes - old.record.size_bytes, num_objects=0)
            self._index.say(record.key, Tier.DISK)

        stored = await self._tiers.replace(upload, record, upload.verifier.head, old, on_replaced)
        if stored is None:
            raise Busy("the disk cannot take the object now and keeps the older one", retry_after_ms=1000)
        return stored

    async def _keep_promise(self, key: ObjectKey, *, durable: bool) -> None:
        """Before a Put is told that another was first: makes that one as safe as this one was to be."""
        if not durable:
            return
        stored = self._tiers.ram.find(key)
        if stored is not None:
            is_safe = await self._tiers.writes.persist(stored)
        else:  # its row may have been written without waiting for the disk
            is_safe = self._tiers.disk is not None and await self._tiers.disk.sync()
        if not is_safe:
            raise _not_durable()

    async def _announced(self, record: ObjectRecord) -> None:
        """Tells the shared index and ends the claims on an object; to the end, also when the caller goes away."""

        async def announce() -> None:
            is_told = await self._index.announce(record)
            await self._claims.stored([record.key], is_told=is_told)

        await asyncio.shield(self._index.in_background(announce()))

    async def _keep_quota(self, record: ObjectRecord) -> None:
        """Evicts what a tenant values least of its own until one more object fits its quota. Raises `Busy`."""
        tenant_id, size = record.key.tenant_id, record.size_bytes
        quota = self._tenants.quota(tenant_id)
        if quota.num_bytes and size > quota.num_bytes:
            raise self._tenants.refusal(tenant_id, size)
        while (excess := self._tenants.excess(tenant_id, size)) != Totals():
            victims = self._tiers.lowest_of_tenant(tenant_id, excess)
            if not victims:
                raise self._tenants.refusal(tenant_id, size)
            await self._tiers.evict_everywhere(victims)

    @contextmanager
    def _noting_damage(self, record: ObjectRecord) -> Iterator[None]:
        try:
            yield
        except DataCorrupt as error:
            self._counters.digest_failures += 1
            key = record.key
            log.warning(
                "damaged upload refused", tenant=key.tenant_id, chunk_id=key.chunk_id.hex(), error=error.message
            )
            raise


def _not_durable() -> Busy:
    return Busy(
        "the disk cannot take the object now; it is kept in memory",
        field="durability",
        limit="DURABILITY_RAM",
        actual="DURABILITY_DISK",
        retry_after_ms=1000,
    )
