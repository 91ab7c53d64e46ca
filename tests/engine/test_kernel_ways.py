"""An engine steps by machine code where there is some, and without it gives the same."""

from __future__ import annotations

import pytest
import torch
from engine_worlds import assert_nothing_held, engine_of, tokens

from spolia_core.prompt import Part, Prompt
from spolia_core.reuse import ReuseMode
from spolia_core.sampling import SamplingParams
from spolia_engine import decode_attention
from spolia_engine.sequence import Sequence
from spolia_kernels import Kernels, SpanStep, kernels, torch_kernels_only

pytestmark = pytest.mark.skipif(not isinstance(kernels(), Kernels), reason="no machine code is to be had here")

DRAWN = SamplingParams(temperature=1.0, seed=7, max_tokens=8, ignore_eos=True)


def logits_of_three(model: str) -> list[torch.Tensor]:
    """Of every step of three samples that read two documents, neither where it was computed."""
    engine = engine_of(model)
    documents = [engine.chunk(tokens(70, seed)) for seed in (1, 2)]
    prompt = Prompt((Part(tuple(tokens(3))), *documents, Part(tuple(tokens(9, 3)))))
    seen: list[torch.Tensor] = []
    step = engine.decoding.step_logits

    def noted(sequences: list[Sequence]) -> torch.Tensor:
        seen.append(step(sequences))
        return seen[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine.decoding, "step_logits", noted)
        engine.generate_samples(prompt, 3, DRAWN, mode=ReuseMode.LINKED)
    assert_nothing_held(engine)
    return seen


@pytest.mark.parametrize("model", ["llama", "qwen2", "qwen3"])
def test_samples_over_linked_documents_get_the_same_logits_by_both(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ways: list[type] = []
    make = decode_attention._way_of

    def noted(*args):
        way = make(*args)
        ways.append(type(way))
        return way

    monkeypatch.setattr(decode_attention, "_way_of", noted)
    got = logits_of_three(model)
    assert set(ways) == {SpanStep}
    with torch_kernels_only():
        wanted = logits_of_three(model)
    assert ways[-1] is decode_attention.DecodeParts
    assert len(got) == len(wanted) == 7
    for one, other in zip(got, wanted, strict=True):
        assert one.shape[0] == 3
        torch.testing.assert_close(one, other, atol=1e-4, rtol=0)
