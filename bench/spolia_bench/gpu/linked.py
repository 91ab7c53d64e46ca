"""Time to the first token behind documents that are reused and resident: linked, and all of it computed again.

The engine's own passes over a known shape with random weights, its pool on the device: nothing is fetched or copied.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from spolia_bench.frame import Sample
from spolia_bench.gpu.batches import DEVICE
from spolia_bench.gpu.rates import Rates
from spolia_bench.gpu.steps import Shape, random_model
from spolia_bench.gpu.timing import figures, wait
from spolia_core.chunk_object import KvShape
from spolia_core.prompt import Part, Prompt
from spolia_core.reuse import DEFAULT_LINK_TOKENS
from spolia_core.sampling import SamplingParams
from spolia_engine.adapter import ModelAdapter
from spolia_engine.context import Context
from spolia_engine.core import EngineCore
from spolia_engine.device_decoding import DeviceSettings
from spolia_engine.link_plan import LinkPlan, plan_link
from spolia_engine.run import Run
from spolia_engine.slot_memory import DEVICE_BLOCK_SIZE
from spolia_engine.support import Support
from spolia_kernels import RotaryTable

DOCUMENTS = 8
TOKENS = 512
QUESTION = 16
REPEATS = 7


class RandomAdapter(ModelAdapter):
    """A shape with random weights, and what passes ask of an adapter. Its fingerprint is nobody's."""

    def __init__(self, shape: Shape, max_context_tokens: int) -> None:
        heads = shape.heads
        self.support = Support(max_context_tokens, "")
        self.compute_dtype = "bfloat16"
        self.max_context_tokens = max_context_tokens
        self.vocab_size = shape.vocab
        self.eos_token_ids = frozenset()
        self.bos_token_id = None
        self.num_layers = shape.layers
        self.num_q_heads = heads.num_q_heads
        self.hidden_act = "silu"
        self.device = torch.device(DEVICE)
        self.fingerprint = bytes(32)
        self.decoder = random_model(shape)
        self._rope_scaling = 1.0
        half = heads.head_dim // 2
        inv_freq = 500000.0 ** -(torch.arange(half, dtype=torch.float64) / half)
        self.rotary = RotaryTable(
            inv_freq, head_dim=heads.head_dim, max_position=max_context_tokens, device=self.device
        )
        self.kv_shape = KvShape(shape.layers, heads.num_kv_heads, heads.head_dim, heads.head_dim, "BF16")


def compare(
    shape: Shape, rates: Rates, *, documents: int = DOCUMENTS, tokens: int = TOKENS
) -> Iterator[dict[str, Any]]:
    """One row of figures."""
    total = 1 + documents * tokens + QUESTION
    adapter = RandomAdapter(shape, 2 * total)
    core = EngineCore(
        adapter,
        lambda token_ids: "",
        num_blocks=-(-4 * total // DEVICE_BLOCK_SIZE),
        block_size=DEVICE_BLOCK_SIZE,
        device=DeviceSettings(row_buckets=(1,)),
    )
    ids = core.id_space(bytes(32))
    parts = [Part((0,))]  # a begin-of-sequence token: behind it every document is moved and linked
    runs: dict[int, Run] = {}
    for number in range(1, documents + 1):
        token_ids = tuple((7 * number + 3 * i) % shape.vocab for i in range(tokens))
        parts.append(Part(token_ids, ids.local(token_ids)))
        runs[number] = core.compile(ids.local(token_ids), token_ids)
    prompt = Prompt((*parts, Part(tuple(range(QUESTION)))))
    plan = plan_link(prompt, DEFAULT_LINK_TOKENS)

    def linked() -> Context:
        for run in runs.values():
            core.pool.retain(run.extent)
        return core.linked_context(prompt, {f.part_index: runs[f.part_index] for f in plan.fragments}, plan)

    by_links = _first_token(core, linked)
    recomputed = _first_token(core, lambda: core.exact_context(prompt.token_ids, []))
    floor_ms = _floor_ms(shape, rates, plan, total)
    core.pool.check_invariants()
    yield {
        "model": shape.name,
        "point": f"{documents}x{tokens}",
        "rows": len(plan.positions),
        **figures("linked", by_links),
        **figures("recompute", recomputed),
        "floor_ms": floor_ms,
        "recompute_over_linked": recomputed.median_ms / by_links.median_ms,
        "linked_over_floor": by_links.median_ms / floor_ms,
    }


def _first_token(core: EngineCore, prepare: Callable[[], Context]) -> Sample:
    """From a prompt's ids to the first token's, the host's part of it included."""
    found = []
    for _ in range(1 + REPEATS):  # the first warms up
        wait()
        began = time.perf_counter()
        context = prepare()
        core.decoding.first_token(context, SamplingParams())
        wait()
        found.append(1e3 * (time.perf_counter() - began))
        context.close()
    return Sample(tuple(found[1:]))


def _floor_ms(shape: Shape, rates: Rates, plan: LinkPlan, total: int) -> float:
    """The rows' products with the weights, and their attention over all before them; the head for the last row."""
    heads, rows = shape.heads, len(plan.positions)
    head = shape.width * shape.vocab
    body = shape.linear_weights - head
    pairs = sum(position + 1 for position in plan.positions)
    attention = rates.floor_ms(heads.key_bytes * total, 4.0 * heads.head_dim * heads.num_q_heads * pairs)
    products = rates.floor_ms(2.0 * body, 2.0 * body * rows) + rates.floor_ms(2.0 * head, 2.0 * head)
    return products + shape.layers * attention
