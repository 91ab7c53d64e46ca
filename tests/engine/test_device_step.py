"""The step that a graph can hold against transformers, in float32, by the kernels' references or on a CUDA device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from spolia_engine.device_step import DeviceStep, StepBatch, StepCapacity
from spolia_engine.model_layers import Decoder
from spolia_kernels.paged import Angles, PagedKv, SlotSpan, Tails, WorkShape, plan_work
from spolia_kernels.sample import Draws

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PAGE = 16
SHARED = 37
OWN = (3, 20, 1)
STEPS = 6


def _model() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=256,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=256,
    )
    return LlamaForCausalLM(config).float().eval().to(DEVICE)


@torch.no_grad()
def test_rows_behind_a_shared_prefix_go_on_as_each_would_alone() -> None:
    model = _model()
    shared = torch.randint(97, (SHARED,)).tolist()
    prompts = [shared + torch.randint(97, (n,)).tolist() for n in OWN]
    expected, caches = zip(*(_alone(model, prompt) for prompt in prompts), strict=True)

    per_row = -(-(max(OWN) + STEPS) // PAGE)
    first = -(-SHARED // PAGE)
    kv = tuple(PagedKv.zeros(first + len(OWN) * per_row, 2, PAGE, 64, dtype=torch.float32, device=DEVICE) for _ in "ab")
    tail_pages = torch.arange(first, first + len(OWN) * per_row, dtype=torch.int32).reshape(len(OWN), per_row)
    for layer, memory in enumerate(kv):
        _write(memory, range(first), caches[0][layer], 0, SHARED)
        for row, own in enumerate(OWN):
            _write(memory, tail_pages[row].tolist(), caches[row][layer], SHARED, own - 1)
    work = plan_work([SlotSpan(0, SHARED, (0, 1, 2), (0, 0, 0))], 3, WorkShape(2, 2, 16, 32), DEVICE)
    starts = torch.full((3,), SHARED, dtype=torch.int32)
    positions = starts + torch.tensor(OWN, dtype=torch.int32) - 1
    tails = Tails(tail_pages.to(DEVICE), starts.to(DEVICE), positions.to(DEVICE))

    capacity = StepCapacity(rows=4, items=64, readings=16, parts=16, tail_pages=per_row + 1, tile=16)
    step = DeviceStep(Decoder.of(model), kv, _angles(), capacity)
    last = torch.tensor([prompt[-1] for prompt in prompts], device=DEVICE)
    if DEVICE == "cuda":
        step.capture()
    step.load(StepBatch(work, tails, last, Draws.greedy(3, DEVICE), STEPS))
    found = []
    for _ in range(STEPS):
        step.run()
        found.append(step.token_ids[:3].tolist())
    assert [list(tokens) for tokens in zip(*found, strict=True)] == list(expected)


def test_a_batch_larger_than_its_buffers_is_refused() -> None:
    model = _model()
    kv = tuple(PagedKv.zeros(4, 2, PAGE, 64, dtype=torch.float32, device=DEVICE) for _ in "ab")
    step = DeviceStep(Decoder.of(model), kv, _angles(), StepCapacity(1, 8, 8, 8, 1, 16))
    two = torch.zeros(2, dtype=torch.int32, device=DEVICE)
    tails = Tails(torch.zeros(2, 1, dtype=torch.int32, device=DEVICE), two, two)
    work = plan_work([], 2, WorkShape(2, 2, 16, 32), DEVICE)
    batch = StepBatch(work, tails, two.long(), Draws.greedy(2, DEVICE), PAGE)
    with pytest.raises(ValueError, match="fit"):
        step.load(batch)


@torch.no_grad()
def test_a_step_beyond_a_row_s_own_pages_is_refused_and_writes_in_nobody_s() -> None:
    """One row has a page, another three. Lists of pages are as long as the longest, and name page 0 behind a row's."""
    model = _model()
    kv = tuple(PagedKv.zeros(5, 2, PAGE, 64, dtype=torch.float32, device=DEVICE) for _ in "ab")
    pages = torch.tensor([[1, 0, 0], [2, 3, 4]], dtype=torch.int32, device=DEVICE)
    starts = torch.zeros(2, dtype=torch.int32, device=DEVICE)
    positions = torch.tensor([PAGE - 2, 5], dtype=torch.int32, device=DEVICE)
    work = plan_work([], 2, WorkShape(2, 2, 16, 32), DEVICE)
    step = DeviceStep(Decoder.of(model), kv, _angles(), StepCapacity(4, 8, 8, 8, 3, 16))
    batch = StepBatch(work, Tails(pages, starts, positions), positions.long(), Draws.greedy(2, DEVICE), 2)
    step.load(batch)
    for _ in range(2):
        step.run()
    with pytest.raises(ValueError, match="no room"):
        step.run()
    for memory in kv:
        written = memory.key.abs().sum((0, 2)).view(5, PAGE) > 0
        assert written.sum(1).tolist() == [0, 2, 2, 0, 0]


def _alone(model: Any, prompt: list[int]) -> tuple[list[int], list[tuple[torch.Tensor, torch.Tensor]]]:
    """What transformers goes on with, and the prompt's KV by layer."""
    found = model(torch.tensor([prompt], device=DEVICE), use_cache=True)
    caches = [(layer.keys[0].clone(), layer.values[0].clone()) for layer in found.past_key_values.layers]
    tokens = list(prompt)
    for _ in range(STEPS):
        tokens.append(int(model(torch.tensor([tokens], device=DEVICE)).logits[0, -1].argmax()))
    return tokens[len(prompt) :], caches


def _write(memory: PagedKv, pages: Any, cache: tuple[torch.Tensor, torch.Tensor], start: int, count: int) -> None:
    for index in range(count):
        slot = pages[index // PAGE] * PAGE + index % PAGE
        memory.key[:, slot] = cache[0][:, start + index]
        memory.value[:, slot] = cache[1][:, start + index]


def _angles() -> Angles:
    inv_freq = 10000.0 ** -(torch.arange(32, dtype=torch.float64) / 32)
    turned = torch.outer(torch.arange(256, dtype=torch.float64), inv_freq)
    return Angles(turned.cos().float().to(DEVICE), turned.sin().float().to(DEVICE))
