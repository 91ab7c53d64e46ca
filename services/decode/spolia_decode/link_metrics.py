"""What was decided of linked contexts, what it was expected to cost, and what it did."""

from __future__ import annotations

from enum import Enum

from spolia_core.reuse import TokenSource
from spolia_decode.link_place import LinkPlace
from spolia_node.metrics import Metrics
from spolia_worker.costs import Comparison

TIERS = (TokenSource.HOST, TokenSource.DISK)


class Gate(Enum):
    """What the cost gate said of a stored chunk."""

    FETCH = "fetch"
    """Expected to come sooner than it is computed."""
    COMPUTE = "compute"
    """Expected to come later: computed."""
    UNKNOWN = "unknown"
    """Nothing was measured lately: fetched."""

    @classmethod
    def of(cls, comparison: Comparison | None) -> Gate:
        """What a comparison, if there could be one, comes to."""
        if comparison is None:
            return cls.UNKNOWN
        return cls.COMPUTE if comparison.is_fetch_slower else cls.FETCH


class LinkMetrics:
    """Counters of one decode node; every series is there from the start."""

    def __init__(self, metrics: Metrics) -> None:
        self._decisions = metrics.counter(
            "spolia_decode_link_decisions_total", "Link passes by where they ran.", "place"
        )
        self._predicted = metrics.histogram(
            "spolia_decode_link_predicted_seconds", "What a link pass was expected to take where it ran.", "place"
        )
        self._actual = metrics.histogram(
            "spolia_decode_link_seconds",
            "What it took: the engine's time here, or until rows and chunks were here.",
            "place",
        )
        self._gate = metrics.counter(
            "spolia_decode_cost_gate_total", "Stored chunks by tier and what the cost gate said.", "source", "decision"
        )
        self._fetch_predicted = metrics.histogram(
            "spolia_decode_fetch_predicted_seconds", "What fetches that ran together were expected to take.", "source"
        )
        self._fetch_actual = metrics.histogram(
            "spolia_decode_fetch_seconds", "What fetches that ran together took.", "source"
        )
        for place in LinkPlace:
            self._decisions.labels(place.value)
            self._predicted.labels(place.value)
            self._actual.labels(place.value)
        for tier in TIERS:
            self._fetch_predicted.labels(tier.name.lower())
            self._fetch_actual.labels(tier.name.lower())
            for decision in Gate:
                self._gate.labels(tier.name.lower(), decision.value)

    def linked(self, place: LinkPlace, predicted_s: float | None, actual_s: float) -> None:
        """A link pass ran. `predicted_s` is None where nothing was known before it."""
        self._decisions.labels(place.value).inc()
        self._actual.labels(place.value).observe(actual_s)
        if predicted_s is not None:
            self._predicted.labels(place.value).observe(predicted_s)

    def gated(self, source: TokenSource, decision: Gate) -> None:
        """The gate let a stored chunk through, or not."""
        self._gate.labels(source.name.lower(), decision.value).inc()

    def fetched(self, source: TokenSource, predicted_s: float | None, actual_s: float) -> None:
        """Fetches from a tier that ran together have ended."""
        self._fetch_actual.labels(source.name.lower()).observe(actual_s)
        if predicted_s is not None:
            self._fetch_predicted.labels(source.name.lower()).observe(predicted_s)
