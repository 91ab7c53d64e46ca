"""The laws of decode rows over private tails."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_worlds import GQA_RATIOS, LAWFUL, ODD_SIZES, assert_same, oracle, poisoned

from spolia_kernels import BatchLens, Partial, TailKeys, attend, attend_batch, merge, merge_into
from spolia_kernels.attend import cpu as attend_cpu_module
from spolia_kernels.attend_batch import attend_batch_ref
from spolia_kernels.attend_batch import cpu as batch_cpu_module

REMAINS = (0.0, 1e3, -7.0)
"""What may lie past a length: nothing yet, or what was written there before."""


def by_lens(query, key, value, key_lens, *, sm_scale):
    lens = BatchLens.of(key_lens.tolist(), key_bytes=KEY_BYTES, dtype=query.dtype)
    return attend_batch(query, key, value, lens, sm_scale=sm_scale)


def by_tail_keys(query, key, value, key_lens, *, sm_scale):
    """In the second of two layers, in a second step."""
    tails = TailKeys(torch.stack((key, key)), torch.stack((value, value)))
    tails.begin([min(1, key.shape[2])] * len(key_lens))
    tails.begin(key_lens.tolist())
    return tails.attend(1, query, sm_scale=sm_scale)


KEY_BYTES = 20_000
"""Of a key: large, so that small tails of unlike length make several calls."""
PATHS = pytest.mark.parametrize("function", [by_lens, by_tail_keys, attend_batch_ref])


def tails(
    lens,
    *,
    num_kv_heads=2,
    ratio=2,
    head_dim=16,
    v_dim=None,
    max_keys=None,
    poison=5.0,
    seed=0,
    dtype=torch.float32,
):
    """Returns query, key, value and lengths; everything past a length is `poison`."""
    generator = torch.Generator().manual_seed(seed)
    max_keys = max(lens, default=0) + 3 if max_keys is None else max_keys

    def drawn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    query = poisoned(drawn(len(lens), num_kv_heads * ratio, head_dim))
    key = poisoned(drawn(len(lens), num_kv_heads, max_keys, head_dim))
    value = poisoned(drawn(len(lens), num_kv_heads, max_keys, head_dim if v_dim is None else v_dim))
    for sequence, num_keys in enumerate(lens):
        key[sequence, :, num_keys:] = poison
        value[sequence, :, num_keys:] = poison
    return query, key, value, torch.tensor(lens, dtype=torch.int64)


def one_by_one(query, key, value, key_lens, *, sm_scale) -> Partial:
    """Every sequence alone, by the float64 oracle."""
    parts = [
        oracle(query[b][:, None], key[b, :, :n], value[b, :, :n], sm_scale=sm_scale)
        for b, n in enumerate(key_lens.tolist())
    ]
    return Partial(torch.cat([part.out for part in parts], 1), torch.cat([part.lse for part in parts], 1))


@LAWFUL
@given(
    lens=st.lists(st.integers(0, 40), min_size=1, max_size=7),
    ratio=st.sampled_from(GQA_RATIOS),
    v_dim=st.sampled_from((8, 5)),
    poison=st.sampled_from(REMAINS),
    seed=st.integers(0, 99),
)
def test_a_sequence_attends_the_same_alone_and_in_a_batch(lens, ratio, v_dim, poison, seed):
    world = tails(lens, ratio=ratio, head_dim=8, v_dim=v_dim, poison=poison, seed=seed)
    wanted = one_by_one(*world, sm_scale=0.3)
    for function in (by_lens, attend_batch_ref):
        assert_same(function(*world, sm_scale=0.3), wanted)


@PATHS
@pytest.mark.parametrize("poison", REMAINS)
@pytest.mark.parametrize("v_dim", [16, 8])
def test_memory_past_a_length_never_counts(function, poison, v_dim):
    world = tails([0, 5, 5, 100, 1, 63], v_dim=v_dim, poison=poison)
    assert_same(function(*world, sm_scale=0.25), one_by_one(*world, sm_scale=0.25))


@PATHS
@pytest.mark.parametrize("length", ODD_SIZES)
def test_equal_neighbours_attend_as_each_would_alone(function, length):
    world = tails([length] * 3 + [7] + [length] * 2, ratio=7)
    got = function(*world, sm_scale=0.25)
    assert got.out.shape == (14, 6, 16)
    assert got.lse.shape == (14, 6)
    assert_same(got, one_by_one(*world, sm_scale=0.25))


@PATHS
def test_a_sequence_without_keys_is_an_empty_row(function):
    got = function(*tails([0, 3, 0], max_keys=4), sm_scale=0.25)
    assert (got.lse[:, [0, 2]] == float("-inf")).all()
    assert (got.out[:, [0, 2]] == 0).all()
    assert got.lse[:, 1].isfinite().all()


@PATHS
@pytest.mark.parametrize(("lens", "max_keys"), [([], 4), ([0, 0], 4), ([0, 0], 0)])
def test_no_sequences_or_no_keys_at_all_give_empty_rows(function, lens, max_keys):
    got = function(*tails(lens, max_keys=max_keys, v_dim=4), sm_scale=0.25)
    assert got.out.shape == (4, len(lens), 4)
    assert (got.out == 0).all()
    assert (got.lse == float("-inf")).all()


@PATHS
@pytest.mark.parametrize(("dtype", "error"), [(torch.float64, 1e-12), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)])
def test_every_dtype_gives_a_partial_of_the_promised_dtype(function, dtype, error):
    world = tails([9, 100, 100, 0], head_dim=64, dtype=dtype)
    got = function(*world, sm_scale=0.125)
    assert got.out.dtype == got.lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_same(got, one_by_one(*world, sm_scale=0.125), error)


@pytest.mark.parametrize(("key_bytes", "num_calls"), [(0, 4), (20_000, 7), (10**9, 9)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tails_attend_the_same_however_they_are_cut(key_bytes, num_calls, dtype, monkeypatch):
    calls = []
    fused = batch_cpu_module.flash
    monkeypatch.setattr(batch_cpu_module, "flash", lambda *args, **options: calls.append(1) or fused(*args, **options))
    query, key, value, key_lens = tails([3, 40, 0, 17, 17, 1, 29, 64, 0, 2, 8, 0, 0, 5], ratio=7, dtype=dtype)
    lens = BatchLens.of(key_lens.tolist(), key_bytes=key_bytes, dtype=dtype)
    got = attend_batch(query, key, value, lens, sm_scale=0.25)
    assert len(calls) == num_calls
    out_error, lse_error = (1e-5, 1e-5) if dtype == torch.float32 else (1e-2, 1e-3)
    assert_same(got, one_by_one(query, key, value, key_lens, sm_scale=0.25), out_error, lse_error=lse_error)


def test_padding_is_cut_off_where_a_call_costs_less():
    lens = BatchLens.of([100] * 4 + [101] * 3 + [4000, 90, 90], key_bytes=4096, dtype=torch.float32)
    assert [(cut.first, cut.count, cut.num_keys, cut.mask is None) for cut in lens.cuts] == [
        (0, 7, 101, False),
        (7, 1, 4000, True),
        (8, 2, 90, True),
    ]


def test_long_tails_may_be_cut_between_threads(monkeypatch):
    monkeypatch.setattr(batch_cpu_module, "_LONG_TAIL", 32)
    monkeypatch.setattr(attend_cpu_module, "_MIN_KEYS_PER_SPLIT", 16)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    world = tails([100, 31, 65, 65], num_kv_heads=1)
    assert_same(by_lens(*world, sm_scale=0.25), one_by_one(*world, sm_scale=0.25))


def test_a_shared_span_and_private_tails_merge_to_the_whole_context():
    """Hydragen's decomposition: all rows over the shared keys, each row over its own, one merge."""
    lens = [4, 0, 9, 2]
    query, key, value, key_lens = tails(lens)
    shared_key, shared_value = torch.randn(2, 50, 16), torch.randn(2, 50, 16)
    shared = attend(query.transpose(0, 1), shared_key, shared_value, sm_scale=0.25)
    private = by_lens(query, key, value, key_lens, sm_scale=0.25)
    wanted = [
        oracle(
            query[b][:, None],
            torch.cat([shared_key, key[b, :, :n]], 1),
            torch.cat([shared_value, value[b, :, :n]], 1),
            sm_scale=0.25,
        )
        for b, n in enumerate(lens)
    ]
    whole = Partial(torch.cat([part.out for part in wanted], 1), torch.cat([part.lse for part in wanted], 1))
    assert_same(merge([shared, private]), whole)
    merge_into(private, shared)
    assert_same(private, whole)


