"""The sampling kernel against its reference, and the reference against the engine's sampler: one draw everywhere."""

from __future__ import annotations

import os
import random
from dataclasses import replace

import pytest
import torch

from spolia_core.sampling import SamplingParams, uniform
from spolia_engine.sampler import sample
from spolia_kernels.sample import Drawn, Draws, sample_ref

launch = pytest.importorskip("spolia_kernels.sample.launch", reason="Triton has wheels for Linux only")
sample_triton = pytest.importorskip("spolia_kernels.sample.sample_triton", reason="Triton has wheels for Linux only")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def draws_of(params: list[SamplingParams], token_index: int = 0) -> Draws:
    """Row r is sample r of its parameters."""

    def held(values: list[float], dtype: torch.dtype) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype, device=DEVICE)

    seeds = [p.seed - 2**64 if p.seed >= 2**63 else p.seed for p in params]
    return Draws(
        held([p.temperature for p in params], torch.float64),
        held([p.top_p for p in params], torch.float64),
        held([p.top_k for p in params], torch.int32),
        torch.tensor(seeds, dtype=torch.int64, device=DEVICE),
        torch.arange(len(params), device=DEVICE),
        torch.full((len(params),), token_index, device=DEVICE),
    )


def by_kernel(logits: torch.Tensor, draws: Draws, num_rows: int | None = None) -> Drawn:
    """What the kernel draws; 7 where it wrote nothing."""
    rows = logits.shape[0]
    into = Drawn(torch.full((rows,), 7, device=DEVICE), torch.full((rows,), 7.0, device=DEVICE))
    count = torch.tensor([rows if num_rows is None else num_rows], dtype=torch.int32, device=DEVICE)
    launch.sample_rows(logits.to(DEVICE), draws, into, count)
    return into


def check(logits: torch.Tensor, params: list[SamplingParams], token_index: int = 0) -> list[int]:
    """Kernel, reference and the engine's sampler draw the same; returns it."""
    draws = draws_of(params, token_index)
    found, expected = by_kernel(logits, draws), sample_ref(logits.to(DEVICE), draws)
    assert found.token_ids.tolist() == expected.token_ids.tolist()
    torch.testing.assert_close(found.logprobs, expected.logprobs, atol=1e-5, rtol=1e-5)
    by_engine = [sample(logits[row].float(), p, token_index, row) for row, p in enumerate(params)]
    assert by_engine == found.token_ids.tolist()
    return by_engine


MIXED = [
    SamplingParams(),
    SamplingParams(top_k=3, top_p=0.2, seed=9),
    SamplingParams(temperature=1.0),
    SamplingParams(temperature=0.5, seed=2**64 - 1),
    SamplingParams(temperature=3.0, seed=4),
    SamplingParams(temperature=1.0, top_k=5),
    SamplingParams(temperature=1.0, top_k=1),
    SamplingParams(temperature=1.0, top_p=0.7),
    SamplingParams(temperature=2.0, top_k=12, top_p=0.8, seed=2**63),
    SamplingParams(temperature=1.0, top_p=1e-6),
    SamplingParams(temperature=1.0, top_k=100_000),
    SamplingParams(temperature=1e-300),
    SamplingParams(temperature=100.0, top_p=0.999),
]


def test_the_device_counts_as_the_host_does() -> None:
    from spolia_kernels.sample.counter_triton import uniform_kernel

    rng = random.Random(0)
    counters = [(0, 0, 0), (2**64 - 1, 63, 2**40), *((rng.getrandbits(64), rng.randrange(64), i) for i in range(40))]
    columns = [[n - 2**64 if n >= 2**63 else n for n in column] for column in zip(*counters, strict=True)]
    held = [torch.tensor(column, dtype=torch.int64, device=DEVICE) for column in columns]
    out = torch.zeros(len(counters), dtype=torch.float64, device=DEVICE)
    uniform_kernel[(3,)](*held, out, len(counters), BLOCK=16)
    assert out.tolist() == [uniform(*counter) for counter in counters]


@pytest.mark.parametrize("vocab", [1, 97, 1000])
def test_rows_of_different_parameters_draw_what_each_would_alone(vocab: int) -> None:
    torch.manual_seed(vocab)
    logits = torch.randn(len(MIXED), vocab) * 3
    together = check(logits, MIXED, token_index=vocab)
    alone = draws_of(MIXED, vocab)
    only = slice(8, 9)
    one = Draws(*(getattr(alone, name)[only] for name in Draws.__slots__))
    assert by_kernel(logits[only], one).token_ids.tolist() == together[only]


