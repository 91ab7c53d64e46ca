"""The sequences that decode together, stepped by the engine's thread.

    joining ──step──▶ decoding ──finished───▶ (sealed, closed)
        │                ├──────preempted───▶ (closed; its reader is told, and comes back)
        └────────────────┴──────cancelled───▶ (closed)

Entries are closed in the engine's thread only, between steps, so no step ever reads memory that was given back. Who
decodes and who is preempted is what `scheduler.plan` says.

Slices of prompts that are due before a step go through the model with it (`run_slices`): its rows cost them next to
nothing then, and alone they would read all weights.
"""

from __future__ import annotations

import threading
from collections.abc import AsyncGenerator, Callable, Sequence

from torch import Tensor

from spolia_core.errors import Busy, InternalError, SpoliaError
from spolia_decode.inbox import Inbox, Outbox, Preempted
from spolia_engine.core import EngineCore
from spolia_engine.device_decoding import DrawnRow
from spolia_engine.extent import BlockState
from spolia_engine.generation import Delta
from spolia_engine.joint_pass import failed, run_slices
from spolia_engine.next_tokens import accept_row
from spolia_engine.scheduler import Running, State, plan
from spolia_engine.sequence import Sequence as DecodeSequence
from spolia_engine.steps import Came, Slice
from spolia_node.deadline import Deadline
from spolia_node.logs import get_log
from spolia_worker.config import DEFAULT_SLICE_TOKENS

log = get_log(__name__)

MAX_TRIES_FOR_ROOM = 8
"""Plans made for one step while other threads take the blocks each of them counts on."""


class Joined:
    """A sequence in a batch, as its reader sees it. One event loop's."""

    def __init__(
        self,
        sequence: DecodeSequence,
        on_finish: Callable[[DecodeSequence], None],
        number: int,
        notify: Callable[[], None],
    ) -> None:
        self._notify = notify
        self.sequence = sequence
        self.on_finish = on_finish
        self.number = number
        self.cancelled = False
        self.begins = True
        """Its first token is still to be drawn, from its context's last hidden state."""
        self.inbox = Inbox()

    async def deltas(self, deadline: Deadline) -> AsyncGenerator[Delta, None]:
        """Tokens as they are drawn; ends after the sequence is closed, which leaving earlier brings about.

        Raises `Preempted` when it was closed to make room for others, `DeadlineExceeded`, or what decoding raised.
        """
        self.inbox.open(deadline)
        try:
            while (delta := await self.inbox.take()) is not None:
                yield delta
        finally:
            self.inbox.close()
            self.leave()

    def leave(self) -> None:
        """Nobody reads any more. Says nothing new of a sequence that is closed already."""
        self.cancelled = True
        self._notify()


