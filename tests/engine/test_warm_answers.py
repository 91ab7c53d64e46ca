"""Answers do not tell whether their sequence's slot was warm, or who had it before."""

from __future__ import annotations

import pytest
import torch
from engine_worlds import assert_nothing_held, engine_of, tokens
from warm_worlds import pool_of

from spolia_core.prompt import Prompt
from spolia_core.sampling import SamplingParams
from spolia_engine import idle_memory
from spolia_kernels import torch_kernels_only


def answers(share: float, monkeypatch: pytest.MonkeyPatch) -> tuple[list[torch.Tensor], int]:
    """Logits of every step of requests one after the other and beside each other, and the bytes that are warm then."""
    monkeypatch.setattr(idle_memory, "MAX_WARM_SHARE", share)
    engine, seen = engine_of(), list[torch.Tensor]()
    step = engine.decoding.step_logits
    monkeypatch.setattr(engine.decoding, "step_logits", lambda sequences: seen.append(step(sequences)) or seen[-1])
    for seed, num_tokens in ((1, 60), (2, 9), (3, 33), (4, 130), (5, 5)):
        engine.generate(Prompt.live(tokens(num_tokens, seed)), SamplingParams(max_tokens=12, ignore_eos=True))
        drawn = SamplingParams(max_tokens=12, ignore_eos=True, temperature=1.0, seed=seed)
        engine.generate_samples(Prompt.live(tokens(num_tokens + 7, seed + 10)), 3, drawn)
    assert_nothing_held(engine)
    return seen, engine.pool._slabs.warm_bytes


@pytest.mark.parametrize("by_torch", [False, True])
def test_answers_are_the_same_to_the_bit_whoever_had_the_slot_before(
    by_torch: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if by_torch:
        with torch_kernels_only():
            (cold, none), (warm, some) = (answers(share, monkeypatch) for share in (0.0, 0.5))
    else:
        (cold, none), (warm, some) = (answers(share, monkeypatch) for share in (0.0, 0.5))
    assert (none, some > 0) == (0, True)
    assert len(cold) == len(warm) > 100
    assert all(torch.equal(one, other) for one, other in zip(cold, warm, strict=True))


def test_numbers_that_are_none_stay_with_who_wrote_them() -> None:
    """A model may overflow: what is infinite or no number in a slot must not reach who has it next, masked or not."""
    pool = pool_of()
    for poison in (float("inf"), float("nan")):
        tail = pool.open_tail(40)
        pool.grow(tail, 40)
        tail.key[:], tail.value[:] = poison, poison
        pool.release(tail)
        again = pool.open_tail(3)
        assert again.slot is not None
        assert again.slot.index == 0
        assert not again.slot.key.any()
        assert not again.slot.value.any()
        pool.release(again)
