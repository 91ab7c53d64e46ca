"""A pass on this node's engine for a decode node: its live KV leaves as it is made, then the token after it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import closing
from dataclasses import dataclass

from spolia.v1.prefill_pb2 import FirstToken, PrefillDone, PrefillResponse
from spolia_core.sampling import SamplingParams
from spolia_engine.context import Context, release_runs
from spolia_engine.core import EngineCore
from spolia_engine.run import Run
from spolia_engine.steps import Steps
from spolia_node.deadline import Deadline
from spolia_prefill.handoff import Acknowledgements, LayerStream
from spolia_prefill.progress import Progress
from spolia_worker.engine_job import EngineJob
from spolia_worker.engine_thread import EngineThread
from spolia_worker.timed import Timed, timed_steps


@dataclass(frozen=True, slots=True)
class _Prefilled:
    context: Context
    token_id: int


@dataclass(frozen=True, slots=True)
class PassToHand:
    """What is to be run. `steps` takes the references of `runs` once it has begun, and tells `layers` of each layer.

    `num_cached_tokens` of the context were here or fetched.
    """

    steps: Steps[Context]
    runs: Sequence[Run]
    layers: LayerStream
    job: EngineJob
    sampling: SamplingParams
    token_index: int
    num_cached_tokens: int


class PassRunner:
    """Runs passes on one engine and hands them over."""

    def __init__(self, core: EngineCore, thread: EngineThread) -> None:
        self._core = core
        self._thread = thread

    async def run(
        self, work: PassToHand, acks: Acknowledgements, progress: Progress, deadline: Deadline
    ) -> AsyncGenerator[PrefillResponse, None]:
        """Yields the live KV's header, its layers as they are computed, the token after the context, and the end.

        The context's memory is held until the caller has acknowledged every layer or stopped doing so. Closing the
        generator ends the pass at its next layer, or where it stands between two slices.
        """
        with closing(work.layers):
            acks.expect(work.layers.num_slices, self._core.adapter.num_layers)
            working = self._thread.submit_steps(
                progress.following(0, timed_steps(self._prefill(work))),
                work.job,
                discard=lambda prefilled: prefilled.result.context.close(),
                skip=lambda: release_runs(self._core.pool, work.runs),
            )
            try:
                yield work.layers.header()
                async for response in work.layers.frames(working):
                    yield response
                timed = await working
                progress.finished(0)
                yield PrefillResponse(first_token=FirstToken(token_id=timed.result.token_id))
                yield PrefillResponse(
                    done=PrefillDone(
                        num_computed_tokens=timed.result.context.num_computed_tokens,
                        num_cached_tokens=work.num_cached_tokens,
                        compute_ms=timed.seconds * 1000,
                    )
                )
                await deadline.wait(acks.wait_all(), "waiting for acknowledgements")
            finally:
                work.layers.close()  # first: a pass under way ends at its next layer
                _close(working)

    def _prefill(self, work: PassToHand) -> Steps[_Prefilled]:
        """For the engine's thread."""
        context = yield from work.steps
        try:
            return _Prefilled(context, self._core.first_token(context, work.sampling, work.token_index))
        except BaseException:
            context.close()
            raise


def _close(working: asyncio.Future[Timed[_Prefilled]]) -> None:
    """Frees the pass's context. One that is under way or never began is freed by the engine's thread."""
    if not working.cancel() and not working.cancelled() and working.exception() is None:
        working.result().result.context.close()
