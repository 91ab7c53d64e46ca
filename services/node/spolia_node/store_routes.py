"""Which stores a call goes to: the home of each chunk, the next where that is away, or every one."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import grpc

from spolia.v1.kvstore_pb2 import LookupEntry
from spolia_core.errors import DataCorrupt, DeadlineExceeded, SpoliaError, Unavailable
from spolia_node.calls import call_errors
from spolia_node.channels import ChannelPool
from spolia_node.deadline import Deadline
from spolia_node.frame_messages import stub_of
from spolia_node.store_address import StoreAddress, Stores
from spolia_node.store_placement import in_order, open_stores

if TYPE_CHECKING:
    from spolia.v1.kvstore_pb2_grpc import KVStoreServiceAsyncStub  # a name for types, absent at run time

T = TypeVar("T")
OnLost = Callable[[str], None]
"""Told the node id of a store that did not answer, while there are others to turn to."""

Ask = Callable[["KVStoreServiceAsyncStub", Sequence[bytes]], Awaitable[Sequence[T]]]
"""Asks one store about ids of its own; one answer per id."""


class StoreRoutes:
    """Finds stores, calls them, and turns to others when one is away."""

    def __init__(self, channels: ChannelPool, stores: Stores, on_lost: OnLost | None = None) -> None:
        self._channels = channels
        self._stores = stores
        self._on_lost = on_lost

    def everyone(self) -> list[StoreAddress]:
        """Every store, also one that is closed for now. Raises `Unavailable` when none is known."""
        stores = list(self._stores())
        if not stores:
            raise Unavailable("no store is known")
        return stores

    def orders(self, ids: Sequence[bytes]) -> list[list[StoreAddress]]:
        """For each chunk all stores to try, home first. Raises `Unavailable` when none is known."""
        stores = open_stores(self.everyone())
        return [in_order(chunk_id, stores) for chunk_id in ids]

    @contextmanager
    def calling(self, store: StoreAddress, deadline: Deadline) -> Iterator[KVStoreServiceAsyncStub]:
        """As `reaching`, with what calls the store's methods."""
        with self.reaching(store, deadline) as channel:
            yield stub_of(channel)

    @contextmanager
    def reaching(self, store: StoreAddress, deadline: Deadline) -> Iterator[grpc.aio.Channel]:
        """Around a call to one store: raises as `watching` does, and `DeadlineExceeded` when no time is left."""
        deadline.check("the call to the store")
        with self.watching(store):
            yield self._channels.get(store.address, "kvstore")

    @contextmanager
    def watching(self, store: StoreAddress) -> Iterator[None]:
        """Around what a store may fail: raises as `call_errors` does, and notes that a store was lost.

        That is of no use where it is the only one.
        """
        try:
            with call_errors(store.address):
                yield
        except Unavailable:
            if self._on_lost is not None and store.node_id and len(self._stores()) > 1:
                self._on_lost(store.node_id)
            raise

    async def ask(self, ids: Sequence[bytes], ask: Ask[T], deadline: Deadline) -> list[T]:
        """Asks for each id where it belongs, all stores at once; answers in the order of `ids`.

        Where a store is away its ids go to the next of each; raises `Unavailable` for ids that none is left for.
        """
        return await self._ask_first(self.orders(ids), ids, ask, deadline)

    async def ask_at(self, store: StoreAddress, ids: Sequence[bytes], ask: Ask[T], deadline: Deadline) -> list[T]:
        """Asks one store, and no other where it is away."""
        answers = await self._on(store, lambda stub: ask(stub, ids), deadline)
        if len(answers) != len(ids):
            raise DataCorrupt(f"the store at {store.address} answered {len(answers)} of {len(ids)} chunks")
        return list(answers)

    def holders(self, entry: LookupEntry) -> list[StoreAddress]:
        """The stores that an entry names as holders, in its order, those that are closed for now last."""
        if not entry.locations:
            return []
        known = {store.node_id: store for store in self._stores()}
        stores = [known.get(at.node_id) or StoreAddress(at.node_id, at.address) for at in entry.locations]
        return sorted(stores, key=lambda store: not store.is_open)

    async def ask_every(
        self, ask: Callable[[KVStoreServiceAsyncStub], Awaitable[T]], deadline: Deadline
    ) -> dict[StoreAddress, T | SpoliaError]:
        """Asks every store at once: its answer, or why it could not be asked. A sole store's failure is raised.

        Raises what a store that was reached raised.
        """
        stores = self.everyone()
        if len(stores) == 1:
            return {stores[0]: await self._on(stores[0], ask, deadline)}
        answers = await together([self._answer_of(store, ask, deadline) for store in stores])
        return dict(zip(stores, answers, strict=True))

    async def _ask_first(
        self, orders: Sequence[Sequence[StoreAddress]], ids: Sequence[bytes], ask: Ask[T], deadline: Deadline
    ) -> list[T]:
        """Asks the first store of each id's order."""
        places: defaultdict[StoreAddress, list[int]] = defaultdict(list)
        for index, order in enumerate(orders):
            places[order[0]].append(index)
        answers = await together(
            [
                self._ask_or_pass_on(store, [orders[i][1:] for i in indices], [ids[i] for i in indices], ask, deadline)
                for store, indices in places.items()
            ]
        )
        by_index = {
            index: answer
            for indices, group in zip(places.values(), answers, strict=True)
            for index, answer in zip(indices, group, strict=True)
        }
        return [by_index[index] for index in range(len(ids))]

    async def _ask_or_pass_on(
        self,
        store: StoreAddress,
        others: Sequence[Sequence[StoreAddress]],
        ids: list[bytes],
        ask: Ask[T],
        deadline: Deadline,
    ) -> list[T]:
        try:
            return await self.ask_at(store, ids, ask, deadline)
        except Unavailable:
            if not others[0]:  # nor is another left for any of these ids
                raise
            return await self._ask_first(others, ids, ask, deadline)

    async def _answer_of(
        self, store: StoreAddress, ask: Callable[[KVStoreServiceAsyncStub], Awaitable[T]], deadline: Deadline
    ) -> T | SpoliaError:
        try:
            return await self._on(store, ask, deadline)
        except (Unavailable, DeadlineExceeded) as error:
            return error

    async def _on(
        self, store: StoreAddress, ask: Callable[[KVStoreServiceAsyncStub], Awaitable[T]], deadline: Deadline
    ) -> T:
        with self.calling(store, deadline) as stub:
            return await ask(stub)


async def together(work: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """Results in order, all run at once. When one raises, or the caller goes, the others are ended first."""
    if len(work) == 1:
        return [await work[0]]
    tasks = [asyncio.ensure_future(each) for each in work]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
