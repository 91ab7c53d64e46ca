"""What shadow checks say to Prometheus, and to the log when answers drift."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable
from enum import Enum

from prometheus_client import Counter, Gauge

from spolia_decode.shadow_divergence import Divergence
from spolia_node.logs import get_log
from spolia_node.metrics import Metrics

KL_BUCKETS = tuple(m * 10.0**e for e in range(-7, 2) for m in (1, 3))
WINDOW_CHECKS = 32
MIN_CHECKS = 4
"""A warning speaks of at least this many checks: one short answer says little."""

WARNING_INTERVAL_S = 60.0

log = get_log(__name__)


class Outcome(Enum):
    """What became of a check; the values are label values."""

    DONE = "done"
    """Compared."""
    FAILED = "failed"
    """An error of this node's; the log has it."""
    QUEUE_FULL = "queue_full"
    """Too many waited already."""
    TOO_LONG = "too_long"
    """Prompt and answer have more tokens than a check may."""
    LINKED_ELSEWHERE = "linked_elsewhere"
    """A prefill node linked it, and drew the first token: nothing here says how sure of it the model was."""
    NO_ROOM = "no_room"
    """The pool had too few free blocks to recompute it in: what is cached is not evicted for a check."""
    GAVE_WAY = "gave_way"
    """A request needed the memory."""
    SHUTDOWN = "shutdown"
    """The node drains."""


class ShadowMetrics:
    """Counts checks, and warns of a divergence above a bound. A node has one model and one profile: its labels."""

    def __init__(
        self,
        metrics: Metrics,
        model: str,
        profile: str,
        max_kl_nats: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`max_kl_nats` bounds the mean KL per token of the last checks; 0 never warns. `clock` in seconds."""
        self._labels = {"model": model, "profile": profile}
        self._max_kl_nats = max_kl_nats
        self._clock = clock
        self._recent: deque[Divergence] = deque(maxlen=WINDOW_CHECKS)
        self._warned_at = -math.inf
        self._outcomes = metrics.counter(
            "spolia_shadow_checks_total", "Shadow checks, by what became of them.", *self._labels, "outcome"
        )
        for outcome in Outcome:
            self._outcomes.labels(**self._labels, outcome=outcome.value)
        self._kl = metrics.histogram(
            "spolia_shadow_kl_nats",
            "KL(exact || linked) of the next-token distributions that predict each answer token.",
            *self._labels,
            buckets=KL_BUCKETS,
        ).labels(**self._labels)
        self._compared = self._counter(metrics, "spolia_shadow_tokens_total", "Answer tokens compared.")
        self._agreed = self._counter(
            metrics, "spolia_shadow_agreed_tokens_total", "Answer tokens whose most likely one is the same both ways."
        )
        self._exact_nll = self._counter(
            metrics, "spolia_shadow_exact_nll_nats_total", "Sum of -log p of the answers' tokens, recomputed exactly."
        )
        self._linked_nll = self._counter(
            metrics, "spolia_shadow_linked_nll_nats_total", "Sum of -log p of the answers' tokens, as linked."
        )
        self._seconds = self._counter(metrics, "spolia_shadow_seconds_total", "Engine time spent on checks.")
        self._mean = self._gauge(
            metrics, "spolia_shadow_recent_kl_nats", f"Mean KL per answer token over the last {WINDOW_CHECKS} checks."
        )
        self._waiting = self._gauge(metrics, "spolia_shadow_waiting", "Checks that wait.")
        self._held = self._gauge(
            metrics, "spolia_shadow_held_bytes", "KV that checks hold references on, and give up for any request."
        )

    def watch(self, num_waiting: Callable[[], int], held_bytes: Callable[[], int]) -> None:
        """Reads queue and memory whenever somebody looks. Both are called from any thread."""
        self._waiting.set_function(num_waiting)
        self._held.set_function(held_bytes)

    def spent(self, seconds: float) -> None:
        """Adds engine time."""
        self._seconds.inc(seconds)

    def count(self, outcome: Outcome) -> None:
        """Counts a check that ended, or was not taken."""
        self._outcomes.labels(**self._labels, outcome=outcome.value).inc()

    def compared(self, divergence: Divergence) -> None:
        """Records what a check found. Engine's thread only."""
        for kl in divergence.kl_nats:
            self._kl.observe(kl)
        self._exact_nll.inc(divergence.exact_nll_nats)
        self._linked_nll.inc(divergence.linked_nll_nats)
        self._compared.inc(divergence.num_tokens)
        self._agreed.inc(divergence.num_agreed)
        self._recent.append(divergence)
        over = Divergence.joined(self._recent)
        self._mean.set(over.mean_kl_nats)
        if 0 < self._max_kl_nats < over.mean_kl_nats and len(self._recent) >= MIN_CHECKS:
            self._warn(over)

    def _warn(self, over: Divergence) -> None:
        """Once in a while: every later check says the same."""
        now = self._clock()
        if now - self._warned_at < WARNING_INTERVAL_S:
            return
        self._warned_at = now
        log.warning(
            "linked answers drift from exact ones",
            **self._labels,
            mean_kl_nats=round(over.mean_kl_nats, 6),
            max_kl_nats=self._max_kl_nats,
            top1_agreement=round(over.top1_agreement, 4),
            num_checks=len(self._recent),
            num_tokens=over.num_tokens,
        )

    def _counter(self, metrics: Metrics, name: str, meaning: str) -> Counter:
        return metrics.counter(name, meaning, *self._labels).labels(**self._labels)

    def _gauge(self, metrics: Metrics, name: str, meaning: str) -> Gauge:
        return metrics.gauge(name, meaning, *self._labels).labels(**self._labels)
