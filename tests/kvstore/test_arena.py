"""The arena: blocks that are never shared, and extents that read like one piece of memory."""

from hypothesis import given, settings
from hypothesis import strategies as st

from spolia_kvstore.arena import Arena, Extent

SMALL = settings(max_examples=50, deadline=None, derandomize=True, database=None)


def taken(arena: Arena, size: int) -> Extent:
    extent = arena.take(size)
    assert extent is not None
    return extent


def test_what_was_used_is_used_again_before_what_is_fresh() -> None:
    arena = Arena(100, block_bytes=10)
    first, second = taken(arena, 20), taken(arena, 30)
    arena.free(first)
    assert list(taken(arena, 40).blocks) == [0, 1, 5, 6]
    assert list(second.blocks) == [2, 3, 4]


def test_neighbouring_blocks_are_one_piece() -> None:
    arena = Arena(100, block_bytes=10)
    extents = [taken(arena, 20) for _ in range(3)]
    arena.free(extents[0])
    arena.free(extents[2])
    scattered = taken(arena, 45)
    assert list(scattered.blocks) == [0, 1, 4, 5, 6]
    assert [len(piece) for piece in scattered.pieces(0, 45)] == [20, 25]
    assert [len(piece) for piece in scattered.pieces(15, 21)] == [5, 1]


def test_an_object_is_charged_whole_blocks_and_the_budgets_remainder_is_left_out() -> None:
    arena = Arena(47, block_bytes=10)
    assert (arena.capacity_bytes, arena.free_bytes) == (40, 40)
    assert [arena.charge(size) for size in (0, 1, 10, 11)] == [0, 10, 10, 20]
    taken(arena, 31)
    assert arena.free_bytes == 0
    assert arena.take(1) is None


def test_a_budget_smaller_than_a_block_is_one_block() -> None:
    arena = Arena(7)
    assert (arena.capacity_bytes, arena.charge(3)) == (7, 7)


def test_a_refused_take_takes_nothing() -> None:
    arena = Arena(40, block_bytes=10)
    arena.free(taken(arena, 20))
    assert arena.take(41) is None
    assert arena.free_bytes == 40
    assert len(taken(arena, 40)) == 40


@SMALL
@given(st.data(), st.integers(1, 9))
def test_extents_never_share_a_block_and_give_all_of_them_back(data: st.DataObject, block_bytes: int) -> None:
    arena = Arena(97, block_bytes)
    held: list[Extent] = []
    for _ in range(data.draw(st.integers(1, 20))):
        if held and data.draw(st.booleans()):
            arena.free(held.pop(data.draw(st.integers(0, len(held) - 1))))
        else:
            size, had = data.draw(st.integers(0, 40)), arena.free_bytes
            extent = arena.take(size)
            assert (extent is None) == (arena.charge(size) > had)
            held += [extent] if extent is not None else []
        blocks = [block for extent in held for block in extent.blocks]
        assert len(blocks) == len(set(blocks))
        assert all(0 <= block < arena.num_blocks for block in blocks)
        assert arena.free_bytes == arena.capacity_bytes - len(blocks) * block_bytes
    for extent in held:
        arena.free(extent)
    assert arena.free_bytes == arena.capacity_bytes


@SMALL
@given(st.data(), st.integers(1, 9))
def test_writes_and_reads_equal_those_of_a_bytearray(data: st.DataObject, block_bytes: int) -> None:
    arena = Arena(120, block_bytes)
    holes = [taken(arena, size) for size in data.draw(st.lists(st.integers(1, 15), max_size=5))]
    for hole in holes[::2]:
        arena.free(hole)
    size = data.draw(st.integers(1, 40))
    extent, model = taken(arena, size), bytearray(size)
    extent.write(0, model)
    for value in range(1, data.draw(st.integers(1, 10)) + 1):
        start = data.draw(st.integers(0, size))
        piece = bytes([value]) * data.draw(st.integers(0, size - start))
        extent.write(start, piece)
        model[start : start + len(piece)] = piece
        low, high = sorted(data.draw(st.lists(st.integers(0, size + 5), min_size=2, max_size=2)))
        assert extent.read(low, high) == model[low:high]
        assert all(len(view) for view in extent.pieces(low, high))
    assert b"".join(extent.pieces(0, size)) == model
