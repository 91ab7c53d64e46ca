"""The engine computes what transformers computes: prefill and decode logits, greedy answers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from engine_worlds import (
    STORIES,
    adapter_of,
    assert_nothing_held,
    check_greedy,
    engine_of,
    model_of,
    needs_stories,
    oracle_greedy,
    oracle_logits,
    oracle_of,
    rows_together,
    tokens,
)
from transformers import AutoModelForCausalLM

from spolia_core.prompt import Prompt
from spolia_core.sampling import SamplingParams
from spolia_engine.adapter import ModelAdapter
from spolia_engine.core import EngineCore
from spolia_engine.engine import Engine
from spolia_engine.sequence import Sequence
from spolia_engine.sequence_starts import start_sequence
from spolia_engine.steps import Steps

pytestmark = pytest.mark.usefixtures("place")

MODELS = [
    "llama",
    "llama-mha",
    "llama-mqa",
    "llama-tied",
    "llama-linear",
    "llama-llama3",
    "llama-yarn",
    "qwen2",
    "qwen3",
    "mistral",
]


def allowed(position: int) -> float:
    return 1e-4 + 5e-8 * position


def check_logits(got: torch.Tensor, expected: torch.Tensor, first_position: int = 0) -> None:
    """Rows stand at consecutive positions from `first_position`."""
    errors = (got.cpu() - expected).abs().amax(dim=-1)
    limits = torch.tensor([allowed(first_position + row) for row in range(len(errors))])
    worst = int((errors - limits).argmax())
    assert bool((errors <= limits).all()), (
        f"position {first_position + worst}: {errors[worst]:.2e} > {limits[worst]:.2e}"
    )
    assert float(expected.std()) > 0.5, "logits of a model so flat prove nothing"


def prefill_logits(core: EngineCore, token_ids: list[int]) -> torch.Tensor:
    """Logits of every token of an exact context."""
    rows: list[torch.Tensor] = []
    original = core.adapter.forward_steps

    def forward_steps(*args: Any, **kwargs: Any) -> Steps[torch.Tensor]:
        rows.append((yield from original(*args, **kwargs)))
        return rows[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(core.adapter, "forward_steps", forward_steps)
        core.exact_context(token_ids, []).close()
    return core.adapter.logits(rows[0])


@pytest.mark.parametrize("name", MODELS)
def test_prefill_logits_are_those_of_transformers(name: str) -> None:
    ids = tokens(300)
    check_logits(prefill_logits(engine_of(name), ids), oracle_logits(oracle_of(name), ids))


@pytest.mark.parametrize("name", ["llama-yarn", "qwen3"])
def test_prefill_logits_hold_at_thousands_of_tokens(name: str) -> None:
    ids = tokens(3000)
    got = prefill_logits(engine_of(name), ids)
    check_logits(got, oracle_logits(oracle_of(name), ids))


@pytest.mark.parametrize("name", MODELS)
def test_greedy_answer_is_that_of_transformers(name: str) -> None:
    ids = tokens(37, seed=3)
    expected, margins = oracle_greedy(oracle_of(name), ids, 40)
    answer = engine_of(name).generate(Prompt.live(ids), SamplingParams(max_tokens=40))
    assert check_greedy(answer.token_ids, expected, margins) >= 8


@pytest.mark.parametrize("name", ["llama-dynamic", "llama-longrope"])
def test_length_bound_rope_is_exact_up_to_its_original_length(name: str) -> None:
    adapter = adapter_of(name)
    ids = tokens(adapter.max_context_tokens)
    assert adapter.max_context_tokens == 256
    check_logits(prefill_logits(engine_of(name), ids), oracle_logits(oracle_of(name), ids))


def test_a_prompt_behind_a_cached_prefix_gives_the_same_logits() -> None:
    core = engine_of("qwen2")
    ids = tokens(300)
    chain = list(core.ids.prefix_chain(ids))
    first = core.exact_context(ids[:260], [])
    core.register_prefix(first, chain)
    prefix = core.acquire_prefix(chain)
    first.close()
    context = core.exact_context(ids, prefix)
    assert context.num_computed_tokens == 300 - 256
    assert context.last_hidden is not None
    context.check_invariants()
    check_logits(core.adapter.logits(context.last_hidden[None]), oracle_logits(oracle_of("qwen2"), ids)[-1:], 299)
    context.close()
    assert_nothing_held(core)


def dictated(core: EngineCore, ids: list[int], chain: list[bytes], answer: list[int]) -> Sequence:
    """A sequence whose answer is dictated: its logits are compared, not drawn from."""
    context = core.exact_context(ids, core.acquire_prefix(chain[: (len(ids) - 1) // 128]))
    core.register_prefix(context, chain)
    sequence = start_sequence(context, core.generation(SamplingParams(max_tokens=len(answer) + 1)))
    sequence.generation.accept(answer[0])
    return sequence


@pytest.mark.parametrize("name", ["llama", "llama-llama3", "qwen2", "qwen3", "mistral"])
def test_decode_logits_of_a_batch_are_those_of_transformers_alone(name: str) -> None:
    core = engine_of(name)
    shared = tokens(256)
    prompts = [shared + tokens(n, seed=n) for n in (1, 17, 60, 130)] + [tokens(5, seed=9)]
    answers = [tokens(24, seed=50 + row) for row in range(len(prompts))]
    sequences = [
        dictated(core, ids, list(core.ids.prefix_chain(ids)), a) for ids, a in zip(prompts, answers, strict=True)
    ]
    steps = []
    for index in range(1, 25):
        steps.append(core.decoding.step_logits(sequences))
        for sequence, answer in zip(sequences, answers, strict=True):
            if index < 24:
                sequence.generation.accept(answer[index])
    for row, (ids, answer) in enumerate(zip(prompts, answers, strict=True)):
        expected = oracle_logits(oracle_of(name), ids + answer)[len(ids) :]
        check_logits(torch.stack([step[row] for step in steps]), expected, len(ids))
    assert rows_together(core) == 4, "nothing was shared"
    core.decoding.forget_plan()
    for sequence in sequences:
        sequence.close()
    assert_nothing_held(core)


def test_a_sequence_alone_and_in_a_batch_gets_the_same_logits() -> None:
    core = engine_of("llama")
    shared, answer = tokens(200), tokens(12, seed=1)
    prompts = [shared + tokens(n, seed=n) for n in (3, 40)]
    alone = []
    for ids in prompts:
        sequence = dictated(core, ids, list(core.ids.prefix_chain(ids)), answer)
        alone.append(_dictate(core, [sequence], answer)[:, 0])
    sequences = [dictated(core, ids, list(core.ids.prefix_chain(ids)), answer) for ids in prompts]
    together = _dictate(core, sequences, answer)
    for row in range(2):
        torch.testing.assert_close(together[:, row], alone[row], atol=3e-5, rtol=0)


def test_a_batch_may_change_between_steps() -> None:
    core = engine_of("llama")
    prompts, answer = [tokens(n, seed=n) for n in (9, 30, 150)], tokens(10, seed=2)
    sequences = [dictated(core, ids, [], answer) for ids in prompts]
    rows: list[list[torch.Tensor]] = [[], [], []]
    for index, members in enumerate([(0, 1, 2), (0, 1, 2), (2, 0), (1,), (2, 1, 0), (0, 2)]):
        logits = core.decoding.step_logits([sequences[m] for m in members])
        for row, member in enumerate(members):
            rows[member].append(logits[row])
            sequences[member].generation.accept(answer[len(rows[member])])
        assert index >= 0
    for ids, got in zip(prompts, rows, strict=True):
        expected = oracle_logits(oracle_of("llama"), ids + answer[: len(got)])[len(ids) :]
        check_logits(torch.stack(got), expected, len(ids))


def _dictate(core: EngineCore, sequences: list[Sequence], answer: list[int]) -> torch.Tensor:
    """Logits [num_steps, num_sequences, vocab_size] along a dictated answer; closes the sequences."""
    steps = []
    for token in [*answer[1:], None]:
        steps.append(core.decoding.step_logits(sequences))
        for sequence in sequences:
            if token is not None:
                sequence.generation.accept(token)
    core.decoding.forget_plan()
    for sequence in sequences:
        sequence.close()
    assert_nothing_held(core)
    return torch.stack(steps)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_sixteen_bit_logits_are_near_and_frequencies_stay_exact(dtype: str) -> None:
    exact = adapter_of("llama-llama3")
    model = type(model_of("llama-llama3"))(model_of("llama-llama3").config)
    model.load_state_dict(model_of("llama-llama3").state_dict())
    adapter = ModelAdapter(model, dtype=dtype)
    assert torch.equal(adapter.rotary.inv_freq, exact.rotary.inv_freq)
    ids = tokens(300)
    core = EngineCore(adapter, lambda _: "", num_blocks=64)
    got, expected = prefill_logits(core, ids), oracle_logits(oracle_of("llama-llama3"), ids)
    agreement = torch.cosine_similarity(got, expected, dim=-1)
    assert float(agreement.min()) > (0.99 if dtype == "bfloat16" else 0.999)


@needs_stories
def test_a_real_model_tells_the_story_that_transformers_tells() -> None:
    oracle = AutoModelForCausalLM.from_pretrained(str(STORIES), dtype=torch.float32, attn_implementation="eager").eval()
    engine = Engine.load(STORIES, pool_bytes=1 << 24)
    ids = [1, 403, 407, 261, 378]  # "<s> Once upon a time"
    check_logits(prefill_logits(engine, ids * 60), oracle_logits(oracle, ids * 60))
    expected, margins = oracle_greedy(oracle, ids, 200)
    answer = engine.generate(Prompt.live(ids), SamplingParams(max_tokens=200, ignore_eos=True))
    assert check_greedy(answer.token_ids, expected, margins) >= 100
    assert "there was" in answer.text
    assert_nothing_held(engine)
