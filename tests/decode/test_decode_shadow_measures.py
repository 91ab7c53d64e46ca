"""What shadow checks measure, whom they choose, and what they say of it."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch

from spolia_core.errors import InvalidRequest
from spolia_decode import shadow_metrics
from spolia_decode.admission import Admission
from spolia_decode.config import DecodeConfig
from spolia_decode.shadow import is_chosen
from spolia_decode.shadow_divergence import MAX_NATS, Divergence
from spolia_decode.shadow_metrics import MIN_CHECKS, WARNING_INTERVAL_S, WINDOW_CHECKS, Outcome, ShadowMetrics
from spolia_node.deadline import Deadline
from spolia_node.metrics import Metrics

LABELS = {"model": "model", "profile": "profile"}


def logits(num_tokens: int, vocab_size: int, seed: int) -> torch.Tensor:
    return torch.randn(num_tokens, vocab_size, generator=torch.Generator().manual_seed(seed)) * 3


def slow_kl(exact: list[float], linked: list[float]) -> float:
    p, q = ([math.exp(x) for x in row] for row in (exact, linked))
    return sum(a / sum(p) * math.log((a / sum(p)) / (b / sum(q))) for a, b in zip(p, q, strict=True))


def test_divergence_is_what_its_formulas_say() -> None:
    exact, linked, answer = logits(5, 11, 1), logits(5, 11, 2), [0, 3, 10, 7, 7]
    linked[1] = exact[1]
    found = Divergence.of(exact, linked, answer)
    expected = [slow_kl(a, b) for a, b in zip(exact.tolist(), linked.tolist(), strict=True)]
    assert found.kl_nats == pytest.approx(expected, abs=1e-5)
    assert found.mean_kl_nats == pytest.approx(sum(expected) / 5, abs=1e-5)
    best = [
        (max(range(11), key=a.__getitem__), max(range(11), key=b.__getitem__))
        for a, b in zip(exact.tolist(), linked.tolist(), strict=True)
    ]
    assert found.num_agreed == sum(a == b for a, b in best)
    nll = [torch.nn.functional.cross_entropy(x, torch.tensor(answer)) for x in (exact, linked)]
    assert found.nll_increase_nats == pytest.approx(float(nll[1] - nll[0]), abs=1e-5)


def test_divergence_of_a_distribution_from_itself_is_nothing() -> None:
    same = logits(7, 50, 3)
    found = Divergence.of(same, same + 4.0, [0] * 7)  # logits are good up to a constant
    assert max(found.kl_nats) < 1e-6
    assert min(found.kl_nats) >= 0
    assert (found.top1_agreement, found.num_tokens) == (1.0, 7)
    assert found.nll_increase_nats == pytest.approx(0, abs=1e-5)


def test_tokens_that_neither_context_can_produce_add_nothing() -> None:
    exact, linked = logits(1, 4, 4), logits(1, 4, 5)
    shorter = Divergence.of(exact[:, :3], linked[:, :3], [1])
    exact[:, 3] = linked[:, 3] = -math.inf
    assert Divergence.of(exact, linked, [1]).kl_nats == pytest.approx(shorter.kl_nats)


def test_damaged_logits_are_as_far_off_as_can_be_said_and_disagree() -> None:
    exact = logits(3, 6, 8)
    exact[:, 2] = 50.0
    linked = exact.clone()
    linked[1] = math.nan
    linked[2, 2] = -math.inf
    found = Divergence.of(exact, linked, [2, 2, 2])
    assert found.kl_nats == pytest.approx((0.0, MAX_NATS, MAX_NATS))
    assert (found.num_agreed, found.linked_nll_nats) == (1, pytest.approx(2 * MAX_NATS))


def test_a_divergence_measured_in_pieces_is_that_of_the_whole() -> None:
    exact, linked, answer = logits(9, 20, 6), logits(9, 20, 7), list(range(9))
    cuts = [0, 1, 4, 9]
    pieces = [Divergence.of(exact[a:b], linked[a:b], answer[a:b]) for a, b in pairwise(cuts)]
    joined, whole = Divergence.joined(pieces), Divergence.of(exact, linked, answer)
    assert joined.kl_nats == pytest.approx(whole.kl_nats)
    assert joined.num_agreed == whole.num_agreed
    assert joined.nll_increase_nats == pytest.approx(whole.nll_increase_nats)


def test_requests_are_chosen_by_their_ids_alone_and_in_the_share_asked_for() -> None:
    ids = [f"request-{i}" for i in range(4000)]
    for share in (0.0, 0.01, 0.3, 1.0):
        chosen = [i for i in ids if is_chosen(i, share)]
        assert abs(len(chosen) / 4000 - share) <= 4 * math.sqrt(share * (1 - share) / 4000)
        assert all(is_chosen(i, 1.0) and is_chosen(i, max(share, 0.5)) for i in chosen if share <= 0.5)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("shadow_share", 1.5),
        ("shadow_share", -0.1),
        ("shadow_queue", 0),
        ("shadow_max_tokens", 1),
        ("shadow_slice_tokens", 0),
        ("shadow_max_kl", -1.0),
    ],
)
def test_a_bad_setting_is_refused_by_name(name: str, value: float) -> None:
    with pytest.raises(InvalidRequest) as caught:
        DecodeConfig(**{name: value})  # type: ignore[arg-type]  # settings differ in type
    assert caught.value.field == name


class Clock:
    """Seconds, by hand."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


