"""The laws of attention by our own machine code, in every form that this processor can run."""

from __future__ import annotations

from threading import Thread

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_worlds import GQA_RATIOS, LAWFUL, ODD_SIZES, Problem, assert_same, oracle, problem

from spolia_kernels import KeyRange, Partial, attend, merge
from spolia_kernels.attend import attend_ref, flash_cpu, native_cpu
from spolia_kernels.attend.native_cpu import Division, attend_native, attend_private_native, way_of
from spolia_kernels.native import kernels as native_kernels
from spolia_kernels.native.kernels import Kernels, WhyNot
from spolia_kernels.native.machine_code import NoMachineCodeError, lanes_here
from spolia_kernels.native.team import parallel


def lanes_that_run() -> list[int]:
    """Floats a vector may have: this processor's, and fewer, which it runs as well."""
    try:
        return [lanes for lanes in (16, 8, 4) if lanes <= lanes_here()]
    except NoMachineCodeError:
        return []


LANES = lanes_that_run()
pytestmark = pytest.mark.skipif(not LANES, reason="kernels have no form for this processor")


@pytest.fixture(params=LANES)
def here(request: pytest.FixtureRequest) -> Kernels:
    return Kernels(request.param, parallel())


@pytest.fixture(params=["few rows", "blocks of rows"])
def either(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both kernels, whatever the number of rows."""
    monkeypatch.setattr(native_cpu, "FEW_ROWS", 10_000 if request.param == "few rows" else 0)


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing but the native kernels may attend."""
    monkeypatch.setattr(flash_cpu, "_FLASH", None)


def grouped(p: Problem) -> torch.Tensor:
    return p.query.reshape(p.key.shape[0], -1, p.query.shape[2])


def of(here: Kernels, p: Problem) -> Partial:
    """Attention with the rows of a GQA group stacked, as they are asked for."""
    query = grouped(p)
    found = attend_native(here, query, p.key, p.value, sm_scale=p.sm_scale)
    return Partial(found.out.reshape(*p.query.shape[:2], -1), found.lse.reshape(p.query.shape[:2]))


def exact(p: Problem) -> Partial:
    return attend_ref(p.query.double(), p.key.double(), p.value.double(), sm_scale=p.sm_scale)


@pytest.mark.usefixtures("either")
@pytest.mark.parametrize("ratio", GQA_RATIOS)
@pytest.mark.parametrize("num_rows", [1, 5, 16, 33, 100])
def test_it_equals_the_definition_at_odd_sizes_and_every_gqa_ratio(num_rows, ratio, here):
    for num_keys in ODD_SIZES:
        p = problem(num_rows, num_keys, ratio=ratio, head_dim=32, seed=num_keys)
        assert_same(of(here, p), exact(p))


@pytest.mark.usefixtures("either")
def test_it_equals_attention_row_by_row(here):
    p = problem(9, 70, head_dim=8)
    assert_same(of(here, p), oracle(p.query, p.key, p.value, sm_scale=p.sm_scale))


@pytest.mark.parametrize(("head_dim", "v_dim"), [(1, 1), (7, 3), (64, 17), (30, 128), (256, 64)])
def test_heads_of_any_width_are_attended_values_being_as_wide_as_they_are(head_dim, v_dim, here):
    p = problem(11, 150, head_dim=head_dim, v_dim=v_dim)
    assert_same(of(here, p), exact(p))


@pytest.mark.usefixtures("either")
@pytest.mark.parametrize("ratio", GQA_RATIOS)
def test_each_row_for_itself_gives_the_same(ratio, here):
    p = problem(9, 150, ratio=ratio)
    got = attend_private_native(here, p.query, p.key, p.value, sm_scale=p.sm_scale)
    assert_same(got, exact(p))


def test_few_rows_of_whole_vectors_go_one_by_one_and_others_in_blocks():
    def kernel(rows: int, lanes: int, *widths: int) -> tuple[str, int]:
        way = way_of(Kernels(lanes, parallel()), rows, *widths)
        return way.kernel, way.lanes

    assert kernel(7, 16, 64, 64) == ("attend_few-64-64", 16)
    assert kernel(7, 16, 72, 64) == ("attend_few-72-64", 8)
    assert kernel(7, 16, 64, 30) == ("attend_narrow", 16)
    assert kernel(8, 16, 64, 64) == kernel(16, 16, 64, 64) == ("attend_narrow", 16)
    assert kernel(33, 16, 64, 64) == ("attend_narrow", 16), "48 rows computed, not 64"
    assert kernel(32, 16, 64, 64) == kernel(63, 16, 64, 64) == ("attend_wide", 16)


@pytest.mark.parametrize("score", [0.0, 90.0, -90.0, 3000.0, -3000.0])
@pytest.mark.parametrize("far", [0, 127, 128, 299])
def test_one_key_may_score_far_from_all_others(score, far, here):
    p = problem(6, 300, ratio=1)
    p.key[:, far] = p.query[:, 0] * (score / (p.query[:, 0] * p.sm_scale).square().sum(-1, keepdim=True) * p.sm_scale)
    wanted = exact(p)
    assert_same(of(here, p), wanted, 1e-5 + 1e-6 * abs(score))


@pytest.mark.usefixtures("either")
@pytest.mark.parametrize("level", [-3000.0, 3000.0])
def test_a_row_whose_every_score_is_far_from_zero_is_as_exact_as_its_scores(level, here):
    p = problem(5, 200, ratio=1, head_dim=16)
    p.query[..., 0] = level / p.sm_scale
    p.key[..., 0] = 1.0
    assert_same(of(here, p), exact(p), 2e-3)  # 2^-24 of 3,000 is what a score is off by


@pytest.mark.usefixtures("either")
def test_what_is_not_a_number_stays_so(here):
    for spoilt in ("query", "key", "value"):
        p = problem(40, 140, ratio=1)
        getattr(p, spoilt)[0, -1, 0] = float("nan")
        out = of(here, p).out
        assert out[0, -1].isnan().any()
        assert not out[1].isnan().any(), "another head's"
        if spoilt == "query":
            assert not out[0, :-1].isnan().any(), "another row's"


@given(st.integers(1, 70), st.integers(2, 400), st.data())
@LAWFUL
def test_keys_split_anywhere_and_merged_equal_the_whole(num_rows, num_keys, data):
    cut = data.draw(st.integers(1, num_keys - 1))
    p = problem(num_rows, num_keys, ratio=1, seed=num_keys)
    here = Kernels(LANES[0], parallel())
    parts = [
        attend_native(here, p.query, p.key[:, keys], p.value[:, keys], sm_scale=p.sm_scale)
        for keys in (slice(cut), slice(cut, None))
    ]
    assert_same(merge(parts), of(here, p))


@pytest.mark.usefixtures("either")
@pytest.mark.parametrize("num_keys", [1, 130, 4000])
def test_a_row_gets_the_same_bits_whoever_is_attended_beside_it(num_keys, here):
    p = problem(70, num_keys, num_kv_heads=4, ratio=1)
    together = of(here, p)
    for rows in (slice(0, 1), slice(3, 20), slice(31, 70)):
        few = attend_native(here, p.query[:, rows], p.key, p.value, sm_scale=p.sm_scale)
        assert torch.equal(few.out, together.out[:, rows])
        assert torch.equal(few.lse, together.lse[:, rows])


def test_every_form_gives_the_same_bits():
    p = problem(37, 333, ratio=3)
    first, *others = [of(Kernels(lanes, parallel()), p) for lanes in LANES]
    for other in others:
        assert torch.equal(first.out, other.out)
        assert torch.equal(first.lse, other.lse)


@pytest.mark.usefixtures("either")
@pytest.mark.parametrize("num_threads", [1, 2, 3, 8])
def test_any_number_of_threads_shares_the_work(num_threads, here):
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        for num_kv_heads, num_rows, num_keys in ((1, 40, 3000), (3, 300, 70), (2, 5, 1500)):
            p = problem(num_rows, num_keys, num_kv_heads=num_kv_heads, ratio=1)
            assert_same(of(here, p), exact(p))
    finally:
        torch.set_num_threads(before)


@given(
    st.integers(1, 40), st.integers(1, 2000), st.integers(1, 40_000), st.sampled_from([8, 16, 32]), st.integers(1, 64)
)
@LAWFUL
def test_a_division_covers_every_row_and_key_once(heads, rows, keys, block_rows, threads):
    cut = Division.of(heads, rows, keys, block_rows, threads)
    assert cut.chunk_rows % block_rows == 0
    assert (cut.num_chunks - 1) * cut.chunk_rows < rows <= cut.num_chunks * cut.chunk_rows
    assert (cut.num_cuts - 1) * cut.cut_keys < keys <= cut.num_cuts * cut.cut_keys


def test_threads_may_attend_at_the_same_time():
    problems = [problem(rows, keys, ratio=1, seed=rows) for rows, keys in ((32, 700), (1, 900), (7, 300), (100, 333))]
    wanted = [exact(p) for p in problems]
    failures: list[BaseException] = []

    def attend_all() -> None:
        try:
            for p, one in [*zip(problems, wanted, strict=True)] * 8:
                assert_same(attend(p.query, p.key, p.value, sm_scale=p.sm_scale), one)
        except BaseException as error:
            failures.append(error)

    threads = [Thread(target=attend_all) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not failures
    assert not any(thread.is_alive() for thread in threads)


@pytest.mark.usefixtures("either")
def test_no_input_is_changed(here):
    p = problem(33, 129)
    before = [x.clone() for x in (p.query, p.key, p.value)]
    of(here, p)
    assert all(torch.equal(x, y) for x, y in zip((p.query, p.key, p.value), before, strict=True))


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("ratio", GQA_RATIOS)
def test_attend_and_a_range_of_layers_use_it(ratio):
    layers = [problem(6, 65, ratio=ratio, seed=seed) for seed in range(3)]
    seen = KeyRange([p.key for p in layers], [p.value for p in layers])
    for layer, p in enumerate(layers):
        assert_same(attend(p.query, p.key, p.value, sm_scale=p.sm_scale), exact(p))
        assert_same(seen.attend(layer, p.query, sm_scale=p.sm_scale), exact(p))


@pytest.mark.usefixtures("alone")
def test_keys_and_values_of_unequal_widths_use_it():
    p = problem(6, 65, head_dim=16, v_dim=10)
    assert_same(attend(p.query, p.key, p.value, sm_scale=p.sm_scale), exact(p))


def test_without_machine_code_torchs_kernels_do_the_same():
    p = problem(40, 300)
    with native_kernels.torch_kernels_only():
        assert native_cpu.native_for(grouped(p), p.key, p.value) is None
        assert_same(attend(p.query, p.key, p.value, sm_scale=p.sm_scale), exact(p))
    assert native_cpu.native_for(grouped(p), p.key, p.value) is not None


def test_the_environment_turns_it_off(monkeypatch):
    monkeypatch.setenv("SPOLIA_NATIVE_KERNELS", "0")
    assert native_kernels._kernels.__wrapped__() == WhyNot("turned off by SPOLIA_NATIVE_KERNELS=0")


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes_and_strides_are_left_to_torch(dtype):
    p = problem(8, 20, ratio=1)
    assert isinstance(native_cpu.native_for(p.query, p.key, p.value), Kernels)
    assert native_cpu.native_for(p.query.to(dtype), p.key.to(dtype), p.value.to(dtype)) is None
    assert native_cpu.native_for(p.query, p.key[:, :0], p.value[:, :0]) is None
    assert native_cpu.native_for(p.query, p.key.mT.contiguous().mT, p.value) is None
