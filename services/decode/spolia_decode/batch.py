"""The sequences that decode together, stepped by the engine's thread.

    joining ──step──▶ decoding ──finished──▶ (sealed, closed)
        └────────────────┴──────cancelled──▶ (closed)

Entries are closed in the engine's thread only, between steps, so no step ever reads memory that was given back.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Callable

from torch import Tensor

from spolia_core.errors import InternalError, SpoliaError
from spolia_engine.core import EngineCore
from spolia_engine.generation import Delta
from spolia_engine.sequence import Sequence
from spolia_node.deadline import Deadline
from spolia_node.logs import get_log

log = get_log(__name__)


class _Entry:
    def __init__(self, sequence: Sequence, on_finish: Callable[[Sequence], None]) -> None:
        self.sequence = sequence
        self.on_finish = on_finish
        self.cancelled = False
        self._loop = asyncio.get_running_loop()
        self.deltas: asyncio.Queue[Delta | SpoliaError | None] = asyncio.Queue()  # bounded by max_tokens + 1

    def post(self, item: Delta | SpoliaError | None) -> None:
        """From the engine's thread. None says that the sequence is closed."""
        self._loop.call_soon_threadsafe(self.deltas.put_nowait, item)


class DecodeBatch:
    """Owns sequences from `stream` until they finish or their reader goes."""

    def __init__(self, core: EngineCore, notify: Callable[[], None]) -> None:
        """`notify` wakes the engine's thread, which then calls `step`."""
        self._core = core
        self._notify = notify
        self._lock = threading.Lock()
        self._joining: list[_Entry] = []
        self._decoding: list[_Entry] = []

    @property
    def num_sequences(self) -> int:
        """Sequences decoding or about to."""
        return len(self._joining) + len(self._decoding)

    async def stream(
        self, sequence: Sequence, on_finish: Callable[[Sequence], None], deadline: Deadline
    ) -> AsyncGenerator[Delta, None]:
        """Decodes a sequence that has its first token, yielding each further one. Takes the sequence.

        `on_finish` is called in the engine's thread, before the sequence is closed, when the answer ended by itself.
        The generator ends after the sequence is closed. Closing it earlier cancels the sequence.
        """
        entry = _Entry(sequence, on_finish)
        with self._lock:
            self._joining.append(entry)
        self._notify()
        try:
            while (item := await deadline.wait(entry.deltas.get(), "decoding")) is not None:
                if isinstance(item, SpoliaError):
                    raise item
                yield item
        finally:
            entry.cancelled = True  # says nothing new of a sequence that is closed already
            self._notify()

    def step(self) -> bool:
        """One decode step of everything that is here; whether there may be more to do. Engine's thread only."""
        with self._lock:
            self._decoding += self._joining
            self._joining = []
        self._drop([entry for entry in self._decoding if entry.cancelled], None)
        batch = self._decoding
        if not batch:
            return False
        try:
            logits = self._core.step_logits([entry.sequence for entry in batch])
        except Exception as error:
            self._fail(batch, error)
            return False
        for entry, row in zip(batch, logits, strict=True):
            self._accept(entry, row)
        return bool(self._decoding)

    def _accept(self, entry: _Entry, logits: Tensor) -> None:
        """Adds a sequence's next token. What goes wrong here is that sequence's alone."""
        try:
            entry.post(self._core.accept(entry.sequence, logits))
        except Exception as error:
            self._fail([entry], error)
            return
        if entry.sequence.finished:
            self._finish(entry)
            self._drop([entry], None)

    def _fail(self, entries: list[_Entry], error: Exception) -> None:
        log.error("decoding failed", num_sequences=len(entries), exc_info=error)
        self._drop(entries, error if isinstance(error, SpoliaError) else InternalError(f"decoding failed: {error!r}"))

    def _finish(self, entry: _Entry) -> None:
        try:
            entry.on_finish(entry.sequence)
        except Exception:  # the answer is complete; what is lost is reuse
            log.exception("sealing the answer failed")

    def _drop(self, entries: list[_Entry], error: SpoliaError | None) -> None:
        if not entries:
            return
        self._core.forget_plan()
        self._decoding = [entry for entry in self._decoding if entry not in entries]
        for entry in entries:
            entry.sequence.close()
            if error is not None:
                entry.post(error)
            entry.post(None)