def test_a_span_that_some_rows_see_merges_into_those_rows_only():
    query, key, value, key_lens = tails([4, 6, 9])
    acc = by_lens(query, key, value, key_lens, sm_scale=0.25)
    untouched = acc.out[:, 1].clone()
    span_key, span_value = torch.randn(2, 20, 16), torch.randn(2, 20, 16)
    rows = torch.tensor([2, 0])
    merge_into(acc, attend(query[rows].transpose(0, 1), span_key, span_value, sm_scale=0.25), rows)
    assert torch.equal(acc.out[:, 1], untouched)
    for row, length in ((0, 4), (2, 9)):
        wanted = oracle(
            query[row][:, None],
            torch.cat([key[row, :, :length], span_key], 1),
            torch.cat([value[row, :, :length], span_value], 1),
            sm_scale=0.25,
        )
        assert_same(Partial(acc.out[:, row : row + 1], acc.lse[:, row : row + 1]), wanted)


@pytest.mark.parametrize("lens", [[5, -1], [5, 9]])
def test_lengths_outside_the_slab_are_refused(lens):
    query, key, value, _ = tails([5, 5], max_keys=8)
    with pytest.raises(ValueError, match=r"keys|lens"):
        by_lens(query, key, value, torch.tensor(lens), sm_scale=1.0)


def test_shapes_that_do_not_agree_are_refused():
    query, key, value, key_lens = tails([5, 5])
    for wrong in (
        (query[:1], key, value, key_lens),
        (query[..., :8], key, value, key_lens),
        (query[:, :3], key, value, key_lens),
        (query, key[:, :, :4], value, key_lens),
        (query, key, value, key_lens[:1]),
        (query[0], key, value, key_lens),
    ):
        with pytest.raises(ValueError, match=r"shapes|multiple|lens|dimensions"):
            by_lens(*wrong, sm_scale=1.0)
