"""What the engine's thread says to Prometheus."""

from __future__ import annotations

from spolia_node.metrics import Metrics
from spolia_worker.engine_job import WorkKind

JOB_KINDS = tuple(kind for kind in WorkKind if kind.value != WorkKind.FUNCTION.value)


class EngineMetrics:
    """How long work waits, and for whom how much is done. Told by the engine's thread."""

    def __init__(self, metrics: Metrics) -> None:
        waited = metrics.histogram(
            "spolia_engine_queue_seconds", "Time from handing work to the engine until it began.", "kind"
        )
        self._waited = {kind: waited.labels(kind.value) for kind in WorkKind}
        slices = metrics.counter(
            "spolia_engine_slices_total", "Parts of jobs run, each up to where others were let in.", "kind"
        )
        self._slices = {kind: slices.labels(kind.value) for kind in JOB_KINDS}
        self._passes = metrics.counter(
            "spolia_engine_joint_passes_total", "Times that slices which jobs let run together went through the model."
        )
        self._tokens = metrics.counter("spolia_engine_tokens_total", "Tokens computed by jobs.", "tenant")

    def joint_pass(self) -> None:
        """Slices went through the model together; one that met no other counts too."""
        self._passes.inc()

    def began(self, kind: WorkKind, waited_s: float) -> None:
        """Work began after so long in the queue."""
        self._waited[kind].observe(waited_s)

    def computed(self, kind: WorkKind, tenant_id: str, num_tokens: int) -> None:
        """A job ran up to its next pause, or its end."""
        self._slices[kind].inc()
        if num_tokens:
            self._tokens.labels(tenant_id).inc(num_tokens)
