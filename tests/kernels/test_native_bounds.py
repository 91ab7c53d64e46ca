"""Machine code writes where it was told to and nowhere else: what stands around its memory stays as it was."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from kernel_worlds import problem
from step_worlds import SOME, step_of

from spolia_kernels import Heads, SpanPass
from spolia_kernels.attend import native_cpu
from spolia_kernels.attend.native_cpu import attend_native, attend_private_native
from spolia_kernels.native import each_row
from spolia_kernels.native.kernels import FORMS, Kernels, kernels
from spolia_kernels.native.team import parallel

pytestmark = pytest.mark.skipif(not isinstance(kernels(), Kernels), reason="no machine code is to be had here")

MARGIN, MARK = 64, 1234.5


@pytest.fixture
def guarded(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every memory that is taken stands between margins, which are looked at in the end."""
    taken: list[torch.Tensor] = []

    def empty(*size: int, **_: object) -> torch.Tensor:
        count = math.prod(size)
        whole = torch.full((count + 2 * MARGIN,), MARK)
        taken.append(whole)
        whole[MARGIN : MARGIN + count] = math.nan
        return whole[MARGIN : MARGIN + count].view(size)

    monkeypatch.setattr(torch, "empty", empty)
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda self, *size: empty(*size))
    yield
    assert taken
    for whole in taken:
        assert (whole[:MARGIN] == MARK).all()
        assert (whole[-MARGIN:] == MARK).all()


@pytest.mark.usefixtures("guarded")
@pytest.mark.parametrize("few_rows", [0, 10_000])
@pytest.mark.parametrize("lanes", FORMS)
def test_attention_of_any_size_keeps_within_its_memory(lanes, few_rows, monkeypatch):
    here = kernels()
    assert isinstance(here, Kernels)
    if lanes > here.lanes:
        pytest.skip("this processor has no vectors that wide")
    monkeypatch.setattr(native_cpu, "FEW_ROWS", few_rows)
    for num_rows, num_keys, ratio in ((1, 1, 1), (5, 127, 3), (33, 128, 1), (70, 129, 2), (300, 40, 1), (3, 1100, 8)):
        p = problem(num_rows, num_keys, ratio=ratio, head_dim=32, num_kv_heads=1)
        stacked = p.query.reshape(1, -1, 32)
        form = Kernels(lanes, parallel())
        assert not attend_native(form, stacked, p.key, p.value, sm_scale=p.sm_scale).out.isnan().any()
        assert not attend_private_native(form, p.query, p.key, p.value, sm_scale=p.sm_scale).out.isnan().any()


@pytest.mark.usefixtures("guarded")
@pytest.mark.parametrize("ratio", [1, 7, 16])
@pytest.mark.parametrize("rows", [1, 9, 40])
def test_steps_of_any_size_keep_within_their_memory(rows, ratio):
    readers = [(70, tuple(range(rows)), True, True), (129, (0,), True, True), (64, tuple(range(rows)), False, False)]
    for found in step_of(rows, readers, ratio=ratio).native():
        assert not found.isnan().any()
    if rows == 9:
        assert len(step_of(rows, SOME, ratio=ratio).native()) == 2


@pytest.mark.usefixtures("guarded")
@pytest.mark.parametrize("rows", [1, 31, 100])
def test_passes_of_any_size_keep_within_their_memory(rows):
    here, heads = kernels(), Heads(6, 2, 32, 32)
    assert isinstance(here, Kernels)
    ranges = step_of(rows, [(70, tuple(range(rows)), True, True), (1, (rows - 1,), False, True)]).ranges
    query, key, value = (torch.randn(n, rows, 32) for n in (6, 2, 2))
    assert not SpanPass(here, heads, ranges, rows, sees_itself=True).attend(0, query, key, value, 0.2).isnan().any()


@pytest.mark.usefixtures("guarded")
@pytest.mark.parametrize("rows", [1, 3, 900])
@pytest.mark.parametrize("width", [4, 24, 96])
def test_rows_by_themselves_keep_within_their_memory(rows, width):
    x, weight = torch.randn(rows, 2 * width), torch.randn(2 * width)
    cos, sin = torch.randn(2, rows, width)
    found = (each_row.rms_norm(x, weight, 1e-5), each_row.silu_mul(x), each_row.rotate(x[None], cos, sin))
    assert not any(each is None or each.isnan().any() for each in found)
