"""With `deterministic`, a sequence's numbers are the same to the bit, whoever decodes beside it."""

from __future__ import annotations

import pytest
import torch
from engine_worlds import assert_nothing_held, engine_of, only_in_extents, tokens

from spolia_core.sampling import SamplingParams
from spolia_engine.core import EngineCore
from spolia_engine.next_tokens import accept_row
from spolia_engine.sequence import Sequence, close_all
from spolia_engine.sequence_starts import start_sequence

pytestmark = pytest.mark.usefixtures("place")

PARAMS = SamplingParams(temperature=1.0, seed=3, max_tokens=40, ignore_eos=True)
STEPS = 30


def started(core: EngineCore, length: int, seed: int) -> Sequence:
    context = core.exact_context(tokens(length, seed), [])
    sequence = start_sequence(context, core.generation(PARAMS))
    accept_row(sequence.generation, core.decoding.logits_after([sequence.context])[0])
    return sequence


def watched(core: EngineCore, mates_at: dict[int, list[int]]) -> torch.Tensor:
    """Logits of one sequence's steps; at some steps others join, of these lengths."""
    sequence = started(core, 70, 0)
    mates: list[Sequence] = []
    seen = []
    for step in range(STEPS):
        mates += [started(core, length, length) for length in mates_at.get(step, ())]
        # In the middle, so that neither the first row nor the last is special.
        batch = [*mates[: len(mates) // 2], sequence, *mates[len(mates) // 2 :]]
        logits = core.decoding.step_logits(batch)
        seen.append(logits[len(mates) // 2].clone())
        for each, row in zip(batch, logits, strict=True):
            accept_row(each.generation, row)
    core.decoding.forget_plan()
    close_all([sequence, *mates])
    assert_nothing_held(core)  # type: ignore[arg-type]  # an engine, said to be a core
    return torch.stack(seen)


MATES = {3: [20, 90], 9: [5], 14: [40, 41, 42, 43, 44]}


def test_batch_mates_change_no_bit() -> None:
    cores = [engine_of(), engine_of()]
    for core in cores:
        core.decoding.deterministic = True
    assert torch.equal(watched(cores[0], {}), watched(cores[1], MATES))


def test_without_it_only_the_last_digits_change() -> None:
    torch.testing.assert_close(watched(engine_of(), {}), watched(engine_of(), MATES), atol=1e-4, rtol=1e-4)


@only_in_extents  # a captured step runs no Python that could fail
@pytest.mark.parametrize(
    ("part", "fails_at", "deterministic"), [("forward", 1, True), ("logits", 1, True), ("logits", 0, False)]
)
def test_a_step_that_fails_leaves_every_sequence_where_it_stood(
    part: str, fails_at: int, deterministic: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    core = engine_of()
    core.decoding.deterministic = deterministic
    sequences = [started(core, 20, seed) for seed in range(3)]
    before = [sequence.tail.length for sequence in sequences]
    works, calls = getattr(core.adapter, part), iter(range(10))

    def fails(*args: object) -> torch.Tensor:
        if next(calls) == fails_at:
            raise RuntimeError("broken")
        computed: torch.Tensor = works(*args)
        return computed

    with monkeypatch.context() as patch:
        patch.setattr(core.adapter, part, fails)
        with pytest.raises(RuntimeError):
            core.decoding.step_logits(sequences)
    assert [sequence.tail.length for sequence in sequences] == before
    assert core.decoding.step_logits(sequences).shape[0] == 3
    core.decoding.forget_plan()
    close_all(sequences)
