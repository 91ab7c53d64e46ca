"""What a request counts for in the queue of its node."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

from tiny_cluster import tokens

from spolia_core.ids import IdSpace, Recipe
from spolia_core.prompt import Part, Prompt
from spolia_core.reuse import PREFIX_CHUNK_TOKENS, ReuseMode
from spolia_decode.load import num_tokens_to_prepare

IDS = IdSpace(bytes(32), b"model", Recipe("float32"))


def load(parts: list[Part], mode: ReuseMode, *resident: bytes) -> int:
    job = SimpleNamespace(context=Prompt(tuple(parts)), mode=mode, ids=IDS)
    return num_tokens_to_prepare(cast(Any, job), cast(Any, set(resident)))


def test_what_is_here_does_not_count() -> None:
    head, question = Part(tuple(tokens(300))), Part(tuple(tokens(20, 1)))
    document = Part(tuple(tokens(500, 2)), b"document")
    chain = list(IDS.prefix_chain(head.token_ids))
    parts = [head, document, document, question]
    assert load(parts, ReuseMode.LINKED) == 300 + 500 + 20  # named twice, it is brought once
    assert load(parts, ReuseMode.LINKED, b"document") == 320
    assert load(parts, ReuseMode.LINKED, b"document", *chain) == 320 - 2 * PREFIX_CHUNK_TOKENS
    assert load(parts, ReuseMode.LINKED, b"document", chain[1]) == 320  # behind a gap: of no use
    assert load([head, question], ReuseMode.EXACT, *chain) == 320 - 2 * PREFIX_CHUNK_TOKENS
