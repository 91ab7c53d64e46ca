"""A corpus of files, warmed in many requests, a few of them under way at once.

The store is the record of what is done: a run that was interrupted is run again, and what is stored costs a question.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeGuard

from spolia.cli.texts import EVERYTHING, NoText, read_document, read_found
from spolia.client import Client
from spolia.errors import Busy, Cancelled, DeadlineExceeded, InvalidRequest, SpoliaError, Unavailable
from spolia.options import SplitterName
from spolia.parts import Document
from spolia.results import WarmedDocument

REQUEST_BYTES = 1 << 20
REQUEST_DOCUMENTS = 64
"""Requests are about this large: below every limit of a gateway as it comes, and enough for its prefill nodes."""
REQUESTS_AT_ONCE = 4
MAX_BUSY_PAUSES = 8
MAX_FAILURES_IN_A_ROW = 3
"""So many documents that fail one after another, not for what they are, end the run: it is the cluster that fails."""


@dataclass(frozen=True, slots=True)
class Item:
    """A document and its index among the files."""

    index: int
    document: Document
    is_named: bool


@dataclass(frozen=True, slots=True)
class Failure:
    """A document that was not warmed, and why."""

    name: str
    error: SpoliaError


@dataclass(slots=True)
class CorpusReport:
    """What became of the files. `num_untried` were left when the run was given up."""

    warmed: list[WarmedDocument] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    empty: list[str] = field(default_factory=list)
    left_out: list[Failure] = field(default_factory=list)
    """What was found in a folder and cannot be a document of this model."""
    num_untried: int = 0
    elapsed_s: float = 0.0


class CorpusWarmer:
    """Warms files through one client, whose calls it makes from threads of its own. For one run."""

    def __init__(
        self,
        client: Client,
        once: Client,
        *,
        timeout_s: float,
        splitter: SplitterName | None = None,
        split_max_tokens: int | None = None,
        on_done: Callable[[str, int], None] = lambda name, num_tokens: None,
    ) -> None:
        """`client` asks, and `once`, which asks nothing again, where that came to nothing: to find what is to blame.

        `on_done` hears of every file once: its name, and its tokens where it was warmed. Never twice at a time."""
        self._client = client
        self._once = once
        self._splitter = splitter
        self._split_max_tokens = split_max_tokens
        self._on_done = on_done
        self._started_s = time.monotonic()
        self._deadline_s = self._started_s + timeout_s
        self._report = CorpusReport()
        self._lock = threading.Lock()
        self._num_failed_in_a_row = 0
        self._given_up = threading.Event()

    def run(self, paths: Sequence[Path], named: Collection[Path] = (), pattern: str = EVERYTHING) -> CorpusReport:
        """Warms them all. A file that fails is reported and the others go on, unless nothing works any more.

        Those that were not `named` were found in folders, by `pattern`: what is no text among them, and what is longer
        than the model's context, is left out.

        Few texts are in memory at a time. An interrupt ends the calls under way and closes the clients.
        """
        with ThreadPoolExecutor(REQUESTS_AT_ONCE) as threads:
            try:
                self._send(threads, self._read(paths, frozenset(named), pattern))
            except BaseException:
                self._given_up.set()
                self._client.close()
                self._once.close()
                raise
        report = self._report
        report.warmed.sort(key=lambda document: document.index)
        num_told = len(report.warmed) + len(report.failures) + len(report.empty) + len(report.left_out)
        report.num_untried = len(paths) - num_told
        report.elapsed_s = time.monotonic() - self._started_s
        return report

    def _send(self, threads: ThreadPoolExecutor, items: Iterable[Item]) -> None:
        under_way: set[Future[None]] = set()
        for batch in _batches(items):
            under_way.add(threads.submit(self._warm, batch))
            if len(under_way) > REQUESTS_AT_ONCE:  # the next is read while they run
                done, under_way = wait(under_way, return_when=FIRST_COMPLETED)
                _raise_any(done)
        _raise_any(wait(under_way).done)

    def _read(self, paths: Sequence[Path], named: Collection[Path], pattern: str) -> Iterator[Item]:
        for index, path in enumerate(paths):
            if self._given_up.is_set():
                return
            try:
                text = read_document(path) if path in named else read_found(path, pattern)
            except NoText as error:
                self._leave_out(str(path), error)
                continue
            except InvalidRequest as error:
                self._failed(str(path), error)
                continue
            if text:
                yield Item(index, Document(text, name=str(path)), is_named=path in named)
            else:
                with self._lock:
                    self._report.empty.append(str(path))
                    self._on_done(str(path), 0)

    def _warm(self, items: Sequence[Item], num_pauses: int = 0, *, once: bool = False) -> None:
        """One request; where it fails, those that are left in two of half the size, until one is to blame."""
        if self._given_up.is_set():
            return
        done: set[int] = set()

        def take(warmed: WarmedDocument) -> None:
            done.add(warmed.index)
            self._done(replace(warmed, index=items[warmed.index].index))

        try:
            (self._once if once else self._client).warm(
                [item.document for item in items],
                splitter=self._splitter,
                split_max_tokens=self._split_max_tokens,
                on_progress=take,
                timeout_s=max(0.001, self._deadline_s - time.monotonic()),
            )
        except SpoliaError as error:
            left = [item for nth, item in enumerate(items) if nth not in done]
            if not left:
                return
            if isinstance(error, Busy) and num_pauses < MAX_BUSY_PAUSES:
                self._given_up.wait((error.retry_after_ms or 500) / 1e3)
                self._warm(left, num_pauses + 1, once=once)
            elif isinstance(error, Unavailable) and done and not once:
                self._warm(left)  # a node went away in the midst of it
            elif len(items) == 1 and not items[0].is_named and _is_too_long(error):
                self._leave_out(items[0].document.name, error)
            elif len(items) == 1:
                self._failed(items[0].document.name, error)
            else:
                middle = (len(left) + 1) // 2
                for half in (left[:middle], left[middle:]):
                    if half:
                        self._warm(half, once=once or isinstance(error, Unavailable))

    def _done(self, warmed: WarmedDocument) -> None:
        with self._lock:
            self._report.warmed.append(warmed)
            self._num_failed_in_a_row = 0
            self._on_done(warmed.name, warmed.num_tokens)

    def _leave_out(self, name: str, error: InvalidRequest) -> None:
        with self._lock:
            self._report.left_out.append(Failure(name, error))
            self._on_done(name, 0)

    def _failed(self, name: str, error: SpoliaError) -> None:
        with self._lock:
            if self._given_up.is_set():
                return  # what a run that is over did to its last calls says nothing of their documents
            self._report.failures.append(Failure(name, error))
            if not isinstance(error, InvalidRequest):
                self._num_failed_in_a_row += 1
            # Out of time, or asked for in a way that no document can be.
            over = isinstance(error, DeadlineExceeded | Cancelled) or error.field.startswith("splitting.")
            if over or self._num_failed_in_a_row == MAX_FAILURES_IN_A_ROW:
                self._given_up.set()
            self._on_done(name, 0)


def _is_too_long(error: SpoliaError) -> TypeGuard[InvalidRequest]:
    """Whether the one document of a request is more than the gateway or the model's context takes, cut or not."""
    is_the_document = error.field in ("documents", "documents[0].text")
    return isinstance(error, InvalidRequest) and is_the_document and error.limit.endswith((" tokens", " bytes"))


def _batches(items: Iterable[Item]) -> Iterator[list[Item]]:
    batch: list[Item] = []
    size = 0
    for item in items:
        num_bytes = len(item.document.text.encode())
        if batch and (len(batch) == REQUEST_DOCUMENTS or size + num_bytes > REQUEST_BYTES):
            yield batch
            batch, size = [], 0
        batch.append(item)
        size += num_bytes
    if batch:
        yield batch


def _raise_any(done: Iterable[Future[None]]) -> None:
    for future in done:
        future.result()
