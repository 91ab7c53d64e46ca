"""What tests of shadow checks share: prompts, figures, and checks that are held in the middle."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import pytest
from tiny_cluster import WAIT_S, doc, eventually, tokens

from spolia_core.reuse import ReuseMode
from spolia_core.sampling import SamplingParams
from spolia_decode.node import DecodeNode
from spolia_decode.shadow_check import ShadowComparison
from spolia_decode.shadow_metrics import Outcome
from spolia_node.deadline import Deadline
from spolia_worker.record import model_name

LINKED = ReuseMode.LINKED
GREEDY = SamplingParams(max_tokens=12)
PARTS = [tokens(2), doc(70, 1), doc(40, 2), tokens(4, 9), doc(150, 3), tokens(11, 3)]
BEGINS = [doc(90, 4), tokens(6, 2)]
"""Reused as it was computed: the model has no BOS, so the document stands at position 0, and LINKED is exact."""


def figure(node: DecodeNode, name: str, **labels: str) -> float:
    labels = {"model": model_name(node.config), "profile": node.terms.profile, **labels}
    return node.server.metrics.value(f"spolia_shadow_{name}", **labels)


def outcomes(node: DecodeNode) -> dict[str, int]:
    """Checks by what became of them, those with none left out."""
    found = {outcome.value: int(figure(node, "checks_total", outcome=outcome.value)) for outcome in Outcome}
    return {name: count for name, count in found.items() if count}


async def ended(node: DecodeNode, **expected: int) -> None:
    """Returns once checks have ended so."""
    await eventually(lambda: outcomes(node) == expected, f"not {expected}")


def mean_kl(node: DecodeNode) -> float:
    return figure(node, "kl_nats_sum") / figure(node, "kl_nats_count")


@asynccontextmanager
async def somebody_here(node: DecodeNode) -> AsyncIterator[None]:
    """A request that has its place and no work: nothing is checked meanwhile."""
    async with node.admission.place(Deadline.after(WAIT_S)):
        yield


@contextmanager
def held_slice(monkeypatch: pytest.MonkeyPatch, number: int) -> Iterator[tuple[threading.Event, threading.Event]]:
    """(set when slice `number` of a check has begun, what it waits for to go on)."""
    began, gate, count = threading.Event(), threading.Event(), 0
    advance = ShadowComparison.advance

    def held(self: ShadowComparison) -> Any:
        nonlocal count
        count += 1
        if count == number:
            began.set()
            assert gate.wait(WAIT_S)
        return advance(self)

    monkeypatch.setattr(ShadowComparison, "advance", held)
    try:
        yield began, gate
    finally:
        gate.set()
