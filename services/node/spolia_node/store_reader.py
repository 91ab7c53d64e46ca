"""Objects from several stores, in the order asked; one that cannot be had where it should be is had elsewhere.

    ids ─▶ a stream for each home ─▶ the next item is taken from the stream of the id that is due
                │ broken: all that it still owes     │ damaged, or another store has it: that id alone
                └────────▶ streams to other stores ◀─┘

A stream that is not due waits by flow control, so little is held here besides the object that is arriving. An object
is always read from its first byte: its digest speaks of one replica, and bytes of two are never joined.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

from spolia.v1.kvstore_pb2 import GetRequest
from spolia_core.errors import DataCorrupt, SpoliaError, Unavailable
from spolia_core.reuse import MissReason
from spolia_node.deadline import Deadline
from spolia_node.frame_messages import GetCall, open_get
from spolia_node.store_address import StoreAddress
from spolia_node.store_placement import in_order, open_stores
from spolia_node.store_routes import StoreRoutes
from spolia_node.store_stream import FetchedChunk, OnBytes, fetched
from spolia_node.tracing import trace_metadata

_SPOILED = (MissReason.DIGEST, MissReason.UNREADABLE)
"""This replica is of no use; another may be."""


class StoreReader:
    """One Get. `read` may be called once."""

    def __init__(
        self,
        routes: StoreRoutes,
        ids: Sequence[bytes],
        request_for: Callable[[Sequence[bytes]], GetRequest],
        deadline: Deadline,
        on_bytes: OnBytes | None = None,
    ) -> None:
        self._routes = routes
        self._request_for = request_for
        self._deadline = deadline
        self._on_bytes = on_bytes
        stores = routes.everyone()
        to_try = open_stores(stores)
        self._is_sole = len(stores) == 1
        self._wanted = [_Wanted(chunk_id, in_order(chunk_id, to_try)) for chunk_id in ids]
        self._streams: list[_Stream] = []

    async def read(self) -> AsyncGenerator[FetchedChunk, None]:
        """One item per id, in order, each as soon as it is whole. Closing it ends every call."""
        try:
            self._deadline.check("the call to the store")
            self._move(range(len(self._wanted)))
            for index in range(len(self._wanted)):
                yield await self._next(index)
            for stream in self._streams:
                await self._finish(stream)
        finally:
            for stream in self._streams:
                await stream.close()

    async def _next(self, index: int) -> FetchedChunk:
        """The object, or why no store gave it. Raises what its last store raised when none could be asked."""
        wanted = self._wanted[index]
        while wanted.stream is not None:
            stream = wanted.stream
            try:
                with self._routes.watching(stream.store):
                    chunk = await stream.next()
            except (Unavailable, DataCorrupt) as error:
                await self._leave(stream, error)
                continue
            if chunk.miss is None:
                return chunk
            wanted.missed(chunk, self._routes.holders(chunk.entry))
            wanted.stream = None
            if chunk.miss in _SPOILED:
                self._move([index])
            elif chunk.miss is MissReason.NOT_FOUND:
                self._move([index], only_holders=True)
        if wanted.miss is None:
            assert wanted.error is not None, "it was asked for somewhere"
            raise wanted.error
        return wanted.miss

    async def _leave(self, stream: _Stream, error: SpoliaError) -> None:
        """Has everything that a broken stream still owes from other stores."""
        self._streams.remove(stream)
        await stream.close()
        for index in stream.owed:
            self._wanted[index].error = error
        self._move(stream.owed)

    def _move(self, indices: Iterable[int], *, only_holders: bool = False) -> None:
        """Opens streams to the next store of each id, one for each store; an id that has none left gets none."""
        places: defaultdict[StoreAddress, list[int]] = defaultdict(list)
        for index in indices:
            self._wanted[index].stream = None
            store = self._wanted[index].next_store(only_holders)
            if store is not None:
                places[store].append(index)
        for store, group in places.items():
            stream = self._open(store, group)
            self._streams.append(stream)
            for index in group:
                self._wanted[index].stream = stream

    def _open(self, store: StoreAddress, indices: Sequence[int]) -> _Stream:
        ids = [self._wanted[index].chunk_id for index in indices]
        with self._routes.reaching(store, self._deadline) as channel:
            call = open_get(channel, self._request_for(ids), self._deadline.remaining(), trace_metadata())
        return _Stream(store, indices, ids, call, self._on_bytes)

    async def _finish(self, stream: _Stream) -> None:
        """Sees a stream end that has given all it was asked for. What is wrong with its end hurts nobody any more, and
        is an error only of a sole store."""
        try:
            with self._routes.watching(stream.store):
                await stream.finish()
        except SpoliaError:
            if self._is_sole:
                raise


@dataclass(slots=True)
class _Wanted:
    """An id, and how far the search for it has come."""

    chunk_id: bytes
    order: list[StoreAddress]
    holders: list[StoreAddress] = field(default_factory=list)
    """Stores that were said to have it."""
    tried: set[str] = field(default_factory=set)
    """Addresses."""
    stream: _Stream | None = None
    miss: FetchedChunk | None = None
    """The answer when nobody has it: the first that says more than that it was not found."""
    error: SpoliaError | None = None

    def missed(self, chunk: FetchedChunk, holders: Iterable[StoreAddress]) -> None:
        """A store answered without the object, and named `holders`."""
        if self.miss is None or self.miss.miss is MissReason.NOT_FOUND:
            self.miss = chunk
        self.holders += holders

    def next_store(self, only_holders: bool) -> StoreAddress | None:
        """Where to look now: with a holder not asked yet, else, unless `only_holders`, at the next where it belongs.

        One that is asked in that order and knows no holder speaks for all behind it: it would have the object.
        """
        for store in self.holders if only_holders else [*self.holders, *self.order]:
            if store.address not in self.tried:
                self.tried.add(store.address)
                return store
        return None


class _Stream:
    """A Get call on one store, for some of the ids."""

    def __init__(
        self,
        store: StoreAddress,
        indices: Sequence[int],
        ids: Sequence[bytes],
        call: GetCall,
        on_bytes: OnBytes | None,
    ) -> None:
        self.store = store
        self.owed = deque(indices)
        """What has not come yet."""
        self._call = call
        self._chunks = fetched(call, ids, None if on_bytes is None else lambda *came: on_bytes(self.owed[0], *came))

    async def next(self) -> FetchedChunk:
        """The next item, its index that of the whole Get."""
        chunk = replace(await anext(self._chunks), index=self.owed[0])
        self.owed.popleft()
        return chunk

    async def finish(self) -> None:
        """Returns when the call has ended. Raises `DataCorrupt` when more comes than was asked for."""
        async for _ in self._chunks:
            raise AssertionError("an item more than there were ids")

    async def close(self) -> None:
        """Ends the call. Idempotent."""
        self._call.cancel()
        await self._chunks.aclose()
