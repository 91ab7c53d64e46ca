"""Whatever tails do, in whatever order, what is warm is zero, counted and free."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from warm_worlds import SLOT_BYTES, filled, pool_of

from spolia_core.errors import Busy
from spolia_engine.extent import BlockState, Extent


class WarmTails(RuleBasedStateMachine):
    """Sequences of several tenants in a pool that is often full: none finds a number that it did not write."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = pool_of(num_blocks=40, max_warm_bytes=6 * SLOT_BYTES)
        self.open: list[tuple[Extent, Extent | None, int, float]] = []  # tail, head, tokens written, whose
        self.others: list[Extent] = []
        self.count = 0

    @rule(head_tokens=st.integers(0, 20), tail_tokens=st.integers(1, 90))
    def opens(self, head_tokens: int, tail_tokens: int) -> None:
        self.count += 1
        try:
            head = filled(self.pool, head_tokens, float(self.count)) if head_tokens else None
        except Busy:
            return
        self.open.append((self.pool.open_tail(tail_tokens, head), head, 0, float(self.count)))

    @precondition(lambda self: self.open)
    @rule(data=st.data(), num_tokens=st.integers(1, 20))
    def writes(self, data: st.DataObject, num_tokens: int) -> None:
        at = data.draw(st.integers(0, len(self.open) - 1))
        tail, head, before, number = self.open[at]
        after = min(tail.capacity, before + num_tokens)
        try:
            self.pool.grow(tail, after)
        except Busy:
            return
        tail.key[:, :, before:after], tail.value[:, :, before:after] = number, -number
        self.open[at] = tail, head, after, number

    @precondition(lambda self: self.open)
    @rule(data=st.data(), head_first=st.booleans())
    def closes(self, data: st.DataObject, head_first: bool) -> None:
        tail, head, _, _ = self.open.pop(data.draw(st.integers(0, len(self.open) - 1)))
        extents = [extent for extent in (head, tail) if extent is not None]
        for extent in extents if head_first else reversed(extents):
            self.pool.release(extent)

    @rule(num_tokens=st.integers(1, 100))
    def takes(self, num_tokens: int) -> None:
        try:
            self.others.append(self.pool.allocate(num_tokens))
        except Busy:
            return

    @precondition(lambda self: self.others)
    @rule()
    def gives(self) -> None:
        self.pool.release(self.others.pop())

    @invariant()
    def a_slot_holds_what_its_sequence_wrote_and_zeros(self) -> None:
        for tail, head, num_written, number in self.open:
            slot, end = tail.slot, num_written + (head.capacity if head else 0)
            assert slot is not None
            assert bool((slot.key[:, :, :end] == number).all())
            assert bool((slot.value[:, :, :end] == -number).all())
            assert not slot.key[:, :, end:].any()
            assert not slot.value[:, :, end:].any()
            assert end <= slot.num_written

    @invariant()
    def the_ledger_adds_up(self) -> None:
        self.pool.check_invariants()

    def teardown(self) -> None:
        for tail, head, _, _ in self.open:
            for extent in (tail, head):
                if extent is not None:
                    self.pool.release(extent)
        for extent in self.others:
            self.pool.release(extent)
        self.pool.check_invariants()
        assert self.pool.counts()[BlockState.FREE] == 40
        assert self.pool._slabs.num_slabs == 0


TestWarmTails = WarmTails.TestCase
TestWarmTails.settings = settings(max_examples=50, stateful_step_count=40, deadline=None)
