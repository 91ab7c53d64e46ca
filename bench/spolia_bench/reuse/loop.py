"""A closed loop: clients that ask again as soon as they have their answer, LINKED against exact prefixes only.

Both modes get a cluster of their own with the same settings, the same pool of documents and, client by client, the same
choices. Before the loop each gets what its steady state has: LINKED every document on the linking node; EXACT every
document as the first of a prompt, the prefix that is found most often. The window opens when every client has had an
answer, and counts what completes inside it. A client that is told to come back does so, its time to first token running
on. A quick run, which says nothing of how fast they are, has one cluster for both.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from spolia import AsyncClient, Client, Document, Result, ReuseMode
from spolia.errors import Busy
from spolia_bench.frame import Report, Sample, Table, progress
from spolia_bench.reuse.options import Options
from spolia_bench.reuse.system import TIMEOUT_S, System, running
from spolia_bench.reuse.zipf import choices
from spolia_bench.texts import text_of

DEFAULT_RETRY_MS = 500
HEADER = ("mode", "requests/s", "completed", "TTFT ms p50", "TTFT ms p99", "reused of prompt")


@dataclass(frozen=True, slots=True)
class Answered:
    """An answer, and the time to its first token from when it was first asked for."""

    result: Result
    ttft_ms: float


@dataclass(slots=True)
class Window:
    """Answers that completed between `opened_s` and `closed_s`; open once `num_clients` clients have had one."""

    num_clients: int
    length_s: float
    opened_s: float | None = None
    answers: list[Answered] = field(default_factory=list)
    num_busy: int = 0
    """Times a client was told to come back, before the window too."""
    _served: set[int] = field(default_factory=set)
    is_open: asyncio.Event = field(default_factory=asyncio.Event)

    def add(self, client: int, answered: Answered, now_s: float) -> None:
        """Takes an answer that just completed."""
        if self.opened_s is None:
            self._served.add(client)
            if len(self._served) == self.num_clients:
                self.opened_s = now_s
                self.is_open.set()
        elif now_s <= self.opened_s + self.length_s:
            self.answers.append(answered)

    @property
    def requests_per_s(self) -> float:
        """Completed in the window over its length."""
        return len(self.answers) / self.length_s

    @property
    def ttft(self) -> Sample:
        """Of what completed in it."""
        return Sample(tuple(answered.ttft_ms for answered in self.answers))

    @property
    def reused_share(self) -> float:
        """Prompt tokens reused, of all."""
        results = [answered.result for answered in self.answers]
        return sum(r.reuse.num_reused_tokens for r in results) / sum(r.num_prompt_tokens for r in results)


def measure(report: Report, model: Path, options: Options) -> None:
    """The section "loop"."""
    rng = random.Random(f"pool-{options.seed}")
    pool = [Document(text_of(options.document_bytes, rng)) for _ in range(options.pool_documents)]
    table = Table(HEADER)
    windows: dict[ReuseMode, Window] = {}
    size = str(options.pool_bytes)
    settings = ["--prefill.pool-bytes", size, "--decode.pool-bytes", size, "--kvstore.budget-bytes", size]
    for modes in _by_cluster(options):
        with running(model, options.threads, settings) as system:
            for mode, length_s in modes:
                windows[mode] = _window(system, pool, mode, length_s, options)
    for mode, window in windows.items():
        table.rows.append(_row(mode, window))
        name = "linked" if mode is ReuseMode.LINKED else "prefix"
        report.figures |= {
            f"loop_{name}_requests_per_s": round(window.requests_per_s, 4),
            f"loop_{name}_completed": len(window.answers),
            f"loop_{name}_window_s": window.length_s,
            f"loop_{name}_told_to_come_back": window.num_busy,
            f"loop_{name}_ttft_p50_ms": round(window.ttft.percentile_ms(0.5), 1),
            f"loop_{name}_ttft_p99_ms": round(window.ttft.percentile_ms(0.99), 1),
            f"loop_{name}_reused_share": round(window.reused_share, 4),
        }
    ratio = windows[ReuseMode.LINKED].requests_per_s / windows[ReuseMode.EXACT].requests_per_s
    report.figures["throughput_ratio_vs_prefix"] = round(ratio, 2)
    report.tables.append(table)


def _by_cluster(options: Options) -> list[list[tuple[ReuseMode, float]]]:
    """The modes that each cluster is asked in, one after another, and for how long."""
    linked, exact = (ReuseMode.LINKED, options.loop_s), (ReuseMode.EXACT, options.prefix_loop_s)
    return [[linked, exact]] if options.quick else [[linked], [exact]]


def _window(system: System, pool: Sequence[Document], mode: ReuseMode, length_s: float, options: Options) -> Window:
    progress(f"loop, {mode.name}: bringing {len(pool)} documents in")
    _bring_in(system.client, pool, mode, options)
    progress(f"loop, {mode.name}: {options.clients} clients, {length_s:g} s")
    window = asyncio.run(_run(system.cluster.address, pool, mode, length_s, options))
    if not window.answers:
        raise RuntimeError(f"no {mode.name} request completed in {length_s:g} s: choose a longer window")
    return window


def _bring_in(client: Client, pool: Sequence[Document], mode: ReuseMode, options: Options) -> None:
    """Every document once: LINKED in prompts of several, EXACT each at the head of a prompt."""
    size = options.documents if mode is ReuseMode.LINKED else 1
    for start in range(0, len(pool), size):
        client.generate([*pool[start : start + size], "?"], mode=mode, max_tokens=1, ignore_eos=True)


async def _run(address: str, pool: Sequence[Document], mode: ReuseMode, length_s: float, options: Options) -> Window:
    window = Window(options.clients, length_s)
    async with AsyncClient(address, timeout_s=TIMEOUT_S) as client:
        tasks = [
            asyncio.create_task(_ask_on(client, number, _prompts(number, pool, options), mode, window, options))
            for number in range(options.clients)
        ]
        opened = asyncio.create_task(window.is_open.wait())
        try:
            await asyncio.wait([opened, *tasks], return_when=asyncio.FIRST_COMPLETED)
            if window.is_open.is_set():
                await asyncio.wait(tasks, timeout=length_s, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (opened, *tasks):
                task.cancel()
            ended = await asyncio.gather(*tasks, return_exceptions=True)
    for error in ended:
        if isinstance(error, Exception):
            raise error
    return window


async def _ask_on(
    client: AsyncClient,
    number: int,
    prompts: Iterator[list[Document | str]],
    mode: ReuseMode,
    window: Window,
    options: Options,
) -> None:
    for parts in prompts:
        asked_s = time.monotonic()
        while True:
            sent_s = time.monotonic()
            try:
                result = await client.generate(
                    parts, mode=mode, max_tokens=options.new_tokens, ignore_eos=True, seed=options.seed
                )
            except Busy as error:
                window.num_busy += 1
                await asyncio.sleep((error.retry_after_ms or DEFAULT_RETRY_MS) / 1e3)
            else:
                break
        if result.reuse.mode is not mode:
            raise RuntimeError(f"asked {mode.name}, answered {result.reuse.mode.name}")
        window.add(number, Answered(result, (sent_s - asked_s) * 1e3 + result.ttft_ms), time.monotonic())


def _prompts(number: int, pool: Sequence[Document], options: Options) -> Iterator[list[Document | str]]:
    """What a client asks, request by request."""
    seed = f"client-{options.seed}-{number}"
    rng = random.Random(f"question-{seed}")
    for chosen in choices(len(pool), options.zipf_exponent, options.documents, seed):
        yield [*(pool[index] for index in chosen), text_of(options.question_bytes, rng)]


def _row(mode: ReuseMode, window: Window) -> tuple[str, ...]:
    return (
        mode.name,
        f"{window.requests_per_s:.3f}",
        f"{len(window.answers)} in {window.length_s:g} s",
        f"{window.ttft.percentile_ms(0.5):.0f}",
        f"{window.ttft.percentile_ms(0.99):.0f}",
        f"{window.reused_share:.1%}",
    )
