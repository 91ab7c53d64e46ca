"""What the engine makes of the captured step: its start, and steps with the host's share, planning and draws included.

Rows are samples of one prompt, so they share all of it but their answers.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from spolia_bench.frame import Sample
from spolia_bench.gpu.batches import DEVICE
from spolia_bench.gpu.linked import RandomAdapter
from spolia_bench.gpu.steps import Shape
from spolia_bench.gpu.timing import figures, timed, wait
from spolia_core.sampling import SamplingParams
from spolia_engine.core import EngineCore
from spolia_engine.device_decoding import DeviceDecoding, DeviceSettings
from spolia_engine.next_tokens import accept_row
from spolia_engine.sequence import Sequence as DecodeSequence
from spolia_engine.sequence import close_all
from spolia_engine.sequence_starts import start_samples
from spolia_engine.slot_memory import DEVICE_BLOCK_SIZE

SHARED = 4096
ROWS = (1, 32, 256)
STEPS = 16
WARM = 2
DEFAULTS = DeviceSettings()


def compare(
    shape: Shape, *, rows: Sequence[int] = ROWS, shared: int = SHARED, settings: DeviceSettings = DEFAULTS
) -> Iterator[dict[str, Any]]:
    """A row of figures per number of sequences; the first has those of the start, too."""
    params = SamplingParams(temperature=1.0, max_tokens=WARM + 2 * STEPS + 2)
    of_tail = -(-params.max_tokens // DEVICE_BLOCK_SIZE) + 1
    core = EngineCore(
        RandomAdapter(shape, shared + params.max_tokens),
        lambda token_ids: "",
        num_blocks=-(-shared // DEVICE_BLOCK_SIZE) + max(rows) * of_tail,
        block_size=DEVICE_BLOCK_SIZE,
        device=settings,
    )
    device = core.decoding.device
    assert device is not None
    figures_of_start = _start(device, settings, shape)
    prompt = [7 * i % shape.vocab for i in range(shared)]
    figures_of_start |= _prompt(core, prompt)
    for count in rows:
        sequences = start_samples(
            core.exact_context(prompt, []), [core.generation(params, index) for index in range(count)]
        )
        for sequence, row in zip(sequences, core.decoding.first_rows(sequences), strict=True):
            accept_row(sequence.generation, row)
        before = device.num_eager_steps
        found: dict[str, Any] = {"model": shape.name, "point": f"{count}x{shared}", **figures_of_start}
        found |= figures("step", _steps(core, sequences))
        found["eager_steps"] = device.num_eager_steps - before
        assert device.loaded is not None
        found |= figures("graph", timed(device.loaded.run, repeats=STEPS, warm=0))
        found["host_ms"] = found["step_ms"] - found["graph_ms"]
        core.decoding.forget_plan()
        close_all(sequences)
        core.pool.check_invariants()
        figures_of_start = {}
        yield found


def _start(device: DeviceDecoding, settings: DeviceSettings, shape: Shape) -> dict[str, Any]:
    """How long capture takes, and what it takes of the device's memory beside what was foreseen for it."""
    foreseen = settings.buffer_bytes(
        num_q_heads=shape.heads.num_q_heads, head_dim=shape.heads.head_dim, vocab_size=shape.vocab, itemsize=2
    )
    before, began = _free_bytes(), time.perf_counter()
    device.prepare()
    wait()
    found: dict[str, Any] = {"start_s": time.perf_counter() - began, "foreseen_mib": foreseen / 2**20}
    after = _free_bytes()
    return found if before is None or after is None else {**found, "taken_mib": (before - after) / 2**20}


def _prompt(core: EngineCore, token_ids: Sequence[int]) -> dict[str, Any]:
    """What a row of a prompt's pass takes of the device's memory while the pass runs."""
    if DEVICE != "cuda":
        core.exact_context(token_ids, []).close()
        return {}
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    core.exact_context(token_ids, []).close()
    return {"row_kib": (torch.cuda.max_memory_allocated() - before) / len(token_ids) / 1024}


def _steps(core: EngineCore, sequences: Sequence[DecodeSequence]) -> Sample:
    """From one token of all rows to the next, the host's share included."""
    found = []
    for _ in range(WARM + STEPS):
        wait()
        began = time.perf_counter()
        for sequence, row in zip(sequences, core.decoding.step_rows(sequences), strict=True):
            accept_row(sequence.generation, row)
        found.append(1e3 * (time.perf_counter() - began))
    return Sample(tuple(found[WARM:]))


def _free_bytes() -> int | None:
    return torch.cuda.mem_get_info()[0] if DEVICE == "cuda" else None
