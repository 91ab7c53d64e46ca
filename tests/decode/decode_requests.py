"""What tests of a decode node's failures ask for, and how they read it."""

from __future__ import annotations

from typing import Any

import grpc
import pytest
from tiny_cluster import Parts, doc, tokens

from spolia_core.reuse import ReuseMode, TokenSource
from spolia_core.sampling import SamplingParams

GREEDY = SamplingParams(max_tokens=8)
LONG = SamplingParams(max_tokens=1000)
LINKED = ReuseMode.LINKED
COMPUTED, LINK, DEVICE, HOST, COMPILED = (
    TokenSource.COMPUTED,
    TokenSource.LINK,
    TokenSource.DEVICE,
    TokenSource.HOST,
    TokenSource.COMPILED,
)

LINKED_PROMPTS = {
    "one": [tokens(3), doc(60, 1), tokens(9, 2)],
    "three": [tokens(2), doc(70, 1), doc(40, 2), tokens(4, 9), doc(150, 3), tokens(11, 3)],
    "the same twice": [tokens(2), doc(50, 1), tokens(5, 5), doc(50, 1), tokens(7, 3)],
    "ends in a document": [tokens(4), doc(45, 4)],
    "begins with a document": [doc(45, 4), tokens(6, 2)],
    "is a document": [doc(64, 6)],
    "shorter than the link tokens": [tokens(3), doc(9, 1), doc(40, 2), tokens(3, 3)],
    "no document": [tokens(30)],
}
LINKED_PARTS: Parts = LINKED_PROMPTS["one"]
MODES = pytest.mark.parametrize(("parts", "mode"), [([tokens(300)], ReuseMode.EXACT), (LINKED_PARTS, LINKED)])


async def read_all(call: Any) -> list[Any]:
    """The responses not read yet."""
    responses: list[Any] = []
    while (response := await call.read()) is not grpc.aio.EOF:
        responses.append(response)
    return responses
