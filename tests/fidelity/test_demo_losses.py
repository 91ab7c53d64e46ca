"""What the harness must find on the demo model: reuse has a price, and recomputing more lowers it."""

from __future__ import annotations

from itertools import pairwise

import pytest
from harness_worlds import DEMO

from spolia_engine.adapter import ModelAdapter
from spolia_fidelity.encoder import TextEncoder
from spolia_fidelity.figures import PolicyFigures, figures_of
from spolia_fidelity.policy import parse_policies
from spolia_fidelity.runner import Runner
from spolia_fidelity.synthetic import synthetic_cases

LADDER = ("naive", "link:4", "link:16", "link:32")


@pytest.fixture(scope="module")
def figures() -> dict[str, PolicyFigures]:
    """Of a small sample: enough for what is asked here, not for a figure to quote."""
    adapter, encoder = ModelAdapter.load(DEMO), TextEncoder.from_model(DEMO)
    found = synthetic_cases(encoder, seed=7, num_questions=110, num_chunks=8, chunk_tokens=128)
    runs = Runner(adapter, encoder.decode, parse_policies(",".join(("full", *LADDER)))).run(found.cases)
    return figures_of({name: run.outcomes for name, run in runs.items()}, seed=7)


def test_mean_kl_does_not_rise_from_naive_to_link_32(figures: dict[str, PolicyFigures]) -> None:
    for cheaper, dearer in pairwise(LADDER):
        assert figures[dearer].overall.kl_mean.value <= figures[cheaper].overall.kl_mean.high


def test_naive_reuse_loses_cut_sentences_and_link_tokens_bring_them_back(figures: dict[str, PolicyFigures]) -> None:
    losses = {
        name: next(task.loss_points for task in found.tasks if task.task == "cut") for name, found in figures.items()
    }
    naive, linked = losses["naive"], losses["link:16"]
    assert naive is not None
    assert linked is not None
    assert naive.low >= 10.0
    assert linked.value <= naive.value / 4
