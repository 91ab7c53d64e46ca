"""Forking: many tails behind one context, in one forward pass, sharing all KV of the context."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor

from spolia_core.errors import InvalidRequest
from spolia_core.prompt import check_token_ids
from spolia_engine.adapter import ModelAdapter
from spolia_engine.context import Context, release_all, whole
from spolia_engine.extent import Extent
from spolia_engine.fork_attention import ForkAttention
from spolia_engine.run import Run

DEFAULT_MAX_FORK_ROWS = 1024
"""Rows of one fork pass. Some hundred rows read a shared range well; with more, a layer's activations leave the cache
(demo model, one thread, 200 tails of 15-34 tokens behind 8 linked chunks of 128, CPU time of the fork: 853 ms with 256
rows, 694 with 512, 667 with 1024, 746 with 2048, 777 with 4096; least of 8)."""


@dataclass(frozen=True, slots=True, eq=False)
class Forks:
    """What `EngineCore.fork` returns, in the order of the tails.

    `contexts[i]` is the context followed by tail i, to be decoded from or closed on its own. `hidden[i]`
    [len(tails[i]), hidden] are the final hidden states of the tail's rows; `ModelAdapter.logits` makes logits of them.
    Tails of one pass share the memory of their hidden states.
    """

    contexts: list[Context]
    hidden: list[Tensor]

    def close(self) -> None:
        """Closes every context. Safe to call twice, and for contexts that were closed alone."""
        for context in self.contexts:
            context.close()


def check_tails(adapter: ModelAdapter, context: Context, tails: Sequence[Sequence[int]]) -> None:
    """Raises `InvalidRequest` for no tails, an empty one, ids the model has not, or one longer than there is room."""
    if not tails:
        raise InvalidRequest("there are no tails to fork into", field="tails", limit="≥ 1 tail", actual="0")
    room = adapter.max_context_tokens - context.num_tokens
    for index, tail in enumerate(tails):
        check_token_ids(tail, adapter.vocab_size, field=f"tails[{index}]")
        if len(tail) > room:
            raise InvalidRequest(
                f"tails[{index}] has {len(tail)} tokens; a context of {context.num_tokens} tokens leaves {room}",
                field=f"tails[{index}]",
                limit=f"{room} tokens",
                actual=f"{len(tail)} tokens",
            )


def fork(adapter: ModelAdapter, context: Context, tails: Sequence[Sequence[int]], max_rows: int) -> Forks:
    """Computes the tails and makes a context of each; see `EngineCore.fork`."""
    if context.closed:
        raise AssertionError("a closed context has no KV to fork from")
    check_tails(adapter, context, tails)
    if max_rows < 1:
        raise InvalidRequest(f"max_rows must be ≥ 1, got {max_rows}", field="max_rows", limit="≥ 1")
    # Before the first allocation evicts what is cached for tails that do not fit anyway.
    context.pool.check_room(sum(context.pool.blocks_for(len(tail)) for tail in tails))
    own: list[Extent] = []
    contexts: list[Context] = []
    try:
        for tail in tails:
            own.append(context.pool.allocate(len(tail)))
        hidden: dict[int, Tensor] = {}
        for indices in plan_passes([len(tail) for tail in tails], max_rows):
            hidden.update(_run_pass(adapter, context, tails, own, indices))
        for index, extent in enumerate(own):
            contexts.append(_fork_of(context, extent, hidden[index]))
    except BaseException:
        for made in contexts:
            made.close()
        release_all(context.pool, own[len(contexts) :])
        raise
    return Forks(contexts, [hidden[index] for index in range(len(tails))])


def plan_passes(lens: Sequence[int], max_rows: int) -> Iterator[list[int]]:
    """Indices of the tails of each pass, shortest first, so that tails of like length are computed side by side.

    A pass has at most `max_rows` rows; a tail longer than that has one of its own.
    """
    batch: list[int] = []
    num_rows = 0
    for index in sorted(range(len(lens)), key=lens.__getitem__):
        if batch and num_rows + lens[index] > max_rows:
            yield batch
            batch, num_rows = [], 0
        batch.append(index)
        num_rows += lens[index]
    if batch:
        yield batch


def _run_pass(
    adapter: ModelAdapter,
    context: Context,
    tails: Sequence[Sequence[int]],
    own: Sequence[Extent],
    indices: Sequence[int],
) -> dict[int, Tensor]:
    """Runs some of the tails and returns their hidden states by index."""
    first = context.num_tokens
    token_ids = list(chain.from_iterable(tails[i] for i in indices))
    positions = list(chain.from_iterable(range(first, first + len(tails[i])) for i in indices))
    attention = ForkAttention([own[i] for i in indices], context.ranges, adapter.rotary)
    hidden = adapter.forward(token_ids, positions, attention)
    return dict(zip(indices, torch.split(hidden, [len(tails[i]) for i in indices]), strict=True))


def _fork_of(context: Context, extent: Extent, hidden: Tensor) -> Context:
    """The context with a tail behind it, holding a reference of its own on every extent. Takes that on `extent`.

    Holds nothing, and leaves `extent` to the caller, when it raises.
    """
    last = hidden[-1].clone()  # a view would keep the hidden states of the whole pass
    tail = Run(extent, 0, extent.capacity, context.num_tokens)
    spans = [*context.spans, whole(tail)]
    shared = list(dict.fromkeys(context.extents))
    for held in shared:
        context.pool.retain(held)
    return Context(context.pool, spans, [*shared, extent], last, extent.capacity, context.behind_sinks, tail)
