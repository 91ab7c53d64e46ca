"""The RAM tier against a dict that obeys the same rules slowly."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from kvstore_worlds import make_record

from spolia_core.digests import FRAME_BYTES
from spolia_core.errors import AlreadyStored
from spolia_kvstore.ram_tier import RamTier, StoredObject, Upload
from spolia_kvstore.usage import Usage

BUDGET, BLOCK = 100, 5
HALF_LIFE_S = 50.0


def anything(stored: StoredObject) -> bool:
    return True


def number_of(stored: StoredObject) -> int:
    return int.from_bytes(stored.record.key.chunk_id, "big")


def reserved(ram: RamTier, number: int, size: int) -> Upload:
    upload = ram.reserve(make_record(number, size))
    assert upload is not None
    return upload


def put(ram: RamTier, number: int, size: int, now: float = 0.0, cost: float = 0.0) -> StoredObject:
    upload = reserved(ram, number, size)
    ram.append(upload, bytes([number]) * size)
    return ram.commit(upload, upload.record, Usage(now, now, log_cost=cost))


def victims(ram: RamTier, size: int, may_go: Callable[[StoredObject], bool] = anything) -> list[int] | None:
    chosen = ram.victims(ram.missing_bytes(size), may_go)
    return None if chosen is None else [number_of(stored) for stored in chosen]


def full_tier() -> tuple[RamTier, list[StoredObject]]:
    """Four objects of 25 bytes, the first the oldest, and no room."""
    ram = RamTier(BUDGET, HALF_LIFE_S, BLOCK)
    return ram, [put(ram, number, 25, now=10.0 * number) for number in range(4)]


def test_the_lowest_rank_goes_first_and_choosing_changes_nothing() -> None:
    ram, stored = full_tier()
    ram.use(stored[0], now=40.0, is_hit=True)
    for _ in range(2):
        assert victims(ram, 50) == [1, 2]
    assert len(ram) == 4
    ram.check_invariants()


def test_what_is_dear_to_compute_outlives_what_was_used_later() -> None:
    ram = RamTier(BUDGET, HALF_LIFE_S, BLOCK)
    put(ram, 1, 50, now=0.0, cost=3.0)
    put(ram, 2, 50, now=2 * HALF_LIFE_S, cost=0.0)
    assert victims(ram, 50) == [2]


def test_neither_what_is_read_nor_what_may_not_go_is_chosen() -> None:
    ram, stored = full_tier()
    ram.open(stored[1])
    pinned = stored[0]
    assert victims(ram, 50, lambda each: each is not pinned) == [2, 3]
    assert victims(ram, 51, lambda each: each is not pinned) is None
    assert victims(ram, 76) is None, "one is read"
    ram.close(stored[1])
    assert victims(ram, 76) == [0, 1, 2, 3]


def test_what_ranks_too_high_is_neither_chosen_nor_looked_at() -> None:
    ram, stored = full_tier()
    asked: list[int] = []

    def may_go(each: StoredObject) -> bool:
        asked.append(number_of(each))
        return True

    rank = ram.rank_of(stored[2])
    assert ram.victims(ram.missing_bytes(50), may_go, below_rank=rank) == stored[:2]
    assert ram.victims(ram.missing_bytes(75), may_go, below_rank=rank) is None
    assert ram.victims(ram.missing_bytes(25), may_go, below_rank=ram.rank_of(stored[0])) is None
    assert asked == [0, 1, 0, 1]
    ram.check_invariants()


def test_an_object_with_room_needs_no_victim() -> None:
    ram = RamTier(BUDGET, HALF_LIFE_S, BLOCK)
    put(ram, 1, 50)
    assert victims(ram, 50) == []


def test_an_object_larger_than_the_budget_is_refused_without_a_hint_to_retry() -> None:
    ram, _ = full_tier()
    refusal = ram.no_room(101)
    assert (refusal.retry_after_ms, refusal.limit, refusal.actual) == (0, "100 bytes", "101 bytes")
    assert ram.no_room(100).retry_after_ms > 0


def test_whole_blocks_are_charged_from_the_reservation_until_the_upload_ends() -> None:
    ram = RamTier(BUDGET, HALF_LIFE_S, BLOCK)
    upload = reserved(ram, 1, 61)
    assert (ram.held_bytes, ram.missing_bytes(36)) == (65, 5)
    assert ram.reserve(make_record(2, 36)) is None
    ram.abort(upload)
    ram.abort(upload)
    assert ram.held_bytes == 0
    reserved(ram, 2, 36)


def test_the_first_commit_wins_and_the_second_frees_its_bytes() -> None:
    ram = RamTier(BUDGET, HALF_LIFE_S, BLOCK)
    first, second = (reserved(ram, 1, 40) for _ in range(2))
    for upload, value in ((first, b"a"), (second, b"b")):
        ram.append(upload, value * 40)
    stored = ram.commit(second, second.record, Usage(0.0, 0.0))
    with pytest.raises(AlreadyStored):
        ram.commit(first, first.record, Usage(0.0, 0.0))
    assert b"".join(stored.frame(0)) == b"b" * 40
    assert (ram.held_bytes, ram.num_transfers) == (40, 0)


def test_a_key_that_is_resident_is_not_reserved_again() -> None:
    ram, _ = full_tier()
    with pytest.raises(AlreadyStored):
        ram.reserve(make_record(1, 25))


def test_a_reader_of_a_discarded_object_finishes_and_then_its_bytes_are_freed() -> None:
    ram = RamTier(BUDGET, HALF_LIFE_S, BLOCK)
    stored = put(ram, 1, 60)
    ram.open(stored)
    assert ram.discard(stored)
    assert not ram.discard(stored)
    assert ram.find(stored.record.key) is None
    assert (ram.held_bytes, ram.resident_bytes, ram.num_transfers) == (60, 0, 1)
    assert ram.reserve(make_record(2, 60)) is None
    assert b"".join(stored.frame(0)) == b"\x01" * 60
    ram.close(stored)
    assert ram.held_bytes == 0


def test_discard_leaves_a_later_object_of_the_same_key_alone() -> None:
    ram = RamTier(BUDGET, HALF_LIFE_S, BLOCK)
    stored = put(ram, 1, 10)
    ram.open(stored)
    ram.discard(stored)
    put(ram, 1, 10)
    ram.use(stored, 99.0, is_hit=True)
    assert not ram.discard(stored)
    assert len(ram) == 1
    ram.close(stored)
    ram.check_invariants()


def test_frames_notice_a_flipped_byte() -> None:
    ram = RamTier(4 * FRAME_BYTES, HALF_LIFE_S)
    stored = put(ram, 1, FRAME_BYTES + 10)
    assert [*(sum(map(len, stored.frame(i))) for i in range(2)), len(stored.frame_digests)] == [FRAME_BYTES, 10, 2]
    (last,) = stored.extent.pieces(stored.size - 1, stored.size)
    last[0] ^= 1
    assert [stored.is_intact(index, stored.frame(index)) for index in range(2)] == [True, False]


def test_ranks_noted_a_thousand_times_over_still_name_the_lowest() -> None:
    ram, stored = full_tier()
    for step in range(1000):
        ram.use(stored[step % 3], now=100.0 + 2.0 * step, is_hit=False)
    assert victims(ram, 25) == [3]
    ram.check_invariants()
    assert len(ram._ranked) < 200, "stale ranks are dropped"


@dataclass
class ModelObject:
    """What the model knows of a resident or leaving object."""

    stored: StoredObject
    size: int
    usage: Usage
    order: int
    num_readers: int = 0


def charged(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


class TierAgainstDict(RuleBasedStateMachine):
    """`model` maps number → object; what was discarded while it is read stays in `leaving`."""

    numbers = st.integers(0, 5)

    def __init__(self) -> None:
        super().__init__()
        self.ram = RamTier(BUDGET, HALF_LIFE_S, BLOCK)
        self.model: dict[int, ModelObject] = {}
        self.leaving: list[ModelObject] = []
        self.uploads: list[tuple[int, int, Upload]] = []
        self.pinned: set[int] = set()
        self.now, self.order = 0.0, 0

    def may_go(self, stored: StoredObject) -> bool:
        return number_of(stored) not in self.pinned

    def tick(self) -> int:
        self.order += 1
        return self.order

    def held(self) -> int:
        sizes = [each.size for each in (*self.model.values(), *self.leaving)] + [size for _, size, _ in self.uploads]
        return sum(map(charged, sizes))

    def expected_victims(self, size: int) -> list[int] | None:
        free, chosen = BUDGET - self.held(), []
        ranked = sorted(self.model.items(), key=lambda item: (item[1].usage.rank(HALF_LIFE_S), item[1].order))
        for number, each in ranked:
            if free >= charged(size):
                break
            if not each.num_readers and number not in self.pinned:
                chosen.append(number)
                free += charged(each.size)
        return chosen if free >= charged(size) else None

    @rule(seconds=st.sampled_from([0.5, 2.0, 30.0, 400.0]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds

    @rule(number=numbers, size=st.integers(1, 120))
    def reserve(self, number: int, size: int) -> None:
        if number in self.model:
            with pytest.raises(AlreadyStored):
                self.ram.reserve(make_record(number, size))
            return
        expected = self.expected_victims(size)
        assert victims(self.ram, size, self.may_go) == expected
        for victim in expected or ():
            assert self.ram.discard(self.model.pop(victim).stored)
        upload = self.ram.reserve(make_record(number, size))
        assert (upload is None) == (expected is None)
        if upload is not None:
            self.uploads.append((number, size, upload))

    @precondition(lambda self: self.uploads)
    @rule(data=st.data(), cost=st.sampled_from([-2.0, 0.0, 3.0]))
    def commit(self, data: st.DataObject, cost: float) -> None:
        number, size, upload = self.uploads.pop(data.draw(st.integers(0, len(self.uploads) - 1)))
        for start in range(0, size, 7):
            self.ram.append(upload, bytes([number]) * min(7, size - start))
        usage = Usage(self.now, self.now, log_cost=cost)
        if number in self.model:
            with pytest.raises(AlreadyStored):
                self.ram.commit(upload, upload.record, usage)
            return
        record = replace(upload.record, replica="named")
        stored = self.ram.commit(upload, record, usage)
        assert stored.record.replica == "named"
        self.model[number] = ModelObject(stored, size, usage, self.tick())

    @precondition(lambda self: self.uploads)
    @rule(data=st.data(), share=st.floats(0, 1))
    def abort(self, data: st.DataObject, share: float) -> None:
        _, size, upload = self.uploads.pop(data.draw(st.integers(0, len(self.uploads) - 1)))
        self.ram.append(upload, bytes(int(size * share)))
        self.ram.abort(upload)

    @rule(number=numbers)
    def use(self, number: int) -> None:
        stored = self.ram.find(make_record(number, 1).key)
        assert (stored is not None) == (number in self.model)
        if stored is not None:
            self.ram.use(stored, self.now, is_hit=True)
            each = self.model[number]
            each.usage, each.order = each.usage.used(self.now, HALF_LIFE_S, is_hit=True), self.tick()

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def open(self, data: st.DataObject) -> None:
        each = self.model[data.draw(st.sampled_from(sorted(self.model)))]
        self.ram.open(each.stored)
        each.num_readers += 1

    @rule(data=st.data())
    def close(self, data: st.DataObject) -> None:
        read = [each for each in (*self.model.values(), *self.leaving) if each.num_readers]
        if read:
            each = data.draw(st.sampled_from(read))
            assert b"".join(each.stored.frame(0)) == bytes([number_of(each.stored)]) * each.size
            self.ram.close(each.stored)
            each.num_readers -= 1
            self.leaving = [other for other in self.leaving if other.num_readers]

    @rule(number=numbers)
    def discard(self, number: int) -> None:
        each = self.model.pop(number, None)
        if each is not None:
            assert self.ram.discard(each.stored)
            self.leaving += [each] if each.num_readers else []

    @rule(number=numbers)
    def toggle_pin(self, number: int) -> None:
        self.pinned ^= {number}

    @invariant()
    def agrees(self) -> None:
        self.ram.check_invariants()
        everything = [*self.model.values(), *self.leaving]
        assert self.ram.held_bytes == self.held()
        assert self.ram.resident_bytes == sum(each.size for each in self.model.values())
        assert self.ram.num_transfers == len(self.uploads) + sum(each.num_readers for each in everything)
        assert {number_of(stored) for stored in self.ram} == set(self.model)
        assert all(each.stored.usage == each.usage for each in self.model.values())


TierAgainstDict.TestCase.settings = settings(
    max_examples=120, stateful_step_count=40, deadline=None, derandomize=True, database=None
)
TestTierAgainstDict = TierAgainstDict.TestCase
