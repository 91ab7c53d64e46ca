"""What Triton compiles for Hopper of the sampling kernels draws what their reference does, by a machine for PTX: from a
row's likeliest few, from more of them, and from all of it; many warps a program, which share memory between barriers.
"""

from __future__ import annotations

from functools import cache
from itertools import product

import pytest
import torch
from compiled_worlds import Asked, Compiled, compiled
from ptx_memory_worlds import DeviceMemory

from spolia_core.sampling import SamplingParams, uniform
from spolia_kernels.sample import Drawn, Draws, sample_ref

pytest.importorskip("triton", reason="Triton has wheels for Linux only")

STRIP, STRIPS, NUM_WARPS = 8, 4, 2
SIZES = {"FEW": 4, "CAPACITY": 64, "BLOCK": 128, "LIST_BLOCK": 64}
VOCAB = 203
NUM_PARTS, NUM_STRIPS = 7, 28
KINDS = {"stride_row": "i32", "vocab": "i32", "num_parts": "i32", "num_rows": "*i32", "top_ks": "*i32"}
KINDS |= dict.fromkeys(("highest", "chosen_strips", "few_keys", "few_ids"), "*i32")
KINDS |= dict.fromkeys(("temperatures", "top_ps", "numbers", "out"), "*fp64") | {"count": "i32"}
KINDS |= dict.fromkeys(("seeds", "sample_indices", "token_indices", "token_ids"), "*i64")
KINDS |= dict.fromkeys(("part_tops", "part_sums", "part_masses", "logprobs"), "*fp32")

PARAMS = [
    SamplingParams(),
    SamplingParams(temperature=1.0, seed=1),
    SamplingParams(temperature=1.0, top_k=3, seed=2),
    SamplingParams(temperature=0.7, top_p=0.8, seed=3),
    SamplingParams(temperature=2.0, top_k=20, top_p=0.9, seed=4),
    SamplingParams(temperature=100.0, top_p=0.99, seed=5),
]


@cache
def _compiled() -> list[Compiled]:
    sizes = {"STRIP": STRIP, "STRIPS": STRIPS}
    kernels = [
        ("counter_triton:uniform_kernel", {"BLOCK": 32}, 1),
        ("summary_triton:summarize_kernel", sizes, NUM_WARPS),
        ("sample_triton:sample_kernel", sizes | SIZES | {"NUM_STRIPS": 32, "NUM_PARTS": 8}, NUM_WARPS),
    ]
    return compiled(
        [
            Asked(f"spolia_kernels.sample.{kernel}", "*bf16", constants, {"num_warps": num_warps}, KINDS)
            for kernel, constants, num_warps in kernels
        ]
    )


def draws_of(params: SamplingParams, num_rows: int) -> Draws:
    """Row r is sample r."""
    seed = torch.full((num_rows,), params.seed)
    return Draws(
        torch.full((num_rows,), params.temperature, dtype=torch.float64),
        torch.full((num_rows,), params.top_p, dtype=torch.float64),
        torch.full((num_rows,), params.top_k, dtype=torch.int32),
        seed,
        torch.arange(num_rows),
        torch.zeros(num_rows, dtype=torch.int64),
    )


def by_the_compiled(logits: torch.Tensor, params: SamplingParams) -> Drawn:
    """What the kernels draw, one program after the other, from the first VOCAB numbers of every row but the last."""
    rows, memory = logits.shape[0], DeviceMemory(4 << 20)
    there, draws = rows - 1, draws_of(params, rows)

    def ints(*shape: int) -> torch.Tensor:
        return torch.full(shape, 7, dtype=torch.int32)

    def floats(*shape: int) -> torch.Tensor:
        return torch.full(shape, torch.nan)

    into = Drawn(torch.full((rows,), 7), torch.full((rows,), 7.0))
    tensors = {
        "logits": logits,
        "num_rows": torch.tensor([there], dtype=torch.int32),
        "temperatures": draws.temperature,
        "top_ps": draws.top_p,
        "top_ks": draws.top_k,
        "seeds": draws.seed,
        "sample_indices": draws.sample_index,
        "token_indices": draws.token_index,
        "numbers": torch.full((rows,), torch.nan, dtype=torch.float64),
        "highest": ints(rows, NUM_STRIPS),
        "part_tops": floats(rows, NUM_PARTS),
        "part_sums": floats(rows, NUM_PARTS),
        "part_masses": floats(rows, NUM_PARTS),
        "chosen_strips": ints(rows, 32),
        "few_keys": ints(rows, SIZES["CAPACITY"]),
        "few_ids": ints(rows, SIZES["CAPACITY"]),
        "token_ids": into.token_ids,
        "logprobs": into.logprobs,
    }
    given = {name: memory.put(tensor) for name, tensor in tensors.items()}
    given |= {"stride_row": logits.stride(0), "vocab": VOCAB, "num_parts": NUM_PARTS}
    given |= {"out": given["numbers"], "count": rows}
    launches = zip(_compiled(), [(1, 1), (NUM_PARTS, rows), (rows, 1)], [1, NUM_WARPS, NUM_WARPS], strict=True)
    for kernel, grid, num_warps in launches:
        parameters = [*(given[name] for name in kernel.arguments), 0, 0]
        for program in product(*map(range, grid)):
            kernel.program.run(memory, parameters, program, num_warps, grid)
    numbers = memory.get(given["numbers"], tensors["numbers"])
    assert numbers.tolist() == [uniform(params.seed, row, 0) for row in range(rows)]
    return Drawn(memory.get(given["token_ids"], into.token_ids), memory.get(given["logprobs"], into.logprobs))


def flat(rows: int) -> torch.Tensor:
    """Logits of which no few hold most of the probability, and many are equal."""
    return torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(1)).bfloat16()


def sure(rows: int) -> torch.Tensor:
    """Nearly all of it on five tokens."""
    logits = flat(rows)
    for row in range(rows):
        logits[row, [3 + row, 40, 41, 130, 202]] += 12.0
    return logits


def odd(rows: int) -> torch.Tensor:
    """No number, infinite, masked but for two, masked whole, all equal."""
    logits = flat(rows)
    logits[0, 77] = torch.nan
    logits[1, 5] = torch.inf
    logits[2] = -torch.inf
    logits[2, [9, 150]] = torch.tensor([1.0, 1.5]).bfloat16()
    logits[3] = -torch.inf
    logits[4] = 0.0
    return logits


@pytest.mark.parametrize("params", PARAMS, ids=lambda p: f"{p.temperature}-{p.top_k}-{p.top_p}")
@pytest.mark.parametrize("spread", [flat, sure, odd], ids=lambda spread: str(spread.__name__))
def test_the_compiled_kernels_draw_what_the_reference_does(spread: object, params: SamplingParams) -> None:
    assert callable(spread)
    rows = 6
    # Rows lie further apart than they are long, and no numbers lie between them.
    memory = torch.full((rows, VOCAB + 5), torch.nan, dtype=torch.bfloat16)
    logits = memory[:, :VOCAB]
    logits.copy_(spread(rows))
    found = by_the_compiled(memory, params)
    expected = sample_ref(logits[:-1], draws_of(params, rows - 1))
    assert found.token_ids.tolist() == [*expected.token_ids.tolist(), 7]
    torch.testing.assert_close(found.logprobs[:-1], expected.logprobs, atol=1e-5, rtol=1e-5, equal_nan=True)
