"""A sequence being decoded: its context, its tail, its answer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from spolia_core.errors import Busy, InternalError
from spolia_engine.context import Context
from spolia_engine.extent import Extent
from spolia_engine.generation import Generation
from spolia_engine.run import SlotRange, coalesce
from spolia_engine.step_plan import Tail

MAX_HEAD_TOKENS = 1024
"""Prompt tokens that a sequence takes with it into its slot. A longer run is read where it lies, by a call of its own:
20 us beside at least 400 of reading."""


class Sequence:
    """Owns its context and its tail until `close`."""

    def __init__(self, context: Context, generation: Generation) -> None:
        """Takes the context. KV that was computed for it alone moves beside the tail, to be attended with it.

        Raises `Busy` where the pool has no room for the tail.
        """
        self.context = context
        self.generation = generation
        self.num_context_tokens = context.num_tokens
        head = _head_of(context)
        most = generation.max_tail_tokens
        try:
            extent = context.pool.open_tail(most, head)
        except Busy:
            if head is None:
                raise
            # Behind a head a tail may take a block more, which is worth no refusal: it is read where it lies instead.
            extent, head = context.pool.open_tail(most), None
        self.tail = Tail(extent, self.num_context_tokens, head=head)
        self.ranges: list[SlotRange] = coalesce(span for span in context.spans if span.run.extent is not head)
        self._num_held = Counter(context.extents)
        self._closed = False

    @property
    def position(self) -> int:
        """Position of the next token to run: the newest token, whose KV is not computed yet."""
        return self.num_context_tokens + self.tail.length

    @property
    def next_token(self) -> int:
        """The newest token."""
        if not self.generation.token_ids:
            raise InternalError("a sequence has no token to run before its first was drawn")
        return self.generation.token_ids[-1]

    @property
    def finished(self) -> bool:
        """Whether the answer has ended."""
        return self.generation.finish_reason is not None

    @property
    def num_new_blocks(self) -> int:
        """Blocks that the next token's KV needs."""
        return self.context.pool.lacking_blocks(self.tail.extent, self.tail.length + 1)

    @property
    def num_own_blocks(self) -> int:
        """Blocks that come free, or may be evicted, when the sequence is closed."""
        return self.tail.extent.num_blocks + sum(extent.num_blocks for extent in self._own_extents())

    @property
    def num_own_tokens(self) -> int:
        """Tokens whose KV only this sequence holds."""
        return self.tail.length + sum(extent.capacity for extent in self._own_extents())

    def _own_extents(self) -> list[Extent]:
        return [extent for extent, count in self._num_held.items() if extent.ref_count == count]

    def make_room(self) -> None:
        """Takes the memory that the next token's KV needs. Raises `Busy` when the pool has none."""
        self.context.pool.grow(self.tail.extent, self.tail.length + 1)

    def close(self) -> None:
        """Releases context and tail. Safe to call twice."""
        if not self._closed:
            self._closed = True
            self.context.close()
            self.context.pool.release(self.tail.extent)


def close_all(sequences: Iterable[Sequence]) -> None:
    """Closes each."""
    for sequence in sequences:
        sequence.close()


def _head_of(context: Context) -> Extent | None:
    """The extent of what was computed for this context, where it is short, whole and nobody else's to move."""
    live = context.live
    if live is None or live.num_tokens > MAX_HEAD_TOKENS or live.extent.slot is not None:
        return None
    is_whole = live.start == 0 and live.num_tokens == live.extent.capacity
    is_all_read = is_whole and live.num_tokens == sum(
        span.num_tokens for span in context.spans if span.run.extent is live.extent
    )
    return live.extent if is_all_read else None
