"""The paged kernels against their references: in Triton's interpreter on a CPU, for real on a CUDA device."""

from __future__ import annotations

import random
from itertools import pairwise
from typing import Any

import pytest
import torch

from spolia_kernels.paged import Angles, PagedKv, PagedWork, Rows, SlotSpan, Tails, Tuning, WorkShape, plan_work
from spolia_kernels.paged.reference import append_paged_ref, attend_spans_ref, attend_tails_ref
from spolia_kernels.paged.work import pieces
from spolia_kernels.partial import Partial

launch = pytest.importorskip("spolia_kernels.paged.launch", reason="Triton has wheels for Linux only")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SM_SCALE = 0.2
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
NUM_PAGES = 64


class World:
    """Random slots, rows with tails, and spans that some rows read at offsets of their own."""

    def __init__(
        self,
        seed: int,
        *,
        num_rows: int = 5,
        num_kv_heads: int = 2,
        group_size: int = 3,
        head_dim: int = 64,
        page_size: int = 16,
        dtype: torch.dtype = torch.float32,
        tile: int = 16,
        piece_keys: int = 96,
    ) -> None:
        rng = random.Random(seed)
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator).to(DEVICE, dtype)

        def ints(values: Any) -> torch.Tensor:
            return torch.tensor(values, dtype=torch.int32, device=DEVICE)

        num_slots = NUM_PAGES * page_size
        self.kv = PagedKv(*(normal(num_kv_heads, num_slots, head_dim) for _ in range(2)), page_size)
        spans, before = [], num_slots // 2  # spans in the first half, tails in the second
        for _ in range(3):
            start = rng.randrange(before - 2)
            end = rng.randint(start + 1, min(start + 150, before))
            rows = tuple(rng.sample(range(num_rows), rng.randint(1, num_rows)))
            spans.append(SlotSpan(start, end, rows, tuple(rng.randint(0, 300) for _ in rows)))
        spans.append(SlotSpan(before - 5, before, (0,), (3,)))
        self.spans_read = spans
        self.work = plan_work(spans, num_rows, WorkShape(num_kv_heads, group_size, tile, piece_keys), DEVICE)
        free = rng.sample(range(NUM_PAGES // 2, NUM_PAGES), NUM_PAGES // 2)
        lengths = [rng.randint(0, 3 * page_size - 1) for _ in range(num_rows)]
        lengths[0] = 0
        starts = [rng.randint(300, 500) for _ in range(num_rows)]
        self.tails = Tails(
            pages=ints([[free.pop() for _ in range(3)] for _ in range(num_rows)]),
            starts=ints(starts),
            positions=ints([start + length for start, length in zip(starts, lengths, strict=True)]),
        )
        num_q_heads = num_kv_heads * group_size
        self.rows = Rows.of(normal(num_rows, num_q_heads + 2 * num_kv_heads, head_dim), num_q_heads)
        inv_freq = 10000.0 ** -(torch.arange(head_dim // 2, dtype=torch.float64) / (head_dim // 2))
        angles = torch.outer(torch.arange(1024, dtype=torch.float64), inv_freq)
        self.angles = Angles(angles.cos().float().to(DEVICE), angles.sin().float().to(DEVICE))

    def spans(self, tuned: Tuning) -> Partial:
        """What the kernel gives; NaN where it wrote nothing."""
        shape = (self.work.num_parts, self.rows.query.shape[1])
        into = Partial(
            torch.full((*shape, self.kv.head_dim), float("nan"), device=DEVICE),
            torch.full(shape, float("nan"), device=DEVICE),
        )
        launch.attend_spans(
            self.rows.query, self.kv, self.work, self.tails.positions, self.angles, SM_SCALE, into, tuned
        )
        return into

    def spans_ref(self) -> Partial:
        """What it should give."""
        query, positions = self.rows.query, self.tails.positions
        return attend_spans_ref(query, self.kv, self.work, positions, self.angles, sm_scale=SM_SCALE)

    def answer(self, partials: Partial, tuned: Tuning, num_rows: torch.Tensor | None = None) -> torch.Tensor:
        """The layer's attention by the kernel; 7 where it wrote nothing. Writes KV."""
        into = torch.full_like(self.rows.query, 7.0, memory_format=torch.contiguous_format)
        launch.attend_tails(
            self.rows, self.kv, self.tails, partials, self.work, self.angles, SM_SCALE, into, num_rows, tuned
        )
        return into


SHAPES: list[dict[str, int]] = [
    {},
    {"head_dim": 128, "group_size": 1, "num_kv_heads": 3},
    {"head_dim": 64, "group_size": 8, "num_kv_heads": 1, "tile": 32},
    {"page_size": 64, "group_size": 4},
    {"head_dim": 256, "num_rows": 2, "num_kv_heads": 1},
]


@pytest.mark.parametrize("keys", [16, 32])
@pytest.mark.parametrize("shape", SHAPES)
def test_spans_give_the_partials_of_their_definition(shape: dict[str, Any], keys: int) -> None:
    world = World(1, **shape)
    _close(world.spans(Tuning(keys, 4, 2)), world.spans_ref(), torch.float32)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bits_are_as_near_as_16_bits_are(dtype: torch.dtype) -> None:
    if dtype == torch.bfloat16 and DEVICE == "cpu":
        pytest.skip("the interpreter multiplies bfloat16 as the integers that carry it")
    world = World(2, dtype=dtype, head_dim=128)
    expected = world.spans_ref()
    _close(world.spans(Tuning(32, 4, 2)), expected, dtype)
    found = world.answer(expected, Tuning(32, 2, 2))
    again = attend_tails_ref(world.rows, world.kv, world.tails, expected, world.work, world.angles, sm_scale=SM_SCALE)
    torch.testing.assert_close(found, again, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("keys", [16, 32])
@pytest.mark.parametrize("shape", SHAPES)
def test_tails_write_their_kv_and_merge_with_partials(shape: dict[str, Any], keys: int) -> None:
    world, other = World(3, **shape), World(3, **shape)
    partials = world.spans_ref()
    found = world.answer(partials, Tuning(keys, 2, 2))
    expected = attend_tails_ref(
        other.rows, other.kv, other.tails, partials, other.work, other.angles, sm_scale=SM_SCALE
    )
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(world.kv.key, other.kv.key, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(world.kv.value, other.kv.value, atol=0, rtol=0)


def test_spans_and_tails_together_are_attention_over_all_keys() -> None:
    """The one equation, row by row, over keys that were moved to where they count as standing."""
    from spolia_kernels.attend.reference import attend_ref
    from spolia_kernels.paged.reference import rotated

    world = World(8)
    found = world.answer(world.spans(Tuning(16, 4, 2)), Tuning(16, 2, 2))
    for row in range(5):
        position, start = int(world.tails.positions[row]), int(world.tails.starts[row])
        own = world.kv.slots_of(world.tails.pages[row])[: position - start + 1]
        keys, values = [world.kv.key[:, own]], [world.kv.value[:, own]]
        for span in world.spans_read:
            if row in span.rows:
                slots = slice(span.start, span.end)
                offset = torch.full((span.end - span.start,), span.offsets[span.rows.index(row)], device=DEVICE)
                keys.append(rotated(world.kv.key[:, slots], offset, world.angles))
                values.append(world.kv.value[:, slots])
        turned = rotated(world.rows.query[row, :, None], world.tails.positions[row, None], world.angles)
        expected = attend_ref(turned, torch.cat(keys, 1), torch.cat(values, 1), sm_scale=SM_SCALE)
        torch.testing.assert_close(found[row], expected.out[:, 0], atol=3e-5, rtol=3e-5)


def test_what_lies_beside_a_span_or_a_tail_may_be_anything() -> None:
    """Neighbours in memory belong to others, whose numbers may be none."""
    world = World(9)
    expected = world.answer(world.spans(Tuning(32, 4, 2)), Tuning(16, 2, 2))
    read = torch.zeros(world.kv.num_slots, dtype=torch.bool, device=DEVICE)
    for span in world.spans_read:
        read[span.start : span.end] = True
    for row in range(5):
        length = int(world.tails.positions[row] - world.tails.starts[row])
        read[world.kv.slots_of(world.tails.pages[row])[:length]] = True
    for memory in (world.kv.key, world.kv.value):
        memory[:, ~read] = torch.nan
    torch.testing.assert_close(world.answer(world.spans(Tuning(32, 4, 2)), Tuning(16, 2, 2)), expected, atol=0, rtol=0)


def test_rows_past_the_count_are_left_alone() -> None:
    world = World(4)
    before = world.kv.key.clone()
    only = torch.tensor([2], dtype=torch.int32, device=DEVICE)
    found = world.answer(world.spans_ref(), Tuning(16, 2, 2), only)
    assert bool((found[2:] == 7.0).all())
    assert not bool((found[:2] == 7.0).any())
    assert int((world.kv.key != before).any(-1).any(0).sum()) == 2  # one slot of each row


def test_an_item_past_the_count_is_not_run() -> None:
    world = World(5)
    world.work.num_items.fill_(1)
    found = world.spans(Tuning(16, 4, 2))
    head, _, count, _, _, part, *_ = world.work.items[0].tolist()
    written = ~found.lse.isnan()
    assert written.sum() == count * 3
    assert bool(written[part : part + count, head * 3 : head * 3 + 3].all())


@pytest.mark.parametrize("shape", SHAPES)
def test_new_keys_are_rotated_into_their_slots(shape: dict[str, Any]) -> None:
    world = World(6, **shape)
    expected = PagedKv(world.kv.key.clone(), world.kv.value.clone(), world.kv.page_size)
    slots = torch.randperm(world.kv.num_slots)[: world.rows.key.shape[0]].to(DEVICE, torch.int32)
    new = (world.rows.key, world.rows.value)
    append_paged_ref(*new, expected, slots, world.tails.positions, world.angles)
    launch.append_paged(*new, world.kv, slots, world.tails.positions, world.angles)
    torch.testing.assert_close(world.kv.key, expected.key, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(world.kv.value, expected.value, atol=0, rtol=0)


@pytest.mark.parametrize("seed", range(20))
def test_work_covers_every_reading_of_every_key_once(seed: int) -> None:
    world = World(seed, tile=16, piece_keys=48, num_rows=7)
    seen: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for head, first, count, start, end, part, *_ in world.work.items.tolist():
        for i in range(count):
            seen.setdefault((head, first + i), []).append((start, end))
            assert part + i < world.work.num_parts
    readings = [span for span in world.spans_read for _ in span.rows]
    assert len(seen) == 2 * len(readings) == 2 * world.work.rows.shape[0]
    for (_, reading), cuts in seen.items():
        cuts.sort()
        assert all(a[1] == b[0] for a, b in pairwise(cuts))
        assert (cuts[0][0], cuts[-1][1]) == (readings[reading].start, readings[reading].end)
    assert sorted(world.work.parts.tolist()) == list(range(world.work.num_parts))


def test_pieces_are_cut_at_sixteens_and_hardly_longer_than_asked() -> None:
    for start in range(0, 40, 3):
        for end in range(start + 1, 600, 7):
            found = pieces(start, end, 100)
            assert found[0][0] == start
            assert found[-1][1] == end
            assert all(a[1] == b[0] and a[1] % 16 == 0 for a, b in pairwise(found))
            assert all(0 < high - low <= 116 for low, high in found)


@pytest.mark.parametrize(
    ("bad", "what"),
    [
        (SlotSpan(3, 3, (0,), (0,)), "slots 3"),
        (SlotSpan(-1, 3, (0,), (0,)), "slots -1"),
        (SlotSpan(0, 1, (0,), ()), "offsets"),
        (SlotSpan(0, 1, (2,), (0,)), "rows 2"),
    ],
)
def test_a_span_that_cannot_be_read_is_refused(bad: SlotSpan, what: str) -> None:
    with pytest.raises(ValueError, match=what):
        plan_work([bad], 2, WorkShape(1, 1, 16, 64))


def test_no_work_is_a_plan_too() -> None:
    work: PagedWork = plan_work([], 2, WorkShape(1, 1, 16, 64))
    assert work.num_parts == 0
    assert work.part_starts.tolist() == [0, 0, 0]


def _close(found: Partial, expected: Partial, dtype: torch.dtype) -> None:
    limit = TOLERANCE[dtype]
    torch.testing.assert_close(found.lse, expected.lse, atol=limit, rtol=limit)
    torch.testing.assert_close(found.out, expected.out, atol=limit, rtol=limit)
