"""What is measured is what a floor asks for."""

from __future__ import annotations

import torch

from spolia_bench.model_shape import ModelShape
from spolia_bench.reuse.floor import floor_of
from spolia_bench.reuse.operators import Pass, Seen, operators_of
from spolia_bench.reuse.rates import Care, measure_rates

SHAPE = ModelShape(layers=2, width=16, mlp=32, num_q_heads=4, num_kv_heads=2, head_dim=4, vocab=10)


def test_every_operator_of_a_pass_gets_a_rate_and_threads_stay_as_they_were() -> None:
    before = torch.get_num_threads()
    operators = operators_of(Pass(6, (Seen(4, 20), Seen(2, 30)), (6,)), SHAPE)
    floor = floor_of(operators, measure_rates(operators, num_threads=1, care=Care(num_stretches=1)))
    assert min(floor.matmul_ms, floor.attention_ms, floor.other_ms) > 0
    assert torch.get_num_threads() == before