@pytest.fixture
def in_small_pieces(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Strips, blocks and lists so small that some hundred logits are many; whether each draw was of a list.

    Compiled kernels call no Python: there the list stays empty."""
    sizes = {"STRIP": 8, "STRIPS": 4, "FEW": 4, "CAPACITY": 128, "BLOCK": 256, "LIST_BLOCK": 64}
    for name, size in sizes.items():
        monkeypatch.setattr(launch, name, size)
    listed: list[bool] = []
    inner = sample_triton.drawn

    def drawn(*args: object) -> object:
        listed.append(bool(args[-2]))
        return inner(*args)

    if INTERPRETED:
        monkeypatch.setattr(sample_triton, "drawn", drawn)
    return listed


@pytest.mark.parametrize("capacity", [0, 128])
def test_the_likeliest_few_draw_what_all_would(
    in_small_pieces: list[bool], monkeypatch: pytest.MonkeyPatch, capacity: int
) -> None:
    """With room for none, every row is walked; with room, those that the few decide are not."""
    monkeypatch.setattr(launch, "CAPACITY", capacity)
    torch.manual_seed(1)
    some = MIXED[2:]
    check(torch.randn(len(some), 411) * 2, some, token_index=5)
    if INTERPRETED:
        assert len(in_small_pieces) == len(some)
        assert any(in_small_pieces) == (capacity > 0)
        assert not all(in_small_pieces)


def test_rows_of_a_sure_model_are_not_walked(in_small_pieces: list[bool]) -> None:
    """The first few, the next, or top-k's: lists decide, wherever in the row the likely ones stand."""
    torch.manual_seed(5)
    some = [p for p in MIXED if 0 < p.temperature <= 2.0 and p.top_k <= 20]
    logits = torch.randn(len(some), 511)
    for row in range(len(some)):
        logits[row, torch.randperm(511)[:20]] += 20.0
    check(logits, some, token_index=3)
    assert in_small_pieces == [True] * (len(some) * INTERPRETED)


def test_a_number_beyond_the_likeliest_few_finds_its_token(in_small_pieces: list[bool]) -> None:
    """A flat row: half of its mass lies behind every list, and each number falls where the sum of weights says."""
    params = SamplingParams(temperature=1.0, seed=7)
    torch.manual_seed(6)
    drawn = check((torch.randn(1, 300) / 4).expand(8, 300), [params] * 8)
    assert len(set(drawn)) > 5
    if INTERPRETED:
        assert False in in_small_pieces


def test_what_is_masked_takes_no_room(in_small_pieces: list[bool]) -> None:
    """Where few logits are above -inf, they are all that is looked at, and top-k may ask for more."""
    logits = torch.full((4, 400), float("-inf"))
    logits[:, [5, 300, 301, 399]] = torch.tensor([1.0, 0.5, 2.0, 0.1])
    some = [
        SamplingParams(temperature=t, top_k=k, top_p=p) for t, k, p in ((1, 0, 1), (1, 50, 1), (3, 0, 0.99), (9, 3, 1))
    ]
    assert set(check(logits, some)) <= {5, 300, 301, 399}
    assert in_small_pieces == [True] * (len(some) * INTERPRETED)


def test_more_equal_logits_than_a_list_holds_go_by_id(in_small_pieces: list[bool]) -> None:
    logits = torch.zeros(6, 400)
    logits[:, 200:] = 1.0
    some = [
        SamplingParams(),
        *(SamplingParams(temperature=1.0, top_k=k, top_p=p) for k, p in ((1, 1), (2, 0.4), (250, 1), (0, 0.5), (0, 1))),
    ]
    check(logits, some)


def test_equal_logits_go_by_id() -> None:
    """Four values over 50 tokens: every bound of every filter falls among equals."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randint(0, 4, (len(MIXED), 50), generator=generator).float()
    logits[:, 7] = -0.0  # equals 0
    check(logits, MIXED)
    assert check(torch.zeros(2, 50), [SamplingParams(), SamplingParams(temperature=1.0, top_k=1)]) == [0, 0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bits_are_read_as_they_are(dtype: torch.dtype) -> None:
    torch.manual_seed(2)
    check((torch.randn(4, 300) * 2).to(dtype), MIXED[5:9])


def test_every_number_falls_where_the_sum_of_weights_says() -> None:
    params = SamplingParams(temperature=2.0, top_p=0.9, top_k=17)
    torch.manual_seed(3)
    logits = torch.randn(1, 60).expand(12, 60)
    drawn = check(logits, [params] * 12)
    assert 4 < len(set(drawn)) <= 17


def test_tokens_of_no_probability_are_never_drawn() -> None:
    logits = torch.full((12, 50), float("-inf"))
    logits[:, [3, 17]] = 0.0
    assert set(check(logits, [SamplingParams(temperature=1.0, seed=4)] * 12)) == {3, 17}


def test_rows_that_are_no_numbers_draw_nothing_and_disturb_nobody() -> None:
    torch.manual_seed(4)
    logits = torch.randn(4, 40)
    logits[0, 5], logits[1], logits[2, 7] = torch.nan, float("-inf"), float("inf")
    warm = SamplingParams(temperature=1.0)
    draws = draws_of([warm, SamplingParams(), warm, warm])
    for found in (by_kernel(logits, draws), sample_ref(logits.to(DEVICE), draws)):
        assert found.token_ids.tolist()[:3] == [-1, -1, -1]
        assert bool(found.logprobs[:3].isnan().all())
        assert found.token_ids[3] == sample(logits[3], warm, 0, 3)


def test_rows_past_the_count_are_left_alone() -> None:
    logits = torch.randn(4, 33)
    draws = draws_of([SamplingParams(temperature=1.0)] * 4)
    found = by_kernel(logits, draws, num_rows=2)
    assert found.token_ids.tolist()[2:] == [7, 7]
    assert found.logprobs.tolist()[2:] == [7.0, 7.0]
    more = replace(draws, token_index=draws.token_index + 1)
    assert by_kernel(logits, more).token_ids.tolist() == sample_ref(logits.to(DEVICE), more).token_ids.tolist()
