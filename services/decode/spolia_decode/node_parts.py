"""What the paths of a decode node work with, and what they have in common."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from spolia.v1.prefill_pb2 import PrefillStart
from spolia_core.link_terms import LinkTerms
from spolia_decode.arrivals import Arrivals
from spolia_decode.config import DecodeConfig
from spolia_decode.job import GenerateJob
from spolia_decode.link_metrics import LinkMetrics
from spolia_decode.prefill_client import PrefillClient
from spolia_decode.prefill_nodes import PrefillNodes
from spolia_decode.prepared_context import PreparedContext
from spolia_decode.request_metrics import RequestMetrics
from spolia_decode.shadow import ShadowChecks
from spolia_engine.context import Context, release_runs
from spolia_engine.core import EngineCore
from spolia_engine.passes import PassOptions
from spolia_engine.run import Run
from spolia_engine.steps import Steps
from spolia_node.deadline import Deadline
from spolia_node.store_client import StoreClient
from spolia_node.tracing import span
from spolia_worker.chunk_fetch import ACCEPTED_CODECS, ChunkFetcher
from spolia_worker.claims import ChunkClaims
from spolia_worker.costs import NodeCosts
from spolia_worker.engine_job import EngineJob, WorkKind
from spolia_worker.engine_thread import EngineThread
from spolia_worker.publisher import Publisher
from spolia_worker.timed import timed_steps


@dataclass(frozen=True, slots=True)
class NodeParts:
    """The parts of one decode node, made once at its start."""

    config: DecodeConfig
    core: EngineCore
    terms: LinkTerms
    thread: EngineThread
    store: StoreClient
    fetcher: ChunkFetcher
    publisher: Publisher
    claims: ChunkClaims
    arrivals: Arrivals
    prefill: PrefillClient
    prefill_nodes: PrefillNodes
    costs: NodeCosts
    link_metrics: LinkMetrics
    request_metrics: RequestMetrics
    num_decoding: Callable[[], int]
    """Sequences that decode now, and wait while a pass runs."""
    shadow: ShadowChecks | None
    """None where no request is ever checked."""

    def start_message(self, job: GenerateJob) -> PrefillStart:
        """The first message of a stream to a prefill node, its work not yet named."""
        return PrefillStart(
            request_id=job.request_id,
            tenant_id=job.tenant_id,
            fingerprint=self.core.adapter.fingerprint,
            accepted_codecs=ACCEPTED_CODECS,
            num_sink_tokens=self.core.recipe.num_sink_tokens,
            cache_salt=job.cache_salt,
        )

    def pass_options(self, ready: Callable[[int], bool] | None = None) -> PassOptions:
        """How passes run here; `ready` as there. Where answers may not depend on who is served beside them, neither may
        the KV of their prompts: then no pass joins others.
        """
        config = self.config
        return PassOptions(slice_tokens=config.slice_tokens, ready=ready, joins=not config.deterministic)

    async def compute(
        self,
        job: GenerateJob,
        steps: Steps[Context],
        runs: Sequence[Run],
        num_rows: int,
        deadline: Deadline,
        kind: WorkKind = WorkKind.CONTEXT,
    ) -> PreparedContext:
        """Builds a context of `num_rows` rows on this node's engine.

        `steps` takes the references of `runs` once it has begun; where it never does they are given back. Raises what
        it raises, and `DeadlineExceeded`.
        """
        computing = self.thread.run_steps(
            _prepare(steps),
            EngineJob(job.tenant_id, num_rows, kind),
            discard=lambda prepared: prepared.context.close(),
            skip=lambda: release_runs(self.core.pool, runs),
        )
        with span("link" if kind is WorkKind.LINK else "compute", num_tokens=num_rows) as computed:
            prepared = await deadline.wait(computing, "computing the prompt")
            computed.set(num_context_tokens=prepared.context.num_tokens, engine_ms=prepared.compute_s * 1000)
        self.costs.computed(num_rows, prepared.context.num_tokens, prepared.compute_s)
        return prepared


def _prepare(steps: Steps[Context]) -> Steps[PreparedContext]:
    made = yield from timed_steps(steps)
    context = made.result
    seconds_per_token = made.seconds / max(1, context.num_computed_tokens)
    return PreparedContext(context, compute_s=made.seconds, seconds_per_token=seconds_per_token)
