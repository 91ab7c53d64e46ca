"""The engine that decodes as a GPU does: out of one piece of memory, by captured steps, drawing on the device.

On a CUDA device it is the real thing; elsewhere the same plan, pages and buffers, by the kernels' references. In
float32 answers are those of the engine of a CPU, token for token; in 16 bits logits are compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from functools import cache
from typing import Any

import pytest
import torch
from engine_worlds import (
    LLAMA3,
    VOCAB_SIZE,
    YARN,
    assert_nothing_held,
    engine_of,
    letters,
    llama_config,
    rows_together,
    tokens,
)
from transformers import LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from spolia_core.errors import Busy, InvalidRequest
from spolia_core.prompt import Part, Prompt
from spolia_core.reuse import ReuseMode, TokenSource
from spolia_core.sampling import SamplingParams
from spolia_engine import device_step
from spolia_engine.adapter import ModelAdapter
from spolia_engine.device_decoding import DeviceSettings
from spolia_engine.engine import Engine
from spolia_engine.next_tokens import accept_row
from spolia_engine.sequence_starts import branch, start_samples, start_sequence
from spolia_engine.sharing import Sharing, always_shared, never_shared
from spolia_kernels.sample import Drawn, Draws

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_cuda = pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
LOGIT_ERROR = {"float32": 2e-4, "float16": 0.03, "bfloat16": 0.25}
SMALL = DeviceSettings(row_buckets=(1, 2, 4), min_parts=16)
SIZES = {"hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}


@cache
def _model(name: str) -> Any:
    torch.manual_seed(sum(name.encode()))
    if name == "qwen3":
        config = Qwen3Config(**{**llama_config(**SIZES).to_dict(), "model_type": "qwen3", "use_sliding_window": False})
        return Qwen3ForCausalLM(config).eval()
    ropes = {"llama": {}, "llama3": {"rope_parameters": LLAMA3}, "yarn": {"rope_parameters": YARN}}
    return LlamaForCausalLM(llama_config(**SIZES, **ropes[name])).eval()


@cache
def _adapter(name: str, device: str, dtype: str) -> ModelAdapter:
    return ModelAdapter(deepcopy(_model(name)).to(device), dtype=dtype, max_context_tokens=2048)


def on_device(name: str = "llama", *, num_blocks: int = 512, dtype: str = "float32") -> Engine:
    adapter = _adapter(name, DEVICE, dtype)
    return Engine(adapter, letters, num_blocks=num_blocks, block_size=16, num_sink_tokens=0, device=SMALL)


def on_host(name: str = "llama") -> Engine:
    """The engine that all others are compared with."""
    return Engine(_adapter(name, "cpu", "float32"), letters, num_blocks=1024, block_size=16, num_sink_tokens=0)


def linked_prompt(engine: Engine, order: Sequence[int]) -> Prompt:
    """Three documents in an order, some words of its own before and behind."""
    documents = [engine.chunk(tokens(90 + 7 * i, seed=20 + i)) for i in range(3)]
    parts = [Part(tuple(tokens(5, seed=1))), *(documents[i] for i in order), Part(tuple(tokens(9, seed=order[0])))]
    return Prompt(tuple(parts))


@pytest.mark.parametrize("name", ["llama", "llama3", "yarn", "qwen3"])
def test_answers_are_those_of_the_host(name: str) -> None:
    host, device = on_host(name), on_device(name)
    for length in (3, 16, 150):
        prompt = Prompt.live(tokens(length, seed=length))
        params = SamplingParams(max_tokens=20)
        assert device.generate(prompt, params).token_ids == host.generate(prompt, params).token_ids
    assert_nothing_held(device)
    assert device.decoding.device is not None
    assert device.decoding.device.num_steps
    assert device.decoding.device.num_eager_steps == 0


def test_documents_in_any_order_are_read_where_they_lie() -> None:
    host, device = on_host(), on_device()
    for order in ([0, 1, 2], [2, 0, 1], [1, 2, 0]):
        answers = [
            engine.generate(linked_prompt(engine, order), SamplingParams(max_tokens=12), mode=ReuseMode.LINKED)
            for engine in (host, device)
        ]
        assert answers[0].token_ids == answers[1].token_ids
        assert answers[0].reuse.sources == answers[1].reuse.sources
    assert_nothing_held(device)


def test_samples_draw_on_the_device_what_they_draw_on_the_host() -> None:
    """More samples than the largest bucket has rows, all of one prompt, then fewer and fewer: answers end."""
    prompt = Prompt.live(tokens(70, seed=3))
    params = SamplingParams(temperature=1.3, top_p=0.9, top_k=20, seed=2**64 - 5, max_tokens=10, num_top_logprobs=2)
    host, device = on_host(), on_device()
    expected = host.generate_samples(prompt, 6, params)
    found = device.generate_samples(prompt, 6, params)
    assert [a.token_ids for a in found] == [a.token_ids for a in expected]
    assert len({a.token_ids for a in found}) > 3
    assert device.decoding.device is not None
    assert (
        device.decoding.device.num_eager_steps == device.decoding.device.num_steps == 9
    )  # six rows, and no bucket holds them
    assert_nothing_held(device)


def test_an_answer_seals_for_the_next_turn() -> None:
    ids, answers = tokens(200, seed=9), []
    for engine in (on_host(), on_device()):
        first = engine.generate(Prompt.live(ids), SamplingParams(max_tokens=80))
        again = engine.generate(Prompt.live([*ids, *first.token_ids, *tokens(5)]), SamplingParams(max_tokens=10))
        assert again.reuse.sources[TokenSource.DEVICE] == 256  # a block of the prompt, one that the answer completed
        answers.append((first.token_ids, again.token_ids))
    assert answers[0] == answers[1]


def test_a_sequence_branches_and_every_branch_goes_on_alone() -> None:
    answers = []
    for engine in (on_host(), on_device()):
        params = SamplingParams(temperature=1.0, max_tokens=16, seed=8)
        context = engine.exact_context(tokens(40), [])
        sequence = start_sequence(context, engine.generation(params))
        accept_row(sequence.generation, engine.decoding.logits_after([context])[0])
        for _ in range(4):
            accept_row(sequence.generation, engine.decoding.step_rows([sequence])[0])
        every = [sequence, *branch(sequence, [1, 2])]
        while going := [each for each in every if not each.finished]:
            for each, row in zip(going, engine.decoding.step_rows(going), strict=True):
                accept_row(each.generation, row)
        answers.append([each.generation.token_ids for each in every])
        engine.decoding.forget_plan()
        for each in every:
            each.close()
        assert_nothing_held(engine)
    assert answers[0] == answers[1]


@pytest.mark.parametrize(("sharing", "expected"), [(always_shared, 4), (never_shared, 1)])
def test_rows_behind_one_prefix_read_it_at_once_where_sharing_is_wanted(sharing: Sharing, expected: int) -> None:
    """What the device was given, not what was planned; and on it, where there is one."""
    device = on_device()
    device.decoding.sharing = sharing
    context = device.exact_context(tokens(150, seed=6), [])
    params = SamplingParams(temperature=1.0, max_tokens=4)
    sequences = start_samples(context, [device.generation(params, index) for index in range(4)])
    for sequence, row in zip(sequences, device.decoding.first_rows(sequences), strict=True):
        accept_row(sequence.generation, row)
    device.decoding.step_rows(sequences)
    assert rows_together(device) == expected
    device.decoding.forget_plan()
    for sequence in sequences:
        sequence.close()
    assert_nothing_held(device)


@pytest.mark.parametrize("dtype", LOGIT_ERROR)
def test_logits_are_those_of_the_host_within_what_the_dtype_rounds(dtype: str) -> None:
    host, device = on_host(), on_device(dtype=dtype)
    ids = tokens(130, seed=4)
    rows = []
    for engine in (host, device):
        contexts = [engine.exact_context(ids[:n], []) for n in (130, 61, 17)]
        sequences = [start_sequence(c, engine.generation(SamplingParams(max_tokens=8))) for c in contexts]
        for sequence in sequences:
            sequence.generation.accept(7)
        for number in range(4):
            rows.append(engine.decoding.step_logits(sequences).cpu())
            for sequence in sequences:
                sequence.generation.accept(11 + number)
        engine.decoding.forget_plan()
        for sequence in sequences:
            sequence.close()
        assert_nothing_held(engine)
    limit = LOGIT_ERROR[dtype]
    for expected, found in zip(rows[:4], rows[4:], strict=True):
        assert found.shape == (3, VOCAB_SIZE)
        torch.testing.assert_close(found, expected, atol=limit, rtol=limit)


@pytest.mark.skipif(DEVICE == "cuda", reason="all other tests run the kernels there")
def test_the_kernels_give_the_answers_of_their_references(monkeypatch: pytest.MonkeyPatch) -> None:
    """A whole engine on the Triton kernels, in the interpreter: a shared document, tails, draws."""
    pytest.importorskip("triton", reason="Triton has wheels for Linux only")
    from spolia_kernels import paged
    from spolia_kernels.sample import launch as sampling

    params = SamplingParams(temperature=1.5, top_k=40, max_tokens=4, seed=1)
    prompt = Prompt.live(tokens(50, seed=5))
    expected = [answer.token_ids for answer in on_host().generate_samples(prompt, 2, params)]
    device = on_device()
    calls: list[int] = []

    def drawn(logits: torch.Tensor, draws: Draws, *, into: Drawn, num_rows: torch.Tensor) -> Drawn:
        calls.append(int(num_rows))
        sampling.sample_rows(logits, draws, into, num_rows)
        return into

    monkeypatch.setattr(paged, "uses_triton", lambda tensor: True)
    monkeypatch.setattr(device_step, "sample_rows", drawn)
    assert [answer.token_ids for answer in device.generate_samples(prompt, 2, params)] == expected
    assert calls == [2, 2, 2]


def test_a_deterministic_engine_takes_each_sequence_alone() -> None:
    device = on_device()
    device.decoding.deterministic = True
    together = device.generate_samples(Prompt.live(tokens(30)), 3, SamplingParams(temperature=1.0, max_tokens=6))
    alone = device.generate(Prompt.live(tokens(30)), SamplingParams(temperature=1.0, max_tokens=6))
    assert together[0].token_ids == alone.token_ids


def test_memory_is_one_piece_and_what_does_not_fit_is_refused_with_nothing_held() -> None:
    device = on_device(num_blocks=24)
    context = device.exact_context(tokens(100), [])
    with pytest.raises(Busy):  # a tail takes its room whole: graphs read where it lies
        start_sequence(context, device.generation(SamplingParams(max_tokens=400)))
    assert_nothing_held(device)
    with pytest.raises(InvalidRequest, match="block_size"):
        Engine(_adapter("llama", DEVICE, "float32"), letters, num_blocks=8, block_size=8, device=SMALL)


@pytest.mark.parametrize(("rows", "bucket"), [(1, 1), (2, 2), (3, 4), (4, 4), (5, None)])
def test_a_batch_runs_in_the_smallest_bucket_that_holds_it(rows: int, bucket: int | None) -> None:
    assert SMALL.bucket_for(rows) == bucket


@pytest.mark.skipif(DEVICE == "cpu", reason="no CUDA device: the engine's tests run on the CPU only")
@pytest.mark.usefixtures("place")
def test_the_engine_s_tests_run_on_the_device_too(request: pytest.FixtureRequest) -> None:
    assert engine_of().adapter.device.type == ("cuda" if "cuda" in request.node.name else "cpu")


@needs_cuda
def test_steps_take_no_memory() -> None:
    device = on_device(dtype="bfloat16")
    context = device.exact_context(tokens(40), [])
    sequence = start_sequence(context, device.generation(SamplingParams(max_tokens=100, temperature=1.0)))
    accept_row(sequence.generation, device.decoding.logits_after([context])[0])
    for _ in range(5):
        accept_row(sequence.generation, device.decoding.step_rows([sequence])[0])
    before = torch.cuda.memory_allocated()
    for _ in range(20):
        accept_row(sequence.generation, device.decoding.step_rows([sequence])[0])
    assert torch.cuda.memory_allocated() == before
    device.decoding.forget_plan()
    sequence.close()
