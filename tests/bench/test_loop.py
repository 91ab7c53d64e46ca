"""The closed loop: who asks for what, and what its window counts."""

from __future__ import annotations

import random
from collections import Counter
from itertools import islice
from types import SimpleNamespace
from typing import Any

import pytest

from spolia_bench.reuse.loop import Window
from spolia_bench.reuse.zipf import choices, choose_without_repeats, zipf_weights


def answer() -> Any:
    return SimpleNamespace(
        ttft_ms=1.0, result=SimpleNamespace(num_prompt_tokens=10, reuse=SimpleNamespace(num_reused_tokens=5))
    )


def test_zipf_weights_fall_with_the_power_of_the_rank() -> None:
    assert zipf_weights(4, 1.0) == pytest.approx((1, 1 / 2, 1 / 3, 1 / 4))
    assert zipf_weights(3, 2.0) == pytest.approx((1, 1 / 4, 1 / 9))
    assert zipf_weights(3, 0.0) == (1, 1, 1)


def test_a_choice_never_repeats_and_stays_among_the_items() -> None:
    rng = random.Random(0)
    for _ in range(200):
        chosen = choose_without_repeats(zipf_weights(10, 1.0), 8, rng)
        assert len(set(chosen)) == 8
        assert set(chosen) <= set(range(10))


def test_all_items_can_be_chosen() -> None:
    assert sorted(choose_without_repeats(zipf_weights(5, 3.0), 5, random.Random(1))) == list(range(5))


def test_popular_items_are_chosen_more_often() -> None:
    counts = Counter(i for chosen in islice(choices(64, 1.0, 8, "s"), 2000) for i in chosen)
    assert counts[0] > counts[5] > counts[30] > 0


def test_popularity_says_nothing_of_the_place_in_a_prompt() -> None:
    places = [chosen.index(0) for chosen in islice(choices(16, 1.0, 8, "s"), 3000) if 0 in chosen]
    assert sum(places) / len(places) == pytest.approx(3.5, abs=0.2)


def test_the_same_seed_chooses_the_same() -> None:
    assert list(islice(choices(64, 1.0, 8, "a"), 5)) == list(islice(choices(64, 1.0, 8, "a"), 5))
    assert list(islice(choices(64, 1.0, 8, "a"), 5)) != list(islice(choices(64, 1.0, 8, "b"), 5))


def test_a_window_opens_when_every_client_was_served_and_counts_what_follows() -> None:
    window = Window(num_clients=2, length_s=10.0)
    for client, now_s in ((0, 1.0), (0, 2.0), (1, 3.0), (0, 4.0), (1, 13.0), (0, 13.1)):
        window.add(client, answer(), now_s)
    assert window.opened_s == 3.0
    assert len(window.answers) == 2
    assert window.requests_per_s == 0.2
    assert window.reused_share == 0.5
