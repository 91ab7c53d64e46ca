"""Whole decode steps of two known shapes with random weights: shared, private, and without attention."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from spolia_bench.frame import Sample
from spolia_bench.gpu.attention import GRID
from spolia_bench.gpu.batches import (
    DEVICE,
    PAGE,
    Heads,
    Point,
    angles,
    num_pages,
    num_processors,
    planned,
    private_spans,
    random_kv,
    shared_spans,
    tails_of,
    tile_for,
)
from spolia_bench.gpu.rates import Rates
from spolia_bench.gpu.timing import figures, graphed, timed
from spolia_engine.device_step import DeviceStep, StepBatch, StepCapacity
from spolia_engine.model_layers import Decoder, DecoderLayer
from spolia_kernels import Linear, Partial
from spolia_kernels.fused import RmsNorm, silu_mul
from spolia_kernels.paged import SlotSpan, attend_spans
from spolia_kernels.sample import Draws

NEW_TOKENS = 32
QUESTION = 16
DOCUMENTS = 8
SLOW_STEPS = 4


@dataclass(frozen=True, slots=True)
class Shape:
    """A Llama's sizes."""

    name: str
    layers: int
    width: int
    mlp: int
    heads: Heads
    vocab: int

    @property
    def linear_weights(self) -> int:
        """Numbers that every step multiplies by."""
        joined = (self.heads.num_q_heads + 2 * self.heads.num_kv_heads) * self.heads.head_dim
        per_layer = joined + self.heads.num_q_heads * self.heads.head_dim + 3 * self.mlp
        return self.width * (self.layers * per_layer + self.vocab)


SHAPES = (
    Shape("llama-3-8b", 32, 4096, 14336, Heads(32, 8), 128256),
    Shape("codellama-13b", 40, 5120, 13824, Heads(40, 40), 32016),
)
POINTS = [point for point in GRID if point.suffix == 0]


def random_model(shape: Shape) -> Decoder:
    """Normal weights in bfloat16, scaled so that numbers stay of one size."""
    heads = shape.heads

    def weight(rows: int, columns: int) -> Tensor:
        return torch.empty(rows, columns, dtype=torch.bfloat16, device=DEVICE).normal_(std=columns**-0.5)

    def norm() -> RmsNorm:
        return RmsNorm.of(torch.ones(shape.width, dtype=torch.bfloat16, device=DEVICE), 1e-5)

    joined = (heads.num_q_heads + 2 * heads.num_kv_heads) * heads.head_dim
    layers = tuple(
        DecoderLayer(
            index=index,
            num_q_heads=heads.num_q_heads,
            num_kv_heads=heads.num_kv_heads,
            head_dim=heads.head_dim,
            sm_scale=heads.head_dim**-0.5,
            input_norm=norm(),
            qkv=Linear.of(weight(joined, shape.width)),
            query_norm=None,
            key_norm=None,
            out=Linear.of(weight(shape.width, heads.num_q_heads * heads.head_dim)),
            mlp_norm=norm(),
            gate_up=Linear.of(weight(2 * shape.mlp, shape.width)),
            down=Linear.of(weight(shape.width, shape.mlp)),
            gated=silu_mul,
        )
        for index in range(shape.layers)
    )
    return Decoder(weight(shape.vocab, shape.width), layers, norm(), Linear.of(weight(shape.vocab, shape.width)))


