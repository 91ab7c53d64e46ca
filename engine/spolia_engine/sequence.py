"""A sequence being decoded: its context, its tail, its answer."""

from __future__ import annotations

from spolia_core.errors import InternalError
from spolia_engine.context import Context
from spolia_engine.generation import Generation
from spolia_engine.pool import Extent
from spolia_engine.run import SlotRange
from spolia_engine.step_plan import Tail


class Sequence:
    """Owns its context and its tail extent until `close`."""

    def __init__(self, context: Context, generation: Generation, tail_extent: Extent) -> None:
        self.context = context
        self.generation = generation
        self.num_context_tokens = context.num_tokens
        self.ranges: list[SlotRange] = context.ranges
        self.tail = Tail(tail_extent, rope_base=self.num_context_tokens)
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

    def close(self) -> None:
        """Releases context and tail. Safe to call twice."""
        if not self._closed:
            self._closed = True
            self.context.close()
            self.context.pool.release(self.tail.extent)
