"""A pass on this node's engine for a decode node: its live KV leaves as it is made, then its last hidden state."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import closing
from dataclasses import dataclass

from spolia.v1.common_pb2 import Frame
from spolia.v1.prefill_pb2 import PrefillDone, PrefillResponse
from spolia_core.digests import digest
from spolia_engine.context import Context, release_runs
from spolia_engine.core import EngineCore
from spolia_engine.kv_bytes import hidden_to_bytes
from spolia_engine.run import Run
from spolia_engine.steps import Steps
from spolia_node.deadline import Deadline
from spolia_node.tracing import span_across_yields
from spolia_prefill.handoff import Acknowledgements, LayerStream
from spolia_prefill.progress import Progress
from spolia_worker.engine_job import EngineJob
from spolia_worker.engine_thread import EngineThread
from spolia_worker.timed import Timed, timed_steps


@dataclass(frozen=True, slots=True)
class PassToHand:
    """What is to be run. `steps` takes the references of `runs` once it has begun, and tells `layers` of each layer.

    `num_cached_tokens` of the context were here or fetched.
    """

    steps: Steps[Context]
    runs: Sequence[Run]
    layers: LayerStream
    job: EngineJob
    num_cached_tokens: int


class PassRunner:
    """Runs passes on one engine and hands them over."""

    def __init__(self, core: EngineCore, thread: EngineThread) -> None:
        self._core = core
        self._thread = thread

    async def run(
        self, work: PassToHand, acks: Acknowledgements, progress: Progress, deadline: Deadline
    ) -> AsyncGenerator[PrefillResponse, None]:
        """Yields the live KV's header, its layers as they are computed, its last hidden state, and the end.

        The context's memory is held until the caller has acknowledged every layer or stopped doing so. Closing the
        generator ends the pass at its next layer, or where it stands between two slices.
        """
        with closing(work.layers):
            acks.expect(work.layers.num_slices, self._core.adapter.num_layers)
            working = self._thread.submit_steps(
                progress.following(0, timed_steps(work.steps)),
                work.job,
                discard=lambda timed: timed.result.close(),
                skip=lambda: release_runs(self._core.pool, work.runs),
            )
            try:
                with span_across_yields("compute", num_tokens=work.job.num_tokens) as computing:
                    yield work.layers.header()
                    async for response in work.layers.frames(working):
                        yield response
                    timed = await working
                    computing.set(engine_ms=timed.seconds * 1000)
                progress.finished(0)
                yield PrefillResponse(last_hidden=_last_hidden(timed.result))
                yield PrefillResponse(
                    done=PrefillDone(
                        num_computed_tokens=timed.result.num_computed_tokens,
                        num_cached_tokens=work.num_cached_tokens,
                        compute_ms=timed.seconds * 1000,
                    )
                )
                await deadline.wait(acks.wait_all(), "waiting for acknowledgements")
            finally:
                work.layers.close()  # first: a pass under way ends at its next layer
                _close(working)


def _last_hidden(context: Context) -> Frame:
    assert context.last_hidden is not None, "the context was computed here"
    data = hidden_to_bytes(context.last_hidden)
    return Frame(data=data, digest=digest(data))


def _close(working: asyncio.Future[Timed[Context]]) -> None:
    """Frees the pass's context. One that is under way or never began is freed by the engine's thread."""
    if not working.cancel() and not working.cancelled() and working.exception() is None:
        working.result().result.close()