class Bench:
    """A model and its paged KV, taken once."""

    def __init__(self, shape: Shape, points: Sequence[Point]) -> None:
        self.shape = shape
        self.model = random_model(shape)
        most = max(num_pages(_with_question(point), NEW_TOKENS) for point in points)
        heads = shape.heads
        self.kv = tuple(random_kv(most, heads) for _ in range(shape.layers))
        self.angles = angles(heads.head_dim, max(point.shared for point in points) + 2 * PAGE)

    def step(self, point: Point, spans: Sequence[SlotSpan], rows_of_span: int) -> DeviceStep:
        """A step of a batch, loaded; captured where there is a device."""
        point = _with_question(point)
        heads = self.shape.heads
        tile = tile_for(rows_of_span, heads.group)
        work = planned(spans, point.rows, heads, tile, num_processors())
        tails = tails_of(point, -(-point.shared // PAGE), NEW_TOKENS)
        capacity = StepCapacity(
            rows=point.rows,
            items=work.items.shape[0],
            readings=work.rows.shape[0],
            parts=work.num_parts,
            tail_pages=tails.pages.shape[1],
            tile=tile,
        )
        step = DeviceStep(self.model, self.kv, self.angles, capacity)
        token_ids = torch.ones(point.rows, dtype=torch.int64, device=DEVICE)
        batch = StepBatch(work, tails, token_ids, Draws.greedy(point.rows, DEVICE), NEW_TOKENS)
        if DEVICE == "cuda":
            step.capture()
        step.load(batch)
        return step

    def floor_ms(self, point: Point, rates: Rates) -> float:
        """Sum over operators of bytes or operations, whichever takes longer; one weight product as one operator."""
        linear = rates.floor_ms(2.0 * self.shape.linear_weights, 2.0 * self.shape.linear_weights * point.rows)
        own = Point(point.rows, point.shared, QUESTION + NEW_TOKENS // 2)
        return linear + self.shape.layers * sum(rates.floor_ms(*each) for each in own.floors(self.shape.heads))

    def no_attention(self, rows: int) -> Sample:
        """All of a step but attention and the writing of KV."""
        capacity = StepCapacity(rows, 1, 1, 1, 1, 16)
        step = DeviceStep(self.model, self.kv, self.angles, capacity)
        num_q_heads = self.shape.heads.num_q_heads
        run = graphed(lambda: step.logits(lambda layer, qkv: qkv[:, :num_q_heads].contiguous()).argmax(-1))
        return timed(run, repeats=NEW_TOKENS)  # as many as of whole steps: a device that gets warm gets slow

    def no_tails(self, point: Point) -> Sample:
        """All of a step but each row's own tail: what is shared is attended, nothing is merged and no KV written."""
        point, heads = _with_question(point), self.shape.heads
        work = planned(shared_spans(point), point.rows, heads, tile_for(point.rows, heads.group), num_processors())
        positions = tails_of(point, 0, NEW_TOKENS).positions
        parts = (work.num_parts, heads.num_q_heads)
        into = Partial(torch.zeros(*parts, heads.head_dim, device=DEVICE), torch.zeros(*parts, device=DEVICE))
        sm_scale = heads.head_dim**-0.5

        def spans(layer: int, qkv: Tensor) -> Tensor:
            query = qkv[:, : heads.num_q_heads]
            attend_spans(query, self.kv[layer], work, positions, self.angles, sm_scale=sm_scale, into=into)
            return query.contiguous()

        step = DeviceStep(self.model, self.kv, self.angles, StepCapacity(point.rows, 1, 1, 1, 1, work.tile))
        return timed(graphed(lambda: step.logits(spans).argmax(-1)), repeats=NEW_TOKENS)


def compare_all(rates: Rates) -> Iterator[dict[str, Any]]:
    """`compare` of every shape, one after the other in the device's memory."""
    for shape in SHAPES:
        yield from compare(shape, rates, POINTS)
        torch.cuda.empty_cache()


def compare(shape: Shape, rates: Rates, points: Sequence[Point]) -> Iterator[dict[str, Any]]:
    """One row of figures per point, and one for a single sequence."""
    bench = Bench(shape, points)
    for point in points:
        row: dict[str, Any] = {"model": shape.name, "point": f"{point.rows}x{point.shared}"}
        row["floor_ms"] = bench.floor_ms(point, rates)
        row |= figures("no_attention", bench.no_attention(point.rows))
        row |= figures("no_tails", bench.no_tails(point))
        row |= figures("shared", _steps(bench.step(point, shared_spans(point), point.rows), NEW_TOKENS))
        permuted = bench.step(point, shared_spans(point, _orders(point.rows)), point.rows)
        row |= figures("permuted", _steps(permuted, NEW_TOKENS))
        slow = point.rows * point.shared >= 1 << 20
        private = bench.step(point, private_spans(point), 1)
        row |= figures("private", _steps(private, SLOW_STEPS if slow else NEW_TOKENS))
        row["private_over_shared"] = row["private_ms"] / row["shared_ms"]
        row["permuted_over_shared"] = row["permuted_ms"] / row["shared_ms"]
        row["step_over_floor"] = row["shared_ms"] / row["floor_ms"]
        yield row
    alone = Point(1, min(point.shared for point in points), 0)
    one = _steps(bench.step(alone, private_spans(alone), 1), NEW_TOKENS)
    num_keys = alone.shared + QUESTION + NEW_TOKENS // 2
    num_bytes = 2 * shape.linear_weights + shape.layers * shape.heads.key_bytes * num_keys
    yield {
        "model": shape.name,
        "point": f"1x{alone.shared}",
        "floor_ms": bench.floor_ms(alone, rates),
        **figures("shared", one),
        "bandwidth_share": num_bytes / one.median_ms * 1e3 / rates.copy,
    }


def _steps(step: DeviceStep, num_steps: int) -> Sample:
    """Steps that each go one token further; the tails have room for no more than NEW_TOKENS."""
    return timed(step.run, repeats=num_steps, warm=0)


def _with_question(point: Point) -> Point:
    return Point(point.rows, point.shared, QUESTION)


def _orders(rows: int) -> list[list[int]]:
    order = random.Random(0)
    return [order.sample(range(DOCUMENTS), DOCUMENTS) for _ in range(rows)]
