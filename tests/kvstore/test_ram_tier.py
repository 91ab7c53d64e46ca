"""The RAM tier against a dict that obeys the same rules slowly."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from kvstore_worlds import make_record

from spolia_core.digests import FRAME_BYTES, digest
from spolia_core.errors import AlreadyStored, Busy
from spolia_kvstore.object_store import ObjectStore, StoredObject, Upload
from spolia_kvstore.objects import ObjectKey

BUDGET = 100


def never(key: ObjectKey) -> bool:
    return False


def put(store: ObjectStore, number: int, size: int) -> Upload:
    record = make_record(number, size)
    upload = store.reserve(record.key, size, never)
    store.append(upload, bytes([number]) * size)
    store.commit(upload, record, (digest(upload.data),))
    return upload


def test_eviction_takes_the_least_recently_used_first() -> None:
    store = ObjectStore(BUDGET)
    for number in range(4):
        put(store, number, 25)
    store.touch(make_record(0, 25).key)
    upload = store.reserve(make_record(9, 50).key, 50, never)
    assert [int.from_bytes(key.chunk_id, "big") for key in upload.evicted] == [1, 2]
    store.check_invariants()


def test_eviction_never_takes_what_is_pinned_or_read() -> None:
    store = ObjectStore(BUDGET)
    for number in range(4):
        put(store, number, 25)
    pinned, read = make_record(0, 25).key, make_record(1, 25).key
    opened = store.open(read)
    upload = store.reserve(make_record(9, 50).key, 50, lambda key: key == pinned)
    assert pinned in store
    assert read in store
    store.abort(upload)
    with pytest.raises(Busy, match="pinned or in transfer"):
        store.reserve(make_record(9, 51).key, 51, lambda key: key == pinned)
    assert pinned in store
    assert opened is not None
    store.close(opened)
    store.check_invariants()


def test_a_refused_reservation_evicts_nothing() -> None:
    store = ObjectStore(BUDGET)
    for number in range(4):
        put(store, number, 25)
    pinned = make_record(3, 25).key
    with pytest.raises(Busy):
        store.reserve(make_record(9, 80).key, 80, lambda key: key == pinned)
    assert len(store) == 4


def test_an_object_larger_than_the_budget_is_refused_without_a_hint_to_retry() -> None:
    with pytest.raises(Busy, match="the budget is 100") as caught:
        ObjectStore(BUDGET).reserve(make_record(1, 101).key, 101, never)
    assert caught.value.retry_after_ms == 0
    assert (caught.value.limit, caught.value.actual) == ("100 bytes", "101 bytes")


def test_reserved_bytes_count_until_the_upload_ends() -> None:
    store = ObjectStore(BUDGET)
    upload = store.reserve(make_record(1, 60).key, 60, never)
    with pytest.raises(Busy):
        store.reserve(make_record(2, 60).key, 60, never)
    store.abort(upload)
    store.abort(upload)
    assert store.held_bytes == 0
    store.reserve(make_record(2, 60).key, 60, never)


def test_the_first_commit_wins_and_the_second_frees_its_bytes() -> None:
    store = ObjectStore(BUDGET)
    record = make_record(1, 40)
    first, second = (store.reserve(record.key, 40, never) for _ in range(2))
    for upload, value in ((first, b"a"), (second, b"b")):
        store.append(upload, value * 40)
    store.commit(second, record, ())
    with pytest.raises(AlreadyStored):
        store.commit(first, record, ())
    stored = store.touch(record.key)
    assert stored is not None
    assert bytes(stored.data) == b"b" * 40
    assert (store.held_bytes, store.num_transfers) == (40, 0)


def test_a_reader_of_a_deleted_object_finishes_and_then_its_bytes_are_freed() -> None:
    store = ObjectStore(BUDGET)
    put(store, 1, 60)
    key = make_record(1, 60).key
    stored = store.open(key)
    assert stored is not None
    assert store.delete(key) == 60
    assert store.delete(key) is None
    assert store.touch(key) is None
    assert bytes(stored.frame(0)) == b"\x01" * 60
    assert (store.held_bytes, store.resident_bytes) == (60, 0)
    with pytest.raises(Busy):
        put(store, 2, 60)
    store.close(stored)
    assert store.held_bytes == 0


def test_discard_leaves_a_later_object_of_the_same_key_alone() -> None:
    store = ObjectStore(BUDGET)
    put(store, 1, 10)
    stored = store.open(make_record(1, 10).key)
    assert stored is not None
    assert store.discard(stored)
    put(store, 1, 10)
    assert not store.discard(stored)
    assert len(store) == 1
    store.close(stored)
    store.check_invariants()


def test_frames_are_views_that_notice_a_flipped_byte() -> None:
    store = ObjectStore(4 * FRAME_BYTES)
    size = FRAME_BYTES + 10
    record = make_record(1, size)
    upload = store.reserve(record.key, size, never)
    store.append(upload, bytes(size))
    stored = store.commit(upload, record, (digest(bytes(FRAME_BYTES)), digest(bytes(10))))
    assert [len(stored.frame(0)), len(stored.frame(1))] == [FRAME_BYTES, 10]
    stored.data[-1] ^= 1
    assert [stored.is_intact(0), stored.is_intact(1)] == [True, False]


class StoreAgainstDict(RuleBasedStateMachine):
    """`model` maps number → size, least recently used first; uploads, readers and pins are lists and sets beside it."""

    numbers = st.integers(0, 5)

    def __init__(self) -> None:
        super().__init__()
        self.store = ObjectStore(BUDGET)
        self.model: dict[int, int] = {}
        self.uploads: list[tuple[int, int, Upload]] = []
        self.readers: list[tuple[int, StoredObject, bool]] = []  # number, object, deleted meanwhile
        self.pinned: set[int] = set()

    def is_pinned(self, key: ObjectKey) -> bool:
        return int.from_bytes(key.chunk_id, "big") in self.pinned

    def held(self) -> int:
        leaving = {id(stored): len(stored.data) for _, stored, deleted in self.readers if deleted}
        return sum(self.model.values()) + sum(size for _, size, _ in self.uploads) + sum(leaving.values())

    def expected_victims(self, size: int) -> list[int] | None:
        read = {number for number, _, deleted in self.readers if not deleted}
        victims: list[int] = []
        free = BUDGET - self.held()
        for number in self.model:
            if free >= size:
                break
            if number not in read | self.pinned:
                victims.append(number)
                free += self.model[number]
        return victims if free >= size else None

    @rule(number=numbers, size=st.integers(1, 120))
    def reserve(self, number: int, size: int) -> None:
        key = make_record(number, size).key
        if number in self.model:
            with pytest.raises(AlreadyStored):
                self.store.reserve(key, size, self.is_pinned)
            return
        victims = self.expected_victims(size)
        if victims is None:
            with pytest.raises(Busy):
                self.store.reserve(key, size, self.is_pinned)
            return
        upload = self.store.reserve(key, size, self.is_pinned)
        assert [int.from_bytes(evicted.chunk_id, "big") for evicted in upload.evicted] == victims
        for victim in victims:
            del self.model[victim]
        self.uploads.append((number, size, upload))

    @precondition(lambda self: self.uploads)
    @rule(data=st.data())
    def commit(self, data: st.DataObject) -> None:
        number, size, upload = self.uploads.pop(data.draw(st.integers(0, len(self.uploads) - 1)))
        self.store.append(upload, bytes([number]) * size)
        if number in self.model:
            with pytest.raises(AlreadyStored):
                self.store.commit(upload, make_record(number, size), ())
            return
        self.store.commit(upload, make_record(number, size), (digest(upload.data),))
        self.model[number] = size

    @precondition(lambda self: self.uploads)
    @rule(data=st.data(), share=st.floats(0, 1))
    def abort(self, data: st.DataObject, share: float) -> None:
        _, size, upload = self.uploads.pop(data.draw(st.integers(0, len(self.uploads) - 1)))
        self.store.append(upload, bytes(int(size * share)))
        self.store.abort(upload)

    @rule(number=numbers)
    def open(self, number: int) -> None:
        stored = self.store.open(make_record(number, 1).key)
        assert (stored is not None) == (number in self.model)
        if stored is not None:
            assert bytes(stored.data) == bytes([number]) * self.model[number]
            self.model[number] = self.model.pop(number)
            self.readers.append((number, stored, False))

    @precondition(lambda self: self.readers)
    @rule(data=st.data())
    def close(self, data: st.DataObject) -> None:
        number, stored, _ = self.readers.pop(data.draw(st.integers(0, len(self.readers) - 1)))
        assert bytes(stored.data) == bytes([number]) * len(stored.data)
        self.store.close(stored)

    @rule(number=numbers)
    def delete(self, number: int) -> None:
        assert self.store.delete(make_record(number, 1).key) == self.model.pop(number, None)
        self.readers = [(n, stored, deleted or n == number) for n, stored, deleted in self.readers]

    @rule(number=numbers)
    def toggle_pin(self, number: int) -> None:
        self.pinned ^= {number}

    @invariant()
    def agrees(self) -> None:
        self.store.check_invariants()
        assert self.store.held_bytes == self.held()
        assert self.store.resident_bytes == sum(self.model.values())
        assert self.store.num_transfers == len(self.uploads) + len(self.readers)
        assert all((make_record(n, 1).key in self.store) == (n in self.model) for n in range(6))


StoreAgainstDict.TestCase.settings = settings(
    max_examples=60, stateful_step_count=40, deadline=None, derandomize=True, database=None
)
TestStoreAgainstDict = StoreAgainstDict.TestCase
