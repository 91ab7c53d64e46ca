"""What a link pass allocates: it grows with what is recomputed, not with what is reused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from engine_worlds import assert_nothing_held, engine_of, tokens
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from spolia_core.prompt import Part, Prompt
from spolia_engine.link_plan import plan_link

NUM_DOCUMENTS = 4


class AllocatedBytes(TorchDispatchMode):
    """Adds up the memory of every tensor that an operation makes; views of what was there count nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.num_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = _storages((args, kwargs or {}))
        out = func(*args, **(kwargs or {}))
        self.num_bytes += sum(size for _, size in _storages(out) - before)
        return out


def _storages(tree: Any) -> set[tuple[int, int]]:
    """Of every tensor but packed weights, which have none and are made at load."""
    return {_storage(leaf) for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor) and not leaf.is_mkldnn}


def _storage(tensor: torch.Tensor) -> tuple[int, int]:
    storage = tensor.untyped_storage()
    return storage.data_ptr(), storage.nbytes()


def bytes_of_link(document_tokens: int, question_tokens: int) -> tuple[int, int]:
    """Bytes that linking resident documents allocates, and blocks of the pool."""
    engine = engine_of("llama-mha")
    documents = [engine.chunk(tokens(document_tokens, seed)) for seed in range(NUM_DOCUMENTS)]
    prompt = Prompt((*documents, Part(tuple(tokens(question_tokens, 99)))))
    plan = plan_link(prompt, 4)
    runs = {index: engine.compile(part.chunk_id or b"", part.token_ids) for index, part in enumerate(documents)}
    taken: list[int] = []
    allocate = engine.pool.allocate
    with pytest.MonkeyPatch.context() as patch, AllocatedBytes() as allocated:
        patch.setattr(
            engine.pool, "allocate", lambda n, **kw: taken.append(engine.pool.blocks_for(n)) or allocate(n, **kw)
        )
        engine.linked_context(prompt, runs, plan).close()
    assert_nothing_held(engine)
    return allocated.num_bytes, sum(taken)


def test_what_a_request_allocates_grows_with_recomputed_tokens_only() -> None:
    short, long, more_rows = bytes_of_link(100, 40), bytes_of_link(800, 40), bytes_of_link(100, 80)
    # Eight times the reused KV: not a byte of it is copied.
    assert long[0] <= 1.02 * short[0], "copies of reused KV"
    assert long[1] == short[1]
    # Of the rows all of it: attention among themselves and over documents makes outputs of their number.
    assert 1.3 * short[0] < more_rows[0] < 2.2 * short[0]
