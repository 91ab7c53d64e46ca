"""The laws of attention as batched products of blocks of keys, by whichever of its two ways the scores ask for."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_worlds import GQA_RATIOS, LAWFUL, Problem, assert_same, oracle, problem

from spolia_kernels import KeyRange, Partial, attend, merge
from spolia_kernels.attend import attend_ref, flash_cpu, products_cpu
from spolia_kernels.native.kernels import torch_kernels_only

LARGE = 3e-4
"""What float32 keeps of scores in the hundreds: 2^-24 of them, times the width of a head."""


@pytest.fixture(autouse=True)
def blocks_of_16_keys_pay(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """So that small worlds are cut into blocks, the last one a part: two heads of seven rows have 16 keys in one."""
    monkeypatch.setattr(products_cpu, "_MIN_KEYS", 1)
    monkeypatch.setattr(products_cpu, "_MIN_ROWS", 1)
    monkeypatch.setattr(products_cpu, "_NUM_SCORES", 16 * 14)
    with torch_kernels_only():
        yield


@pytest.fixture
def ways(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Which of the two ways ran, in order; the fused kernel may not."""
    found: list[str] = []
    for name in ("_attend_plain", "_attend_less_tops"):
        monkeypatch.setattr(products_cpu, name, _noted(name, getattr(products_cpu, name), found))
    monkeypatch.setattr(flash_cpu, "_FLASH", None)
    return found


def _noted(name, way, found):
    def noted(*args):
        found.append(name)
        return way(*args)

    return noted


def of(p: Problem) -> Partial:
    return attend(p.query, p.key, p.value, sm_scale=p.sm_scale)


def exact(p: Problem) -> Partial:
    return attend_ref(p.query.double(), p.key.double(), p.value.double(), sm_scale=p.sm_scale)


@pytest.mark.parametrize("ratio", GQA_RATIOS)
@pytest.mark.parametrize("num_keys", [1, 15, 16, 17, 63, 129])
@pytest.mark.parametrize("num_rows", [1, 3, 24])
def test_it_equals_the_definition_at_odd_sizes_and_every_gqa_ratio(num_rows, num_keys, ratio, ways):
    p = problem(num_rows, num_keys, ratio=ratio, seed=num_keys)
    assert_same(of(p), exact(p))
    assert ways == ["_attend_plain"]


def test_it_equals_attention_row_by_row(ways):
    p = problem(3, 50, ratio=7)
    assert_same(of(p), oracle(p.query, p.key, p.value, sm_scale=p.sm_scale))


@pytest.mark.parametrize("far", [0, 20, 49])
@pytest.mark.parametrize("score", [90.0, 300.0, -90.0, -300.0])
def test_scores_whose_exponentials_no_float32_holds_are_met_wherever_they_stand(far, score, ways):
    """In the first block, whose sums end the plain way there, or in a later one; of all keys or of one."""
    p = problem(7, 50, ratio=1)
    p.query[1, 3] *= score / float((p.query[1, 3] @ p.key[1, far]) * p.sm_scale)
    assert_same(of(p), exact(p), LARGE)
    if score > 0:
        assert ways == ["_attend_plain", "_attend_less_tops"]


@pytest.mark.parametrize("score", [-60.0, -120.0])
def test_a_row_whose_every_score_is_far_below_zero_is_not_empty(score, ways):
    p = problem(7, 50, ratio=1)
    p.key[0, :, 0] = 1.0
    p.query[0, 2] = 0.0
    p.query[0, 2, 0] = score / p.sm_scale
    p.query[0, 2, 1] = 1.0
    got, wanted = of(p), exact(p)
    assert_same(got, wanted, LARGE)
    assert float(wanted.lse[0, 2]) < score + 10.0
    assert ways[-1] == "_attend_less_tops"


@pytest.mark.parametrize("scale", [1.0, 40.0])
def test_both_ways_give_the_same(scale, monkeypatch):
    """What the plain way says where it may, the other one says of the same tensors."""
    p = problem(7, 77, ratio=7)
    p.query.mul_(scale)
    either = of(p)
    monkeypatch.setattr(products_cpu, "_SAFE_SUM", 2.0**-64)  # no sum is safe
    assert_same(of(p), exact(p), LARGE)
    assert_same(either, exact(p), LARGE)


@LAWFUL
@given(
    num_rows=st.integers(1, 9),
    num_keys=st.integers(2, 100),
    cut=st.floats(0.0, 1.0),
    ratio=st.sampled_from(GQA_RATIOS),
    scale=st.sampled_from([1.0, 30.0]),
    seed=st.integers(0, 99),
)
def test_keys_split_anywhere_and_merged_equal_the_whole(num_rows, num_keys, cut, ratio, scale, seed):
    p = problem(num_rows, num_keys, ratio=ratio, seed=seed)
    p.query.mul_(scale)
    at = min(num_keys - 1, max(1, round(cut * num_keys)))
    parts = [Problem(p.query, p.key[:, s], p.value[:, s], p.sm_scale) for s in (slice(0, at), slice(at, None))]
    assert_same(merge([of(part) for part in parts]), of(p), 1e-5 if scale == 1.0 else LARGE)


def test_rows_attend_the_same_alone_and_together():
    """A row whose scores are large makes all rows take the other way, and changes none of them."""
    p = problem(8, 60, ratio=1)
    p.query[:, 5] *= 80.0
    together = of(p)
    for row in range(8):
        alone = attend(p.query[:, row : row + 1], p.key, p.value, sm_scale=p.sm_scale)
        assert_same(Partial(together.out[:, row : row + 1], together.lse[:, row : row + 1]), alone, LARGE)


def test_what_is_not_a_number_stays_so():
    p = problem(7, 50, ratio=1)
    p.key[0, 20, 0] = float("nan")
    got = of(p)
    assert got.out[0].isnan().all()
    assert_same(Partial(got.out[1:], got.lse[1:]), Partial(exact(p).out[1:], exact(p).lse[1:]))


def test_no_input_is_changed():
    p = problem(7, 50, ratio=7)
    before = [x.clone() for x in (p.query, p.key, p.value)]
    of(p)
    assert all(torch.equal(x, old) for x, old in zip((p.query, p.key, p.value), before, strict=True))


@pytest.mark.parametrize("scale", [1.0, 60.0])
@pytest.mark.parametrize("ratio", [1, 7])
def test_a_range_of_layers_gives_what_attend_gives(ratio, scale, ways):
    layers = [problem(7, 50, ratio=ratio, seed=seed) for seed in range(3)]
    seen = KeyRange([p.key for p in layers], [p.value for p in layers])
    for layer, p in enumerate(layers):
        p.query.mul_(scale)
        got, wanted = seen.attend(layer, p.query, sm_scale=p.sm_scale), of(p)
        assert torch.equal(got.out, wanted.out)
        assert torch.equal(got.lse, wanted.lse)
    assert len(ways) >= 6


def test_products_are_chosen_by_rows_keys_and_dtype(monkeypatch):
    monkeypatch.undo()
    rows, keys = products_cpu._MIN_ROWS, products_cpu._MIN_KEYS
    query, key = torch.empty(2, rows, 8), torch.empty(2, keys, 8)
    assert products_cpu.products_pay(query, key)
    assert not products_cpu.products_pay(query[:, 1:], key)
    assert not products_cpu.products_pay(query, key[:, 1:])
    assert not products_cpu.products_pay(query.double(), key.double())
    assert not products_cpu.products_pay(torch.empty(2, products_cpu._MAX_ROWS + 1, 8), key)
