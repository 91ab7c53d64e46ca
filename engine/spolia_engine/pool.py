"""The pool: who owns KV memory, counted in blocks.

    free ──allocate──▶ referenced ◀──retain── cached
      ▲  └─allocate─▶ in transfer ──arrive──▶ referenced
      └──────── release / evict ─────────────┘
    (lent: memory held by a peer under a lease; no move leads there yet)

The ledger: free + referenced + cached + in transfer + lent = pool, at all times. On a CPU an extent is memory of its
own, `[layer][kv_head][token][head_dim]`, so a run is contiguous and attention reads it as it lies; the ledger counts
blocks all the same, so the budget means the same on every device. On a device all memory is taken at start
(`slot_memory`), blocks are its pages, and an extent is as few ranges of them as are free: whatever is free suffices.
"""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count, pairwise

import torch
from torch import Tensor

from spolia_core.chunk_object import KvShape
from spolia_core.errors import Busy
from spolia_engine.extent import ALLOWED_MOVES, BlockState, Extent, Piece
from spolia_engine.idle_memory import IdleMemory
from spolia_engine.kept_memory import KeptMemory
from spolia_engine.page_arena import PageRange
from spolia_engine.slab import Slabs, Slot
from spolia_engine.slot_memory import SlotMemory

DEFAULT_BLOCK_SIZE = 8
"""Tokens. What a sequence ends in is half empty on average. Of 32 short answers behind 4,096 shared tokens that is
9 % of all they hold with blocks of 16, 4 % with 8. Smaller ones cost their counting only: an extent is one piece of
memory, however many blocks it counts for."""
TORCH_DTYPE = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class Pool:
    """Hands out extents within a budget of blocks. Thread-safe; `on_evict` is called under its lock."""

    def __init__(
        self,
        shape: KvShape,
        *,
        num_blocks: int,
        block_size: int = DEFAULT_BLOCK_SIZE,
        device: torch.device | str = "cpu",
        on_evict: Callable[[Extent], None] | None = None,
        slots: SlotMemory | None = None,
        max_warm_bytes: int | None = None,
    ) -> None:
        """`slots`: memory that extents are ranges of, its pages the blocks; None: each has memory of its own.

        `max_warm_bytes` of free memory stay in pages for the next tails (`slab`), fewer where fewer are free; None: the
        share that `idle_memory` says.
        """
        assert slots is None or (slots.arena.num_pages, slots.page_size) == (num_blocks, block_size)
        self.shape = shape
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.device = torch.device(device)
        self.dtype = TORCH_DTYPE[shape.dtype]
        self.on_evict = on_evict
        self.on_room: Callable[[], None] | None = None
        """Called under the lock when blocks came free, or may be evicted now."""
        self.lock = threading.RLock()
        self._counts: Counter[BlockState] = Counter({BlockState.FREE: num_blocks})
        self._extents: set[Extent] = set()
        self._cached: OrderedDict[Extent, None] = OrderedDict()  # by `used_at`
        self._uses = count(1)
        self._sparing = threading.local()
        self._slots = slots
        self._kept = KeptMemory() if self.device.type == "cpu" else None
        self._slabs = Slabs(shape, self.dtype, self.device)
        self._block_bytes = block_size * shape.bytes_per_token
        self._idle = IdleMemory(self._slabs, self._kept, num_blocks * self._block_bytes, max_warm_bytes)
        self._limit_idle()

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that `num_tokens` tokens take."""
        return -(-num_tokens // self.block_size)

    @property
    def available_blocks(self) -> int:
        """Blocks an allocation of this thread could get: free ones, and cached ones unless it spares the cache."""
        with self.lock:
            return self._counts[BlockState.FREE] + (0 if self._is_sparing else self._counts[BlockState.CACHED])

    @contextmanager
    def sparing_cache(self) -> Iterator[None]:
        """What this thread does inside leaves the cache as it was: for work that must cost no request its hits.

        Allocations evict nothing, and raise `Busy` where free blocks alone do not suffice. Releases are no use: an
        extent goes back to its place among the cached ones.
        """
        self._sparing.now = True
        try:
            yield
        finally:
            self._sparing.now = False

    @property
    def _is_sparing(self) -> bool:
        return getattr(self._sparing, "now", False)

    @property
    def kept_bytes(self) -> int:
        """Memory of free blocks that this process holds on to: an eighth of the pool at most."""
        with self.lock:
            return 0 if self._kept is None else self._kept.num_bytes

    def counts(self) -> dict[BlockState, int]:
        """Blocks by state; adds up to `num_blocks`."""
        with self.lock:
            return {state: self._counts[state] for state in BlockState}

    def check_room(self, num_blocks: int) -> None:
        """Raises `Busy` where allocations of `num_blocks` blocks in all could not succeed now."""
        available = self.available_blocks
        if num_blocks > available:
            raise Busy(
                f"the pool has {available} blocks available, {num_blocks} are needed",
                field="pool",
                limit=f"{available} blocks",
                actual=f"{num_blocks} blocks",
                # Waiting helps only where the pool could ever hold this much.
                retry_after_ms=500 if num_blocks <= self.num_blocks else 0,
            )

    def allocate(self, num_tokens: int, *, in_transfer: bool = False) -> Extent:
        """An extent for `num_tokens` ≥ 1 tokens with one reference, its memory uninitialised.

        Evicts cached extents when needed. Raises `Busy`, with nothing held, when referenced memory leaves no room.
        """
        if num_tokens < 1:
            raise ValueError(f"an extent holds at least one token, not {num_tokens}")
        needed = self.blocks_for(num_tokens)
        with self.lock:
            if self._slots is not None:
                extent = Extent(self._slots.pieces(self._pages(self._slots, needed), num_tokens), needed)
            else:
                self._make_room(needed)
                key, value = (self._memory(width, num_tokens) for width in (self.shape.head_dim, self.shape.v_dim))
                extent = Extent((Piece(0, key, value),), needed)
            extent.ref_count = 1
            self._extents.add(extent)
            self._move(extent, BlockState.IN_TRANSFER if in_transfer else BlockState.REFERENCED)
            return extent

    def open_tail(self, num_tokens: int, head: Extent | None = None) -> Extent:
        """An extent for `num_tokens` ≥ 1 tokens that takes its blocks as it is written: `grow` it before each.

        It lies in a slot of a slab, right behind `head`, KV that the writer alone reads: that is moved there, and its
        blocks stay as they are. Holds one reference, and no block yet.

        In the memory of a device it takes all its blocks now: graphs read where they were told it lies. `head` stays
        where it is but for what it has in a page that is not full: the tail's first page begins with a copy of that.
        Raises `Busy` then, as `allocate` does.
        """
        if num_tokens < 1:
            raise ValueError(f"a tail holds at least one token, not {num_tokens}")
        if self._slots is not None:
            with self.lock:
                return self._open_in_slots(self._slots, num_tokens, head)
        num_before = 0 if head is None else head.capacity
        num_spare = 0 if head is None else head.num_blocks * self.block_size - num_before
        with self.lock:
            slot = self._slabs.take(num_before + num_tokens)
        slot.num_written = num_before + num_spare
        if head is not None:
            self._move_into(head, slot)
        end = num_before + num_tokens
        piece = Piece(0, slot.key[:, :, num_before:end], slot.value[:, :, num_before:end])
        extent = Extent((piece,), 0, slot)
        extent.num_spare = num_spare
        extent.ref_count = 1
        with self.lock:
            self._extents.add(extent)
            self._move(extent, BlockState.REFERENCED)
        return extent

    def blocks_to_open(self, num_tokens: int) -> int:
        """Blocks that a tail for `num_tokens` tokens takes until its first is written, at most.

        In the memory of a device it may take one more behind a head than without.
        """
        return 1 if self._slots is None else self.blocks_for(num_tokens) + 1

    def grow(self, extent: Extent, num_tokens: int) -> None:
        """Takes the blocks that `num_tokens` tokens of a tail need, as many as it lacks.

        Evicts cached extents when needed. Raises `Busy`, with nothing changed, when referenced memory leaves no room.
        """
        assert extent.slot is not None or self._slots is not None, "only a tail grows"
        assert num_tokens <= extent.capacity, (num_tokens, extent.capacity)
        with self.lock:
            lacking = self.lacking_blocks(extent, num_tokens)
            if not lacking:
                return
            self._make_room(lacking)
            extent.num_blocks += lacking
            self._counts[BlockState.FREE] -= lacking
            self._counts[extent.state] += lacking
            if extent.slot is not None:
                extent.slot.num_written += lacking * self.block_size
            self._limit_idle()

    def lacking_blocks(self, extent: Extent, num_tokens: int) -> int:
        """Blocks that a tail of `num_tokens` tokens needs and has not."""
        return max(0, self.blocks_for(max(0, num_tokens - extent.num_spare)) - extent.num_blocks)

    def arrive(self, extent: Extent) -> None:
        """The transfer into `extent` ended well."""
        with self.lock:
            self._move(extent, BlockState.REFERENCED)

    def retain(self, extent: Extent) -> None:
        """Adds a reference; a cached extent becomes referenced."""
        with self.lock:
            if extent.state is BlockState.FREE:
                raise AssertionError("extent retained after its memory went")
            extent.ref_count += 1
            if extent.state is BlockState.CACHED:
                del self._cached[extent]
                self._move(extent, BlockState.REFERENCED)

    def release(self, extent: Extent) -> None:
        """Drops a reference. Without any left the extent is cached where it holds chunks, freed where it does not."""
        out_of_slot = self._copy_out_of_slot(extent)
        with self.lock:
            if extent.ref_count < 1:
                raise AssertionError("extent released more often than retained")
            if not self._is_sparing:
                extent.used_at = next(self._uses)
            extent.ref_count -= 1
            if extent.ref_count:
                return
            if extent.chunk_ids and extent.state is BlockState.REFERENCED:
                if extent.slot is not None:  # nobody reads it: it makes place for the next sequence
                    extent.pieces = (out_of_slot or self._copied(extent),)
                    self._leave_slot(extent)
                self._move(extent, BlockState.CACHED)
                self._cached[extent] = None
                if self._is_sparing:  # its place is among the others: no use is newer than one that counts
                    for later in [cached for cached in self._cached if cached.used_at > extent.used_at]:
                        self._cached.move_to_end(later)
            else:
                self._free(extent)
            self._say_room()

    def forget_chunk(self, extent: Extent, chunk_id: bytes) -> None:
        """`chunk_id` no longer lives in `extent`; a cached extent without chunks is freed."""
        with self.lock:
            extent.chunk_ids.discard(chunk_id)
            if extent.state is BlockState.CACHED and not extent.chunk_ids:
                del self._cached[extent]
                self._free(extent)

    def check_invariants(self) -> None:
        """Asserts the ledger: counts equal what the extents say, and add up to the pool."""
        with self.lock:
            seen: Counter[BlockState] = Counter()
            for extent in self._extents:
                seen[extent.state] += extent.num_blocks
                held = extent.state in (BlockState.REFERENCED, BlockState.IN_TRANSFER)
                assert held == (extent.ref_count > 0), (extent.state, extent.ref_count)
                assert (extent.state is BlockState.CACHED) == (extent in self._cached)
                assert extent.state is not BlockState.CACHED or extent.chunk_ids
            seen[BlockState.FREE] = self.num_blocks - sum(seen.values())
            assert seen[BlockState.FREE] >= 0
            assert all(seen[state] == self._counts[state] for state in BlockState), (seen, self._counts)
            uses = [extent.used_at for extent in self._cached]
            assert uses == sorted(uses)
            self._slabs.check_invariants()
            assert self._slabs.warm_bytes <= seen[BlockState.FREE] * self._block_bytes, "what is warm is free"
            if self._slots is not None:
                self._slots.arena.check_invariants()
                assert self._slots.arena.num_free == seen[BlockState.FREE], "every block is a page"
                taken = sorted(r for extent in self._extents for r in self._slots.pages_of(extent.pieces))
                assert all(sum(one) <= other[0] for one, other in pairwise(taken)), "a page has one extent"
                assert sum(num_pages for _, num_pages in taken) == self.num_blocks - seen[BlockState.FREE]

    def _make_room(self, num_blocks: int) -> None:
        self.check_room(num_blocks)
        while self._counts[BlockState.FREE] < num_blocks:
            self._evict(next(iter(self._cached)))

    def _pages(self, slots: SlotMemory, num_pages: int) -> list[PageRange]:
        """So many pages; evicts until there are. Raises `Busy` where referenced memory leaves no room, and then only.

        Rather than take many short ranges it evicts on, until as many blocks went as are asked for.
        """
        self._make_room(num_pages)
        num_left = 0 if self._is_sparing else num_pages
        while num_left > 0 and self._cached and slots.is_in_pieces(num_pages):
            extent = next(iter(self._cached))
            num_left -= extent.num_blocks
            self._evict(extent)
        return slots.take(num_pages)

    def _open_in_slots(self, slots: SlotMemory, num_tokens: int, head: Extent | None) -> Extent:
        num_copied = 0 if head is None else head.capacity % self.block_size
        needed = self.blocks_for(num_copied + num_tokens)
        ranges = self._pages(slots, needed)
        if head is not None and num_copied:
            (copied,) = head.parts(head.capacity - num_copied, head.capacity)  # of one page, so of one piece
            (copy,) = slots.pieces(ranges[:1], num_copied)
            copy.key.copy_(copied.key)
            copy.value.copy_(copied.value)
        extent = Extent(slots.pieces(ranges, num_tokens, num_copied), needed)
        extent.ref_count = 1
        self._extents.add(extent)
        self._move(extent, BlockState.REFERENCED)
        return extent

    def _move_into(self, extent: Extent, slot: Slot) -> None:
        """Moves an extent's KV to the beginning of a slot that was just taken, and leaves that when it raises.

        Those who read where it was may go on: it stays as it is. Copies without the lock, which may take as long as
        others' step: the caller's reference keeps the extent, and nobody else moves it.
        """
        key, value = slot.key[:, :, : extent.capacity], slot.value[:, :, : extent.capacity]
        try:
            assert extent.slot is None
            assert extent.state is BlockState.REFERENCED
            key.copy_(extent.key)
            value.copy_(extent.value)
        except BaseException:
            with self.lock:
                self._slabs.leave(slot)
            raise
        with self.lock:
            extent.pieces, extent.slot = (Piece(0, key, value),), slot
            slot.users += 1

    def _copy_out_of_slot(self, extent: Extent) -> Piece | None:
        """A copy of what the caller is about to leave cached, if it lies in a slot: made without the lock, as nobody
        changes what chunks are registered in. None where others read it: then it stays where it is.
        """
        with self.lock:
            stays = extent.slot is None or not extent.chunk_ids or extent.ref_count > 1
        return None if stays else self._copied(extent)

    def _copied(self, extent: Extent) -> Piece:
        """The extent's KV once more, in memory of its own."""
        with self.lock:
            key, value = (self._memory(width, extent.capacity) for width in (self.shape.head_dim, self.shape.v_dim))
        key.copy_(extent.key)
        value.copy_(extent.value)
        return Piece(0, key, value)

    def _leave_slot(self, extent: Extent) -> None:
        if extent.slot is not None:
            slot, extent.slot = extent.slot, None
            self._slabs.leave(slot)

    def _memory(self, width: int, num_tokens: int) -> Tensor:
        layers, heads = self.shape.num_layers, self.shape.num_kv_heads
        size = (layers, heads, num_tokens, width)
        if self._kept is None:
            return torch.empty(size, dtype=self.dtype, device=self.device)
        return self._kept.take(size, self.dtype)

    def _evict(self, extent: Extent) -> None:
        del self._cached[extent]
        if self.on_evict:
            self.on_evict(extent)
        extent.chunk_ids.clear()
        self._free(extent)

    def _free(self, extent: Extent) -> None:
        self._move(extent, BlockState.FREE)
        self._extents.discard(extent)
        self._leave_slot(extent)
        if self._slots is not None:
            self._slots.give_back(extent.pieces)
        extent.pieces = ()  # the memory goes now, whoever still holds the handle
        self._limit_idle()

    def _say_room(self) -> None:
        if self.on_room is not None:
            self.on_room()

    def _move(self, extent: Extent, state: BlockState) -> None:
        if (extent.state, state) not in ALLOWED_MOVES:
            raise AssertionError(f"no move from {extent.state} to {state}")
        self._counts[extent.state] -= extent.num_blocks
        self._counts[state] += extent.num_blocks
        extent.state = state
        self._limit_idle()

    def _limit_idle(self) -> None:
        self._idle.limit(self._counts[BlockState.FREE] * self._block_bytes)
