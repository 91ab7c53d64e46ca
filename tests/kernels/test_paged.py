"""The paged kernels against their references: in Triton's interpreter on a CPU, for real on a CUDA device."""

from __future__ import annotations

import random

import pytest
import torch

from spolia_kernels.paged import Angles, PagedKv, PagedRange, Tails, WorkShape, plan_work
from spolia_kernels.paged.reference import append_paged_ref, attend_spans_ref, attend_tails_ref
from spolia_kernels.paged.tuning import Tuning
from spolia_kernels.paged.work import PagedWork, pieces
from spolia_kernels.partial import Partial

pytest.importorskip("triton", reason="Triton has wheels for Linux only")
launch = pytest.importorskip("spolia_kernels.paged.launch")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SM_SCALE = 0.2
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


class World:
    """Random pages, rows with tails, and ranges that some rows read at offsets of their own."""

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
        num_pages = 64

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator).to(DEVICE, dtype)

        shape = (num_pages, num_kv_heads, page_size, head_dim)
        self.kv = PagedKv(normal(*shape), normal(*shape))
        free = rng.sample(range(num_pages), num_pages)
        ranges = []
        for _ in range(3):
            pages = tuple(free.pop() for _ in range(rng.randint(1, 9)))
            start = rng.randrange(page_size)
            end = rng.randint(start + 1, len(pages) * page_size)
            rows = tuple(rng.sample(range(num_rows), rng.randint(1, num_rows)))
            ranges.append(PagedRange(pages, start, end, rows, tuple(rng.randint(0, 300) for _ in rows)))
        self.work = plan_work(
            ranges, num_rows, WorkShape(num_kv_heads, group_size, page_size, tile, piece_keys), DEVICE
        )
        lengths = [rng.randint(1, 3 * page_size) for _ in range(num_rows)]
        starts = [rng.randint(300, 500) for _ in range(num_rows)]
        self.tails = Tails(
            pages=torch.tensor([[free.pop() for _ in range(3)] for _ in range(num_rows)], dtype=torch.int32).to(DEVICE),
            starts=torch.tensor(starts, dtype=torch.int32).to(DEVICE),
            positions=torch.tensor([s + n - 1 for s, n in zip(starts, lengths, strict=True)], dtype=torch.int32).to(
                DEVICE
            ),
        )
        # As the model makes them: query, key and value of a row side by side.
        num_q_heads = num_kv_heads * group_size
        joined = normal(num_rows, num_q_heads + 2 * num_kv_heads, head_dim)
        self.query = joined[:, :num_q_heads]
        self.new_key, self.new_value = joined[:, num_q_heads:-num_kv_heads], joined[:, -num_kv_heads:]
        inv_freq = 10000.0 ** -(torch.arange(head_dim // 2, dtype=torch.float64) / (head_dim // 2))
        angles = torch.outer(torch.arange(640, dtype=torch.float64), inv_freq)
        self.angles = Angles(angles.cos().float().to(DEVICE), angles.sin().float().to(DEVICE))

    def spans(self, tuned: Tuning) -> Partial:
        """What the kernel gives."""
        parts, heads = self.work.num_parts, self.query.shape[1]
        into = Partial(
            torch.full((parts, heads, self.kv.head_dim), float("nan"), device=DEVICE),
            torch.full((parts, heads), float("nan"), device=DEVICE),
        )
        launch.attend_spans(self.query, self.kv, self.work, self.tails.positions, self.angles, SM_SCALE, into, tuned)
        return into

    def spans_ref(self) -> Partial:
        """What it should give."""
        return attend_spans_ref(self.query, self.kv, self.work, self.tails.positions, self.angles, sm_scale=SM_SCALE)


SHAPES = [
    {},
    {"head_dim": 128, "group_size": 1, "num_kv_heads": 3},
    {"head_dim": 64, "group_size": 8, "num_kv_heads": 1, "tile": 32},
    {"page_size": 64, "group_size": 4},
    {"head_dim": 256, "num_rows": 2, "num_kv_heads": 1},
]


@pytest.mark.parametrize("keys", [16, 32])
@pytest.mark.parametrize("shape", SHAPES)
def test_spans_give_the_partials_of_their_definition(shape: dict[str, int], keys: int) -> None:
    world = World(1, **shape)  # type: ignore[arg-type]
    _close(world.spans(Tuning(keys, 4, 2)), world.spans_ref(), torch.float32)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_spans_in_16_bits_are_as_near_as_16_bits_are(dtype: torch.dtype) -> None:
    if dtype == torch.bfloat16 and DEVICE == "cpu":
        pytest.skip("the interpreter multiplies bfloat16 as the integers that carry it")
    world = World(2, dtype=dtype, head_dim=128)
    _close(world.spans(Tuning(32, 4, 2)), world.spans_ref(), dtype)


@pytest.mark.parametrize("shape", SHAPES)
def test_tails_merge_with_partials_to_the_attention_over_everything(shape: dict[str, int]) -> None:
    world = World(3, **shape)  # type: ignore[arg-type]
    partials = world.spans_ref()
    into = torch.empty_like(world.query, memory_format=torch.contiguous_format)
    launch.attend_tails(
        world.query, world.kv, world.tails, partials, world.work, world.angles, SM_SCALE, into, None, Tuning(32, 4, 2)
    )
    expected = attend_tails_ref(
        world.query, world.kv, world.tails, partials, world.work, world.angles, sm_scale=SM_SCALE
    )
    torch.testing.assert_close(into, expected, atol=2e-5, rtol=2e-5)


def test_rows_past_the_count_are_left_alone() -> None:
    world = World(4)
    into = torch.full_like(world.query, 7.0, memory_format=torch.contiguous_format)
    only = torch.tensor([2], dtype=torch.int32, device=DEVICE)
    launch.attend_tails(
        world.query, world.kv, world.tails, world.spans_ref(), world.work, world.angles, SM_SCALE, into, only,
        Tuning(16, 4, 2),
    )  # fmt: skip
    assert bool((into[2:] == 7.0).all())
    assert not bool((into[:2] == 7.0).any())
    before = world.kv.key.clone()
    launch.append_paged(world.new_key, world.new_value, world.kv, world.tails, world.angles, only)
    assert int((world.kv.key != before).any(-1).any(1).sum()) == 2  # one slot of each row, in all heads


def test_an_item_past_the_count_is_not_run() -> None:
    world = World(5)
    world.work.num_items.fill_(1)
    found = world.spans(Tuning(16, 4, 2))
    head, _, count, *_, part, _ = world.work.items[0].tolist()
    written = ~found.lse.isnan()
    assert written.sum() == count * 3
    assert bool(written[part : part + count, head * 3 : head * 3 + 3].all())


@pytest.mark.parametrize("shape", SHAPES)
def test_new_keys_are_rotated_into_their_slots(shape: dict[str, int]) -> None:
    world = World(6, **shape)  # type: ignore[arg-type]
    expected = PagedKv(world.kv.key.clone(), world.kv.value.clone())
    append_paged_ref(world.new_key, world.new_value, expected, world.tails, world.angles)
    launch.append_paged(world.new_key, world.new_value, world.kv, world.tails, world.angles, None)
    torch.testing.assert_close(world.kv.key, expected.key, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(world.kv.value, expected.value, atol=0, rtol=0)


@pytest.mark.parametrize("seed", range(20))
def test_work_covers_every_reading_of_every_key_once(seed: int) -> None:
    world = World(seed, tile=16, piece_keys=48, num_rows=7)
    seen: dict[tuple[int, int, int], list[tuple[int, int]]] = {}
    for head, first, count, page, start, end, part, _ in world.work.items.tolist():
        for i in range(count):
            seen.setdefault((head, first + i, page), []).append((start, end))
            assert part + i < world.work.num_parts
    assert len(seen) == 2 * world.work.rows.shape[0]
    for cuts in seen.values():
        cuts.sort()
        assert all(a[1] == b[0] for a, b in zip(cuts, cuts[1:], strict=False))
    assert sorted(world.work.parts.tolist()) == list(range(world.work.num_parts))


def test_pieces_are_cut_between_pages_and_never_longer_than_a_page_more_than_asked() -> None:
    shape = WorkShape(1, 1, 16, 16, 100)
    for start in range(0, 16, 3):
        for end in range(start + 1, 600, 7):
            found = pieces(start, end, shape)
            assert found[0][0] == start
            assert found[-1][1] == end
            assert all(a[1] == b[0] and a[1] % 16 == 0 for a, b in zip(found, found[1:], strict=False))
            assert all(0 < high - low <= 116 for low, high in found)


@pytest.mark.parametrize(
    ("bad", "what"),
    [
        (PagedRange((1,), 3, 3, (0,), (0,)), "keys 3"),
        (PagedRange((1,), 0, 17, (0,), (0,)), "1 pages"),
        (PagedRange((1,), 0, 1, (0,), ()), "offsets"),
        (PagedRange((1,), 0, 1, (2,), (0,)), "rows 2"),
    ],
)
def test_a_range_that_cannot_be_read_is_refused(bad: PagedRange, what: str) -> None:
    with pytest.raises(ValueError, match=what):
        plan_work([bad], 2, WorkShape(1, 1, 16, 16, 64))


def test_no_work_is_a_plan_too() -> None:
    work: PagedWork = plan_work([], 2, WorkShape(1, 1, 16, 16, 64))
    assert work.num_parts == 0
    assert work.part_starts.tolist() == [0, 0, 0]


def _close(found: Partial, expected: Partial, dtype: torch.dtype) -> None:
    limit = TOLERANCE[dtype]
    torch.testing.assert_close(found.lse, expected.lse, atol=limit, rtol=limit)
    torch.testing.assert_close(found.out, expected.out, atol=limit, rtol=limit)
