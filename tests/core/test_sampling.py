"""The generator of draws, and the limits of sampling parameters."""

from __future__ import annotations

import math
import subprocess
import sys
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spolia_core.errors import InvalidRequest
from spolia_core.sampling import MAX_STOP_BYTES, MAX_STOP_STRINGS, SamplingParams, uniform

GOLDEN = {
    (0, 0, 0): "0x1.4bc5720b7e450p-5",
    (0, 0, 1): "0x1.8441b6eb1c592p-1",
    (0, 1, 0): "0x1.bcf778777a8c8p-1",
    (2**64 - 1, 3, 10**6): "0x1.1396e6f846057p-1",
}


def test_draws_are_what_they_have_always_been() -> None:
    """A change here changes every replay: nodes of both versions would draw different tokens."""
    assert {counter: uniform(*counter).hex() for counter in GOLDEN} == GOLDEN


def test_another_process_draws_the_same() -> None:
    code = "from spolia_core.sampling import uniform; print([uniform(5, 6, i).hex() for i in range(20)])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert found.stdout.strip() == str([uniform(5, 6, i).hex() for i in range(20)])


@given(st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1))
def test_draws_lie_in_the_half_open_unit_interval(seed: int, sample: int, token: int) -> None:
    assert 0.0 <= uniform(seed, sample, token) < 1.0


@pytest.mark.parametrize("which", [0, 1, 2])
def test_draws_are_spread_evenly_over_every_counter(which: int) -> None:
    count = 4000
    draws = [uniform(*(i if place == which else 7 for place in range(3))) for i in range(count)]
    assert len(set(draws)) == count
    tenths = [sum(k / 10 <= draw < (k + 1) / 10 for draw in draws) for k in range(10)]
    statistic = sum((n - count / 10) ** 2 / (count / 10) for n in tenths)
    assert statistic < 9 + 5 * math.sqrt(18)
    mean = sum(draws) / count
    neighbours = sum((a - mean) * (b - mean) for a, b in pairwise(draws)) / count * 12
    assert abs(neighbours) < 5 / math.sqrt(count)


@pytest.mark.parametrize(
    ("params", "field"),
    [
        (SamplingParams(temperature=-0.1), "temperature"),
        (SamplingParams(temperature=100.5), "temperature"),
        (SamplingParams(temperature=math.inf), "temperature"),
        (SamplingParams(temperature=math.nan), "temperature"),
        (SamplingParams(top_p=0.0), "top_p"),
        (SamplingParams(top_p=1.01), "top_p"),
        (SamplingParams(top_p=math.nan), "top_p"),
        (SamplingParams(top_k=-1), "top_k"),
        (SamplingParams(seed=-1), "seed"),
        (SamplingParams(seed=2**64), "seed"),
        (SamplingParams(max_tokens=0), "max_tokens"),
        (SamplingParams(stop=("",)), "stop"),
        (SamplingParams(stop=("é" * 129,)), "stop"),
        (SamplingParams(stop=("a",) * (MAX_STOP_STRINGS + 1)), "stop"),
    ],
)
def test_a_bad_value_is_refused_by_field_limit_and_value(params: SamplingParams, field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        params.validate()
    assert caught.value.field == f"sampling.{field}"
    assert caught.value.limit in caught.value.message
    assert caught.value.actual in caught.value.message


def test_values_at_their_limits_are_taken() -> None:
    SamplingParams().validate()
    stop = ("é" * (MAX_STOP_BYTES // 2),) * MAX_STOP_STRINGS
    SamplingParams(100.0, top_p=1.0, top_k=10**9, seed=2**64 - 1, max_tokens=1, stop=stop).validate()
    SamplingParams(temperature=0.0, top_p=1e-9).validate()
    assert SamplingParams().is_greedy
    assert not SamplingParams(temperature=1e-9).is_greedy
