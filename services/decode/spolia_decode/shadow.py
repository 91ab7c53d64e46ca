"""Shadow checks: a share of LINKED requests, recomputed exactly off their path, says what linking costs today.

    offered ──▶ waiting ──▶ running ──▶ done | failed
       │           └───────────┴──▶ no room | gave way | shutdown
       └──▶ queue full | too long | no room

Calibration measures a model on some texts; traffic drifts away from them. A check takes the context that a request was
answered from, the very runs it read, and compares at each answer token what it predicts with what a context computed
anew does.

Requests come first, twice. In time: checks run in the engine's thread in slices, which begin only while no request has
a place or waits for one. In memory: checks compute in free blocks, and give back all they hold before a request has to
evict anything; what is cached, and in which order it goes, is as if there were no checks. (`shadow_evict` trades that
for checks on a node whose memory is full of cached KV.) Both rest on one rule: whatever ends a check does so in the
engine's thread, between two slices.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractContextManager, asynccontextmanager, nullcontext
from hashlib import blake2b

from spolia_core.errors import Busy
from spolia_core.reuse import ReuseMode
from spolia_decode.config import DecodeConfig
from spolia_decode.job import GenerateJob
from spolia_decode.shadow_check import ShadowCheck, ShadowComparison
from spolia_decode.shadow_metrics import Outcome, ShadowMetrics
from spolia_engine.core import EngineCore
from spolia_engine.extent import BlockState
from spolia_engine.sequence import Sequence
from spolia_node.deadline import Deadline
from spolia_node.logs import get_log
from spolia_worker.engine_thread import EngineThread

log = get_log(__name__)


def is_chosen(request_id: str, share: float) -> bool:
    """Whether a request is among the `share` (0 … 1) that is checked: by its id alone, so the same ones each time."""
    drawn = int.from_bytes(blake2b(request_id.encode(), digest_size=8).digest(), "big")
    return drawn < share * 2**64


class ShadowChecks:
    """The checks of one node. `step` is the engine thread's; all else may be called from the event loop."""

    def __init__(
        self,
        config: DecodeConfig,
        core: EngineCore,
        thread: EngineThread,
        metrics: ShadowMetrics,
        is_idle: Callable[[], bool],
    ) -> None:
        """`is_idle` says that no request is here; it is read from the engine's thread."""
        self._config = config
        self._core = core
        self._thread = thread
        self._metrics = metrics
        self._is_idle = is_idle
        self._lock = threading.Lock()
        self._waiting: deque[ShadowCheck] = deque()
        self._running: ShadowComparison | None = None
        self._closed = False
        self._num_starting_blocks = 0
        self.num_ended = 0
        """Checks that have given back what they held, for `give_way`."""
        metrics.watch(lambda: len(self._waiting), self._held_bytes)

    def offer(self, job: GenerateJob, sequence: Sequence) -> None:
        """Takes a finished request as a check, when it is LINKED and chosen; else leaves it. Any thread.

        The sequence must be open, and stays its owner's: the check has references of its own.
        """
        if job.mode is not ReuseMode.LINKED or not is_chosen(job.request_id, self._config.shadow_share):
            return
        token_ids = tuple(job.context.token_ids)
        answer_ids = tuple(sequence.generation.token_ids[len(job.received_ids) :])
        was_linked_here = sequence.context.num_computed_tokens > 0
        with self._lock:
            refusal = self._refusal(len(token_ids), len(answer_ids)) if was_linked_here else Outcome.LINKED_ELSEWHERE
            if refusal is None:
                context = sequence.context.shared()
                self._waiting.append(ShadowCheck(job.request_id, token_ids, answer_ids, context))
        if refusal is not None:
            self._metrics.count(refusal)

    def step(self) -> bool:
        """Runs a slice of the oldest check, unless a request is here; whether to come again. Engine's thread only."""
        if self._closed:
            self._drop_all(Outcome.SHUTDOWN)
            return False
        if not self._is_idle():
            return False
        running = self._running or self._next()
        if running is None:
            return False
        began = time.perf_counter()
        outcome: Outcome | None
        try:
            with self._sparing_cache():
                outcome = self._slice(running)
        except Busy:
            outcome = Outcome.NO_ROOM
        except Exception:  # a check that fails is nobody's answer
            log.exception("shadow check failed", request_id=running.check.request_id)
            outcome = Outcome.FAILED
        if outcome is not None:
            self._end(running, outcome)
        self._metrics.spent(time.perf_counter() - began)
        return True

    @asynccontextmanager
    async def starting(self, num_blocks: int, deadline: Deadline) -> AsyncIterator[None]:
        """The start of a request that may take `num_blocks`. Checks give way first where that could evict anything."""
        self._num_starting_blocks += num_blocks
        try:
            if self._holds_any() and self._num_starting_blocks > self._num_spare_blocks():
                await self.give_way(self.num_ended, deadline)
            yield
        finally:
            self._num_starting_blocks -= num_blocks

    async def give_way(self, num_ended_before: int, deadline: Deadline) -> bool:
        """Drops every check for a request that found no room. Waits for the slice under way, if any.

        Whether memory came free since `num_ended` was `num_ended_before`: then it is worth another try.
        """
        dropping = self._thread.run(lambda: self._drop_all(Outcome.GAVE_WAY))
        await deadline.wait(dropping, "waiting for the memory of shadow checks")
        return self.num_ended != num_ended_before

    def make_room(self) -> bool:
        """Drops every check for sequences whose next token finds no room; whether any was. Engine's thread only."""
        before = self.num_ended
        self._drop_all(Outcome.GAVE_WAY)
        return self.num_ended != before

    async def close(self) -> None:
        """Takes no more checks, and has the engine's thread drop those there are. Waits for nothing."""
        self._closed = True
        self._thread.notify()

    def release(self) -> None:
        """Drops what is left once the engine's thread has ended. Call after its stop."""
        self._closed = True
        self._drop_all(Outcome.SHUTDOWN)

    def _refusal(self, num_context: int, num_answer: int) -> Outcome | None:
        """Why a check is not taken."""
        pool, limit = self._core.pool, self._config.shadow_max_tokens
        if self._closed:
            return Outcome.SHUTDOWN
        if num_context + num_answer > limit:
            return Outcome.TOO_LONG
        if len(self._waiting) >= self._config.shadow_queue:
            return Outcome.QUEUE_FULL
        # Where memory is so short that it could not run, holding it would only make requests take it back.
        needed = pool.blocks_for(num_context) + 2 * pool.blocks_for(num_answer)
        if needed + self._num_starting_blocks > self._num_spare_blocks():
            return Outcome.NO_ROOM
        return None

    def _holds_any(self) -> bool:
        with self._lock:
            return bool(self._waiting) or self._running is not None

    def _num_spare_blocks(self) -> int:
        """What checks may take."""
        pool = self._core.pool
        return pool.available_blocks if self._config.shadow_evict else pool.counts()[BlockState.FREE]

    def _sparing_cache(self) -> AbstractContextManager[None]:
        return nullcontext() if self._config.shadow_evict else self._core.pool.sparing_cache()

    def _next(self) -> ShadowComparison | None:
        with self._lock:
            if self._waiting:
                check = self._waiting.popleft()
                self._running = ShadowComparison(self._core, check, self._config.shadow_slice_tokens)
            return self._running

    def _end(self, running: ShadowComparison, outcome: Outcome) -> None:
        with self._sparing_cache():
            running.close()
        with self._lock:
            self._running = None
            self.num_ended += 1
        self._metrics.count(outcome)

    def _drop_all(self, outcome: Outcome) -> None:
        if self._running is not None:
            self._end(self._running, outcome)
        while (waiting := self._next()) is not None:
            self._end(waiting, outcome)

    def _slice(self, running: ShadowComparison) -> Outcome | None:
        """Runs a slice, and reports the check with the last one."""
        divergence = running.advance()
        if divergence is None:
            return None
        check = running.check
        self._metrics.compared(divergence)
        log.debug(
            "shadow check",
            request_id=check.request_id,
            num_context_tokens=len(check.token_ids),
            num_tokens=divergence.num_tokens,
            mean_kl_nats=divergence.mean_kl_nats,
            max_kl_nats=max(divergence.kl_nats),
            top1_agreement=divergence.top1_agreement,
            nll_increase_nats=divergence.nll_increase_nats,
        )
        return Outcome.DONE

    @property
    def num_held_blocks(self) -> int:
        """Blocks that checks hold, those that others hold too among them. Any thread."""
        with self._lock:
            extents = {extent for check in self._waiting for extent in check.context.extents}
            if self._running is not None:
                extents.update(self._running.extents)
        return sum(extent.num_blocks for extent in extents)

    def _held_bytes(self) -> int:
        pool = self._core.pool
        return self.num_held_blocks * pool.block_size * pool.shape.bytes_per_token
