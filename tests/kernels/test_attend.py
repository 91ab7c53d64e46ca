"""The laws of attention over one set of keys."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_worlds import (
    FLOAT32_ERROR,
    GQA_RATIOS,
    LAWFUL,
    ODD_SIZES,
    assert_same,
    largest,
    oracle,
    problem,
)
from torch.utils._python_dispatch import TorchDispatchMode

from spolia_kernels import KeyRange, attend, merge
from spolia_kernels.attend import attend_ref, cpu, flash_cpu
from spolia_kernels.native.kernels import torch_kernels_only


def paths(p, *, causal=False):
    """Yields what the dispatch and the reference give for `p`."""
    yield attend(p.query, p.key, p.value, sm_scale=p.sm_scale, causal=causal)
    yield attend_ref(p.query, p.key, p.value, sm_scale=p.sm_scale, causal=causal)


@pytest.fixture
def flash_calls(monkeypatch) -> Iterator[list[tuple[int, ...]]]:
    """Records the key shape of every call of the fused kernel, which attends what our own would."""
    calls: list[tuple[int, ...]] = []
    fused = flash_cpu._FLASH

    def recorded(query, key, *rest, **options):
        calls.append(tuple(key.shape))
        return fused(query, key, *rest, **options)

    monkeypatch.setattr(flash_cpu, "_FLASH", recorded)
    with torch_kernels_only():
        yield calls


@pytest.mark.parametrize("num_keys", ODD_SIZES)
@pytest.mark.parametrize("num_rows", [1, 5, 33])
@pytest.mark.parametrize("causal", [False, True])
def test_attend_equals_the_definition_in_float64_at_odd_sizes(num_rows, num_keys, causal):
    p = problem(num_rows, num_keys, seed=num_keys)
    wanted = oracle(p.query, p.key, p.value, sm_scale=p.sm_scale, causal=causal)
    for got in paths(p, causal=causal):
        assert got.out.dtype == got.lse.dtype == torch.float32
        assert_same(got, wanted)


@pytest.mark.parametrize("ratio", GQA_RATIOS)
@pytest.mark.parametrize("num_kv_heads", [1, 2, 3])
@pytest.mark.parametrize("causal", [False, True])
def test_query_head_h_reads_kv_head_h_over_the_ratio(ratio, num_kv_heads, causal):
    p = problem(3, 40, ratio=ratio, num_kv_heads=num_kv_heads)
    for got in paths(p, causal=causal):
        assert_same(got, oracle(p.query, p.key, p.value, sm_scale=p.sm_scale, causal=causal))


@pytest.mark.parametrize(("head_dim", "v_dim"), [(16, 8), (8, 24), (5, 1), (1, 7), (64, 64), (128, 128), (20, 20)])
@pytest.mark.parametrize("causal", [False, True])
def test_k_and_v_may_have_any_widths(head_dim, v_dim, causal):
    p = problem(6, 50, head_dim=head_dim, v_dim=v_dim, ratio=3)
    for got in paths(p, causal=causal):
        assert got.out.shape[2] == v_dim
        assert_same(got, oracle(p.query, p.key, p.value, sm_scale=p.sm_scale, causal=causal))


@LAWFUL
@given(
    num_rows=st.integers(0, 9),
    num_keys=st.integers(0, 70),
    cut=st.floats(0, 1),
    ratio=st.sampled_from(GQA_RATIOS),
    v_dim=st.sampled_from((8, 12)),
    seed=st.integers(0, 99),
)
def test_keys_split_anywhere_and_merged_equal_the_whole(num_rows, num_keys, cut, ratio, v_dim, seed):
    p = problem(num_rows, num_keys, ratio=ratio, head_dim=8, v_dim=v_dim, seed=seed)
    at = round(cut * num_keys)
    parts = [
        attend(p.query, p.key[:, keys], p.value[:, keys], sm_scale=p.sm_scale)
        for keys in (slice(None, at), slice(at, None))
    ]
    assert_same(merge(parts), oracle(p.query, p.key, p.value, sm_scale=p.sm_scale))


@LAWFUL
@given(
    num_rows=st.integers(0, 20),
    num_keys=st.integers(0, 40),
    cut=st.floats(0, 1),
    v_dim=st.sampled_from((8, 12)),
    seed=st.integers(0, 99),
)
def test_causal_rows_split_anywhere_equal_the_whole(num_rows, num_keys, cut, v_dim, seed):
    """The last rows over all keys, and the first over the keys they may see, are the whole: bottom-right alignment."""
    p = problem(num_rows, num_keys, head_dim=8, v_dim=v_dim, seed=seed)
    at = round(cut * num_rows)
    seen = max(0, num_keys - (num_rows - at))
    whole = attend(p.query, p.key, p.value, sm_scale=p.sm_scale, causal=True)
    first = attend(p.query[:, :at], p.key[:, :seen], p.value[:, :seen], sm_scale=p.sm_scale, causal=True)
    last = attend(p.query[:, at:], p.key, p.value, sm_scale=p.sm_scale, causal=True)
    assert_same(whole, oracle(p.query, p.key, p.value, sm_scale=p.sm_scale, causal=True))
    assert_same(type(whole)(torch.cat([first.out, last.out], 1), torch.cat([first.lse, last.lse], 1)), whole)


@LAWFUL
@given(order=st.permutations(range(6)), block=st.integers(1, 20), seed=st.integers(0, 99))
def test_permuting_blocks_of_keys_leaves_the_result(order, block, seed):
    p = problem(4, 6 * block, seed=seed)
    moved = torch.cat([torch.arange(i * block, (i + 1) * block) for i in order])
    whole = attend(p.query, p.key, p.value, sm_scale=p.sm_scale)
    assert_same(attend(p.query, p.key[:, moved], p.value[:, moved], sm_scale=p.sm_scale), whole)


@pytest.mark.parametrize("num_keys", [1, 100, 700])
def test_rows_attend_the_same_alone_and_together(num_keys):
    p = problem(40, num_keys, ratio=3)
    together = attend(p.query, p.key, p.value, sm_scale=p.sm_scale)
    for row in (0, 17, 39):
        alone = attend(p.query[:, row : row + 1], p.key, p.value, sm_scale=p.sm_scale)
        assert largest(alone.out - together.out[:, row : row + 1]) < FLOAT32_ERROR
        assert largest(alone.lse - together.lse[:, row : row + 1]) < FLOAT32_ERROR


@pytest.mark.parametrize(("num_rows", "num_keys"), [(0, 0), (0, 9), (9, 0)])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("v_dim", [16, 4])
def test_zero_rows_or_zero_keys_give_an_empty_partial(num_rows, num_keys, causal, v_dim):
    p = problem(num_rows, num_keys, v_dim=v_dim)
    for got in paths(p, causal=causal):
        assert got.out.shape == (4, num_rows, v_dim)
        assert got.lse.shape == (4, num_rows)
        assert (got.out == 0).all()
        assert (got.lse == float("-inf")).all()


@pytest.mark.parametrize("v_dim", [16, 4])
def test_rows_that_see_no_key_are_empty_and_the_rest_are_not(v_dim):
    p = problem(7, 3, v_dim=v_dim)
    for got in paths(p, causal=True):
        assert (got.lse[:, :4] == float("-inf")).all()
        assert (got.out[:, :4] == 0).all()
        assert got.lse[:, 4:].isfinite().all()
        assert largest(got.out[:, 4] - p.value[:, 0].repeat_interleave(2, 0)) < FLOAT32_ERROR  # one key: its value


@pytest.mark.parametrize("ratio", [1, 7])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("dtype", "out_error", "lse_error"),
    [
        (torch.float32, 1e-5, 1e-5),
        (torch.bfloat16, 1e-2, 1e-3),
        (torch.float16, 2e-3, 2e-4),
        (torch.float64, 1e-12, 1e-12),
    ],
)
def test_the_fused_path_agrees_with_the_reference_in_every_dtype(
    ratio, causal, dtype, out_error, lse_error, flash_calls
):
    """Measured in bfloat16: 5e-3 in `out`, one rounding of values of size 1; 5e-5 in `lse`."""
    p = problem(50, 333, ratio=ratio, head_dim=64, dtype=dtype)
    got = attend(p.query, p.key, p.value, sm_scale=p.sm_scale, causal=causal)
    assert flash_calls
    wanted = attend_ref(p.query.double(), p.key.double(), p.value.double(), sm_scale=p.sm_scale, causal=causal)
    assert got.out.dtype == got.lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_same(got, wanted, out_error, lse_error=lse_error)


def test_large_scores_neither_overflow_nor_lose_the_winner():
    p = problem(3, 200)
    for got in (attend(p.query, p.key, p.value, sm_scale=60.0), attend_ref(p.query, p.key, p.value, sm_scale=60.0)):
        assert_same(got, oracle(p.query, p.key, p.value, sm_scale=60.0), 1e-3)


def test_the_reference_in_float64_is_exact_to_float64():
    p = problem(5, 129, dtype=torch.float64, ratio=3)
    got = attend_ref(p.query, p.key, p.value, sm_scale=p.sm_scale, causal=True)
    assert got.out.dtype == torch.float64
    assert_same(got, oracle(p.query, p.key, p.value, sm_scale=p.sm_scale, causal=True), 1e-13)


@pytest.mark.parametrize("causal", [False, True])
def test_any_strides_are_read_right(causal):
    """Token-major buffers, and K stored transposed, whose last stride the fused kernel would ignore."""
    p = problem(5, 40, ratio=2)
    wanted = oracle(p.query, p.key, p.value, sm_scale=p.sm_scale, causal=causal)
    token_major = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in (p.query, p.key, p.value)]
    dim_major = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (p.query, p.key, p.value)]
    for query, key, value in (
        token_major,
        dim_major,
        (dim_major[0], *token_major[1:]),
        (*token_major[:2], dim_major[2]),
    ):
        assert_same(attend(query, key, value, sm_scale=p.sm_scale, causal=causal), wanted)


@pytest.mark.parametrize("num_rows", [1, 7])
@pytest.mark.parametrize("causal", [False, True])
def test_the_fused_path_reads_k_and_v_in_place(num_rows, causal, flash_calls):
    """Views of a larger extent are the normal case: nothing as large as the keys may be allocated."""
    p = problem(num_rows, 3000, ratio=2)
    allocated: list[tuple[str, int]] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if not func.is_view:
                outputs = result if isinstance(result, tuple) else (result,)
                allocated.extend((str(func), x.numel()) for x in outputs if isinstance(x, torch.Tensor))
            return result

    with Watch():
        attend(p.query, p.key, p.value, sm_scale=p.sm_scale, causal=causal)
    assert flash_calls
    assert [entry for entry in allocated if entry[1] >= p.key.numel() // 2] == []


@pytest.mark.parametrize("num_threads", [2, 3, 8])
@pytest.mark.parametrize("num_keys", [64, 67, 130])
def test_cutting_keys_between_threads_leaves_the_result(num_threads, num_keys, monkeypatch, flash_calls):
    monkeypatch.setattr(cpu, "_MIN_KEYS_PER_SPLIT", 16)
    monkeypatch.setattr(cpu.torch, "get_num_threads", lambda: num_threads)
    p = problem(2, num_keys, num_kv_heads=1, ratio=7)
    got = attend(p.query, p.key, p.value, sm_scale=p.sm_scale)
    assert flash_calls[0][0] == min(num_threads, num_keys // 16)  # the cuts are the batch dimension
    assert_same(got, oracle(p.query, p.key, p.value, sm_scale=p.sm_scale))


def test_keys_are_cut_only_where_threads_would_idle(monkeypatch):
    monkeypatch.setattr(cpu.torch, "get_num_threads", lambda: 4)
    assert cpu.num_splits(1, 1, 1 << 20) == 4
    assert cpu.num_splits(2, 1, 1 << 20) == 2
    assert cpu.num_splits(5, 1, 1 << 20) == 4
    assert cpu.num_splits(4, 1, 1 << 20) == 1
    assert cpu.num_splits(7, 1, 1 << 20) == 1
    assert cpu.num_splits(1, 1, 100) == 1


@pytest.mark.parametrize("causal", [False, True])
def test_bounding_the_scores_held_at_once_leaves_the_result(causal, monkeypatch):
    monkeypatch.setattr(cpu, "_MAX_SCORES", 256)
    p = problem(40, 300, v_dim=8)
    got = attend(p.query, p.key, p.value, sm_scale=p.sm_scale, causal=causal)
    assert_same(got, oracle(p.query, p.key, p.value, sm_scale=p.sm_scale, causal=causal))


def test_mixed_dtypes_take_the_reference_and_are_not_rounded(flash_calls):
    p = problem(3, 30)
    key, value = p.key.bfloat16(), p.value.bfloat16()
    got = attend(p.query, key, value, sm_scale=p.sm_scale)
    assert not flash_calls
    assert_same(got, oracle(p.query, key, value, sm_scale=p.sm_scale))


@pytest.mark.parametrize(
    ("query", "key", "value"),
    [
        ((4, 1, 8), (2, 5, 9), (2, 5, 8)),  # head_dim
        ((4, 1, 8), (2, 5, 8), (2, 6, 8)),  # keys and values
        ((4, 1, 8), (2, 5, 8), (1, 5, 8)),  # heads of K and V
        ((4, 1, 8), (3, 5, 8), (3, 5, 8)),  # no GQA ratio
        ((4, 1, 8), (0, 5, 8), (0, 5, 8)),
        ((4, 8), (2, 5, 8), (2, 5, 8)),
    ],
)
def test_shapes_that_do_not_agree_are_refused(query, key, value):
    for function in (attend, attend_ref):
        with pytest.raises(ValueError, match=r"head|keys|dimensions"):
            function(torch.zeros(query), torch.zeros(key), torch.zeros(value), sm_scale=1.0)


def test_inputs_are_left_unchanged():
    p = problem(3, 20)
    before = [x.clone() for x in (p.query, p.key, p.value)]
    attend(p.query, p.key, p.value, sm_scale=p.sm_scale, causal=True)
    assert all(torch.equal(x, y) for x, y in zip((p.query, p.key, p.value), before, strict=True))


@pytest.mark.parametrize(("ratio", "num_kv_heads"), [(1, 8), (7, 2), (8, 1)])
@pytest.mark.parametrize(("num_rows", "num_keys"), [(1, 40), (5, 63), (32, 700), (1, 9000)])
@pytest.mark.parametrize("v_dim", [16, 8])
def test_a_range_of_layers_gives_what_attend_gives(ratio, num_kv_heads, num_rows, num_keys, v_dim):
    """Also where the keys are split between threads, or their widths keep the fused kernel out."""
    layers = [
        problem(num_rows, num_keys, ratio=ratio, num_kv_heads=num_kv_heads, head_dim=16, v_dim=v_dim, seed=seed)
        for seed in range(3)
    ]
    seen = KeyRange([p.key for p in layers], [p.value for p in layers])
    for layer, p in enumerate(layers):
        wanted = attend(p.query, p.key, p.value, sm_scale=p.sm_scale)
        got = seen.attend(layer, p.query, sm_scale=p.sm_scale)
        assert torch.equal(got.out, wanted.out)
        assert torch.equal(got.lse, wanted.lse)