class DecodeBatch:
    """Owns sequences from `join` until they finish or their reader goes."""

    def __init__(
        self,
        core: EngineCore,
        notify: Callable[[], None],
        make_room: Callable[[], bool] = lambda: False,
        token_budget: int = DEFAULT_SLICE_TOKENS,
        on_preempted: Callable[[int], None] = lambda count: None,
        on_beside: Callable[[], None] = lambda: None,
    ) -> None:
        """`notify` wakes the engine's thread, which then calls `step`.

        `make_room` gives back what is held for less than a request, and says whether anything was: it is asked before a
        sequence is preempted. `token_budget`: tokens of a decode step and of the prefill slices before the next one
        together. `on_preempted` is told how many sequences were, `on_beside` of each step made with slices.
        """
        self._token_budget = self._slice_tokens = token_budget
        self._on_preempted = on_preempted
        self._on_beside = on_beside
        self._stepped_with_slices = False
        """Whether the step that is due was made already, by `run_slices`."""
        self._make_room = make_room
        self._core = core
        self._notify = notify
        self._lock = threading.Lock()
        self._outbox = Outbox()
        self._joining: list[Joined] = []
        self._decoding: list[Joined] = []
        self.num_preempted = 0
        """Sequences preempted since the start."""
        self.waits_for_room = False
        """Whether some sequence could not take its next step: `notify` when blocks come free."""

    @property
    def num_sequences(self) -> int:
        """Sequences decoding or about to."""
        return len(self._joining) + len(self._decoding)

    @property
    def slice_tokens(self) -> int:
        """Tokens of prompts that may be computed before the next step: what those that decode leave of the budget."""
        return self._slice_tokens if self._decoding else self._token_budget

    def join(self, sequence: DecodeSequence, on_finish: Callable[[DecodeSequence], None], number: int = 0) -> Joined:
        """Takes a sequence that was just made of its context, and decodes it from its first token on.

        `on_finish` is called in the engine's thread, before the sequence is closed, when the answer ended by itself.
        Where there is no room for all, requests of a smaller `number` go first.
        """
        joined = Joined(sequence, on_finish, number, self._notify)
        with self._lock:
            self._joining.append(joined)
        self._notify()
        return joined

    def stream(
        self, sequence: DecodeSequence, on_finish: Callable[[DecodeSequence], None], deadline: Deadline, number: int = 0
    ) -> AsyncGenerator[Delta, None]:
        """`join`, and the deltas."""
        return self.join(sequence, on_finish, number).deltas(deadline)

    def step(self) -> bool:
        """One decode step of everything that is here, unless `run_slices` made it just now.

        Whether there may be more to do. Engine's thread only.
        """
        try:
            if not self._stepped_with_slices:
                return self._step()
            self._stepped_with_slices = False
            self._let_in()
            return bool(self._decoding)
        finally:
            self._outbox.deliver()

    def run_slices(self, slices: Sequence[Slice]) -> Sequence[Came]:
        """Runs slices of prompts, together with the step that is due if any; `step` then leaves that out.

        What came of each slice. Engine's thread only.
        """
        if not self._core.decoding.steps_beside_slices:
            return run_slices(self._core.adapter, slices)
        try:
            batch = self._ready_to_step()
            if not batch:
                return run_slices(self._core.adapter, slices)
            self._notify()  # `step` comes next, whether or not somebody asked for it
            try:
                found = self._core.decoding.step_beside([entry.sequence for entry in batch], slices)
            except Exception as error:  # of the slices: what is wrong with the model the step finds out without them
                return failed(slices, error)
            self._stepped_with_slices = True
            self._on_beside()
            self._accept_all(batch, found.step)
            return found.slices
        finally:
            self._outbox.deliver()

    def _step(self) -> bool:
        batch = self._ready_to_step()
        if not batch:
            return False
        try:
            rows = self._core.decoding.step_rows([entry.sequence for entry in batch])
        except Exception as error:
            self._fail(batch, error)
        else:
            self._accept_all(batch, rows)
        return bool(self._decoding)

    def _ready_to_step(self) -> list[Joined]:
        """Those that decode now, with memory for their next token."""
        self._let_in()
        batch = self._with_room()
        self._outbox.deliver()  # first tokens do not wait for a pass
        return batch

    def _let_in(self) -> None:
        """Takes those that joined, and draws their first tokens; lets those go whose readers did."""
        with self._lock:
            self._decoding += self._joining
            self._joining = []
        self._drop([entry for entry in self._decoding if entry.cancelled], None)
        self._begin([entry for entry in self._decoding if entry.begins])

    def _begin(self, entries: list[Joined]) -> None:
        """Draws the first tokens of those that joined."""
        if not entries:
            return
        try:
            rows = self._core.decoding.first_rows([entry.sequence for entry in entries])
        except Exception as error:
            self._fail(entries, error)
            return
        for entry, row in zip(entries, rows, strict=True):
            entry.begins = False
            self._accept(entry, row)

    def _with_room(self) -> list[Joined]:
        """Those that decode now, with memory for their next token; makes room where there is none."""
        pool = self._core.pool
        for _ in range(MAX_TRIES_FOR_ROOM):
            state = State(
                available_blocks=pool.available_blocks,
                token_budget=self._token_budget,
                running=[_as_running(entry) for entry in self._decoding],
            )
            chosen = plan(state)
            self._slice_tokens = chosen.slice_tokens
            if len(chosen.decode) < len(self._decoding) and self._make_room():
                continue
            self._preempt([entry for entry in self._decoding if entry.number in chosen.preempt])
            batch = [entry for entry in self._decoding if entry.number in chosen.decode]
            if not batch and self._fail_the_stuck():
                continue
            self.waits_for_room = len(batch) < len(self._decoding)
            try:
                for entry in batch:
                    entry.sequence.make_room()
            except Busy:  # another thread took what the plan counted on
                continue
            return batch
        self.waits_for_room = True
        return []

    def _fail_the_stuck(self) -> bool:
        """Ends a sequence for which nobody can make room, since all that is held is its own; whether there was one.

        What it reads may hold more blocks than it counts: chunks lie in the memory of the prompt they were part of.
        """
        if len(self._decoding) != 1:
            return False
        sequence, counts = self._decoding[0].sequence, self._core.pool.counts()
        held = sum(extent.num_blocks for extent in {*sequence.context.extents, sequence.tail.extent})
        others = counts[BlockState.REFERENCED] - held + counts[BlockState.IN_TRANSFER] + counts[BlockState.LENT]
        if others > 0 or sequence.num_new_blocks <= self._core.pool.available_blocks:
            return False
        limit = f"{self._core.pool.num_blocks} blocks"
        self._drop(self._decoding, Busy(f"the answer holds all {limit} of this node", field="pool", limit=limit))
        return True

    def _preempt(self, entries: list[Joined]) -> None:
        if entries:
            self.num_preempted += len(entries)
            self._on_preempted(len(entries))
        self._drop(entries, Preempted())

    def _accept_all(self, entries: list[Joined], rows: Sequence[Tensor | DrawnRow]) -> None:
        for entry, row in zip(entries, rows, strict=True):
            self._accept(entry, row)

    def _accept(self, entry: Joined, row: Tensor | DrawnRow) -> None:
        """Adds a sequence's next token. What goes wrong here is that sequence's alone."""
        try:
            self._outbox.post(entry.inbox, accept_row(entry.sequence.generation, row))
        except Exception as error:
            self._fail([entry], error)
            return
        if entry.sequence.finished:
            self._finish(entry)
            self._drop([entry], None)

    def _fail(self, entries: list[Joined], error: Exception) -> None:
        told = error if isinstance(error, SpoliaError) else InternalError(f"decoding failed: {error!r}")
        if isinstance(told, InternalError):
            log.error("decoding failed", num_sequences=len(entries), exc_info=error)
        else:  # as of a constraint that nothing can follow any more: its caller's matter
            log.warning("answers ended", num_sequences=len(entries), error=told.message)
        self._drop(entries, told)

    def _finish(self, entry: Joined) -> None:
        try:
            entry.on_finish(entry.sequence)
        except Exception:  # the answer is complete; what is lost is reuse
            log.exception("sealing the answer failed")

    def _drop(self, entries: list[Joined], error: SpoliaError | Preempted | None) -> None:
        if not entries:
            return
        self._core.decoding.forget_plan()
        self._decoding = [entry for entry in self._decoding if entry not in entries]
        for entry in entries:
            entry.sequence.close()
            if error is not None:
                self._outbox.post(entry.inbox, error)
            self._outbox.post(entry.inbox, None)


def _as_running(entry: Joined) -> Running:
    sequence = entry.sequence
    return Running(entry.number, sequence.num_new_blocks, sequence.num_own_blocks, sequence.num_own_tokens)