def apart(kl: float, num_tokens: int = 4) -> Divergence:
    return Divergence((kl,) * num_tokens, num_tokens - 1, 1.0, 1.0 + kl)


class Log:
    """Keeps the figures of warnings."""

    def __init__(self) -> None:
        self.warnings: list[dict[str, Any]] = []

    def warning(self, _event: str, **figures: Any) -> None:
        self.warnings.append(figures)


def warnings_of(metrics: ShadowMetrics, *found: Divergence) -> list[dict[str, Any]]:
    with pytest.MonkeyPatch.context() as patch:
        log = Log()
        patch.setattr(shadow_metrics, "log", log)
        for divergence in found:
            metrics.compared(divergence)
    return log.warnings


def test_a_mean_above_the_bound_warns_once_in_a_while_with_the_figures() -> None:
    clock = Clock()
    metrics = ShadowMetrics(Metrics(), "model", "profile", 0.1, clock)
    assert not warnings_of(metrics, *[apart(0.5)] * (MIN_CHECKS - 1))
    (warning,) = warnings_of(metrics, *[apart(0.5)] * 5)
    assert {k: warning[k] for k in ("model", "profile", "num_checks", "num_tokens", "max_kl_nats")} == {
        **LABELS,
        "num_checks": MIN_CHECKS,
        "num_tokens": 4 * MIN_CHECKS,
        "max_kl_nats": 0.1,
    }
    assert (warning["mean_kl_nats"], warning["top1_agreement"]) == (0.5, 0.75)
    clock.now += WARNING_INTERVAL_S
    assert len(warnings_of(metrics, *[apart(0.5)] * 5)) == 1


def test_a_mean_within_the_bound_or_without_one_never_warns() -> None:
    assert not warnings_of(ShadowMetrics(Metrics(), "model", "profile", 0.6), *[apart(0.5)] * 50)
    assert not warnings_of(ShadowMetrics(Metrics(), "model", "profile"), *[apart(50.0)] * 50)


def test_the_mean_forgets_what_was_long_ago_and_weighs_tokens_not_answers() -> None:
    metrics = Metrics()
    shadow = ShadowMetrics(metrics, "model", "profile")
    shadow.compared(apart(1.0, num_tokens=6))
    shadow.compared(apart(0.0, num_tokens=2))
    assert metrics.value("spolia_shadow_recent_kl_nats", **LABELS) == pytest.approx(0.75)
    for _ in range(WINDOW_CHECKS):
        shadow.compared(apart(0.25))
    assert metrics.value("spolia_shadow_recent_kl_nats", **LABELS) == pytest.approx(0.25)


def test_metrics_add_up_tokens_answers_and_outcomes() -> None:
    metrics = Metrics()
    shadow = ShadowMetrics(metrics, "model", "profile")
    shadow.watch(lambda: 3, lambda: 4096)
    shadow.compared(Divergence((0.5, 0.25), 1, 2.0, 2.5))
    shadow.compared(Divergence((0.0,), 1, 2.0, 1.0))
    shadow.count(Outcome.DONE)
    shadow.count(Outcome.DONE)
    shadow.count(Outcome.QUEUE_FULL)
    shadow.spent(0.5)

    def value(name: str, **labels: str) -> float:
        return metrics.value(f"spolia_shadow_{name}", **LABELS, **labels)

    assert (value("kl_nats_count"), value("kl_nats_sum")) == (3, 0.75)
    assert (value("exact_nll_nats_total"), value("linked_nll_nats_total")) == (4.0, 3.5)
    assert (value("tokens_total"), value("agreed_tokens_total")) == (3, 2)
    assert (value("checks_total", outcome="done"), value("checks_total", outcome="queue_full")) == (2, 1)
    assert (value("waiting"), value("held_bytes"), value("seconds_total")) == (3, 4096, 0.5)


async def test_admission_is_idle_only_when_nobody_runs_or_waits_and_says_so_once() -> None:
    times_idle = 0

    def on_idle() -> None:
        nonlocal times_idle
        times_idle += 1
        assert admission.is_idle

    admission = Admission(max_running=1, max_waiting=2, on_idle=on_idle)
    assert admission.is_idle
    async with admission.place(Deadline.after(60)):
        assert not admission.is_idle
        with pytest.raises(Exception, match="ran out of time"):
            async with admission.place(Deadline.after(0.01)):
                raise AssertionError("there was no place")
        assert times_idle == 0
    assert (admission.is_idle, times_idle) == (True, 1)
