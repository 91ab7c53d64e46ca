"""Time to first token, a row per source of KV, all of one run and by turns.

Each round: fresh documents, asked EXACT (unseen), EXACT again, LINKED (unknown), and then LINKED in a new order behind
another document each time, from the linking node, from the store's memory, and from its disk. Rates of the floor are
measured in each round, right behind the answers from the linking node, and what gRPC alone takes for the bytes right
behind those from the store's memory; transformers' own prefill of the same prompt between the rounds.
"""

from __future__ import annotations

import asyncio
import random
import statistics
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from itertools import count
from pathlib import Path

from spolia import Result
from spolia_bench.frame import Report, Sample, Table, progress
from spolia_bench.model_shape import ModelShape
from spolia_bench.reuse.machine import Machine, linked_pass
from spolia_bench.reuse.operators import Pass
from spolia_bench.reuse.options import Options
from spolia_bench.reuse.prompts import Asked, fresh
from spolia_bench.reuse.rates import CAREFUL, CARELESS
from spolia_bench.reuse.residency import Residency
from spolia_bench.reuse.system import System, running
from spolia_bench.reuse.transformers_prefill import TransformersPrefill
from spolia_bench.reuse.ways import (
    FULL,
    LINKED,
    LINKED_COLD,
    LINKED_DISK,
    LINKED_REMOTE,
    PREFIX,
    WAYS,
    KvSource,
    Way,
    WrongPath,
    check,
)
from spolia_bench.store import grpc_floor

ANSWER_TOKENS = 2
MAX_DISK_TRIES = 3
RESIDENT_PER_ROUND = 3
"""Orders asked per round of what is cheap to ask and quoted first."""
OBJECT_OVERHEAD_BYTES = 1 << 16
WIRE_REPEATS = 3
"""Times a round that the bytes of its documents are moved by gRPC alone; the best counts."""
HEADER = ("way", "KV from", "TTFT ms: median (min … max)", "computed", "link", "reused", "MB moved", "full ÷ this")


def measure(report: Report, model: Path, options: Options) -> None:
    """The sections "ttft", "growth" and "transformers", as far as they are wanted: they share rounds and cluster."""
    machine = Machine(ModelShape.of(model), options.threads, CARELESS if options.quick else CAREFUL)
    # Memory of the store for the documents of a round and two uploads more.
    chunk_bytes = options.document_bytes * _kv_bytes(machine)
    budget = (options.documents + 2) * (chunk_bytes + OBJECT_OVERHEAD_BYTES)
    with tempfile.TemporaryDirectory(prefix="spolia-bench-") as folder:
        settings = ["--kvstore.data-dir", f"{folder}/kv", "--kvstore.write-behind-s", "0.2"]
        settings += ["--kvstore.budget-bytes", str(budget), "--pool-bytes", str(options.pool_bytes)]
        settings = [*_only_engines(settings), "--decode.publish", "false"]
        # Every way is taken, also where computing a small chunk would be faster than reading it.
        settings += ["--decode.cost-gate", "false", "--kvstore.cost-gate", "false"]
        with running(model, options.threads, settings) as system:
            rounds = Rounds(system, Residency(system, budget, chunk_bytes), machine, model, options)
            for number in range(options.rounds + 1):
                rounds.run(is_warmup=number == 0)
                progress(f"round {number} of {options.rounds}")
    rounds.report(report)


def _only_engines(settings: list[str]) -> list[str]:
    """`--pool-bytes` concerns nodes with an engine."""
    at = settings.index("--pool-bytes")
    size = settings[at + 1]
    return [*settings[:at], "--prefill.pool-bytes", size, "--decode.pool-bytes", size]


def _kv_bytes(machine: Machine) -> int:
    shape = machine.shape
    return 2 * shape.layers * shape.num_kv_heads * shape.head_dim * shape.item_bytes


class Rounds:
    """What was asked and answered, round by round."""

    def __init__(self, system: System, residency: Residency, machine: Machine, model: Path, options: Options) -> None:
        self._client = system.client
        self._residency = residency
        self._machine = machine
        self._options = options
        self._rng = random.Random(options.seed)
        self._results: dict[str, list[Result]] = {}
        self._over_floor: list[float] = []
        self._wire_ms: list[float] = []
        self._long: list[Result] = []
        self._num_long = 0
        self._transformers_ms: list[float] = []
        wanted = options.sections
        self._transformers = TransformersPrefill(model, options.threads) if "transformers" in wanted else None
        self._long_prompt = self._prompt(options.growth_documents) if "growth" in wanted else None

    def run(self, *, is_warmup: bool) -> None:
        """One round of everything; a warm-up is not kept."""
        asked = self._prompt(self._options.documents)
        results: list[tuple[Way, Result]] = []
        if {"ttft", "growth"} & set(self._options.sections):
            results = list(self._ask_all(asked, is_warmup=is_warmup))
        long = [self._ask_long(is_first=is_warmup)] if self._long_prompt is not None else []
        baseline = [self._baseline_ms(self._transformers, asked)] if self._transformers is not None else []
        if is_warmup:
            return
        for way, result in results:
            self._results.setdefault(way.name, []).append(result)
        self._long += long
        self._transformers_ms += baseline

    def report(self, report: Report) -> None:
        """Figures and table."""
        figures = report.figures
        if self._results:
            self._report_ways(report)
        if self._long:
            self._report_growth(report)
        if self._transformers_ms:
            baseline = Sample(tuple(self._transformers_ms))
            figures["ttft_transformers_ms"] = round(baseline.median_ms, 2)
            report.rows.append(("transformers' prefill, no server", "none", str(baseline), "all", "0", "0", "0", ""))

    def _ask_all(self, asked: Asked, *, is_warmup: bool) -> Iterable[tuple[Way, Result]]:
        yield FULL, self._ask(FULL, asked)
        yield PREFIX, self._ask(PREFIX, asked)
        orders = (asked.led_by(number, self._rng) for number in count(1))
        yield LINKED_COLD, self._ask(LINKED_COLD, next(orders))
        linked = [self._ask(LINKED, next(orders)) for _ in range(RESIDENT_PER_ROUND)]
        if not is_warmup:
            self._observe(linked)
        yield from ((LINKED, result) for result in linked)
        ids = self._residency.ids_of(asked.documents)
        self._residency.to_store(ids)
        remote = self._ask(LINKED_REMOTE, next(orders))
        if not is_warmup:
            self._wire_ms.append(self._wire_now(remote))
        yield LINKED_REMOTE, remote
        yield LINKED_DISK, self._ask_from_disk(ids, orders)
        self._residency.make_room()
        self._residency.forget_stored(ids)

    def _ask_from_disk(self, ids: Sequence[bytes], orders: Iterator[Asked]) -> Result:
        """An answer whose documents all came from disk.

        A store may take one that was read last back into its memory while others are put out: such a request is not
        this row's, and is asked again. Raises `WrongPath` when that happens every time.
        """
        for _ in range(MAX_DISK_TRIES - 1):
            self._residency.to_disk(ids)
            try:
                return self._ask(LINKED_DISK, next(orders))
            except WrongPath:
                self._residency.make_room()
        self._residency.to_disk(ids)
        return self._ask(LINKED_DISK, next(orders))

    def _observe(self, linked: list[Result]) -> None:
        """Measures rates beside the answers just given."""
        self._machine.observe(self._passes(linked[-1]))
        floor = self._machine.floor_now(self._link_pass(self._options.documents, linked[-1]))
        self._over_floor.append(Sample(tuple(result.ttft_ms for result in linked)).median_ms / floor.total_ms)

    def _wire_now(self, remote: Result) -> float:
        """What gRPC alone takes for the bytes of an answer, in as many streams at once."""
        num_bytes, num_streams = remote.reuse.bytes_moved, self._options.documents
        rate = asyncio.run(grpc_floor.get_rate(num_bytes // num_streams, num_streams, WIRE_REPEATS))
        return num_bytes / rate / 1e3

    def _ask_long(self, *, is_first: bool) -> Result:
        assert self._long_prompt is not None
        if is_first:
            self._ask(LINKED_COLD, self._long_prompt)
            self._residency.forget_stored(self._residency.ids_of(self._long_prompt.documents))
        self._num_long += 1
        return self._ask(LINKED, self._long_prompt.led_by(self._num_long, self._rng))

    def _ask(self, way: Way, asked: Asked) -> Result:
        result = self._generate(way, asked)
        check(way, result, len(asked.documents), self._options.document_bytes, _kv_bytes(self._machine))
        return result

    def _generate(self, way: Way, asked: Asked) -> Result:
        return self._client.generate(
            asked.parts, mode=way.mode, max_tokens=ANSWER_TOKENS, ignore_eos=True, seed=self._options.seed
        )

    def _prompt(self, num_documents: int) -> Asked:
        return fresh(num_documents, self._options.document_bytes, self._options.question_bytes, self._rng)

    def _baseline_ms(self, transformers: TransformersPrefill, asked: Asked) -> float:
        """Of the token ids that the gateway makes: the begin-of-sequence token, then each part on its own."""
        texts = [*(document.text for document in asked.documents), asked.question]
        tokens = [token for text in texts for token in self._client.tokenize(text)]
        return transformers.ttft_ms([transformers.bos_token_id, *tokens])

    def _passes(self, linked: Result) -> list[Pass]:
        numbers = [self._options.documents]
        if self._long_prompt is not None:
            numbers.append(self._options.growth_documents)
        return [self._link_pass(number, linked) for number in numbers]

    def _link_pass(self, num_documents: int, linked: Result) -> Pass:
        options = self._options
        num_link_tokens = linked.reuse.link_tokens_per_chunk
        return linked_pass(num_documents, options.document_bytes, options.question_bytes, num_link_tokens)

    def _report_ways(self, report: Report) -> None:
        ttft = {name: Sample(tuple(r.ttft_ms for r in results)) for name, results in self._results.items()}
        full = ttft["full"].median_ms
        report.header = HEADER
        for way in WAYS:
            last = self._results[way.name][-1]
            report.rows.append(_row(way, ttft[way.name], last, full))
            report.figures[f"ttft_{way.name}_ms"] = round(ttft[way.name].median_ms, 2)
            if way is not FULL:
                report.figures[f"ratio_full_over_{way.name}"] = round(full / ttft[way.name].median_ms, 2)
        report.figures["kv_source"] = {way.name: way.kv_source.value for way in WAYS}
        report.figures["num_prompt_tokens"] = self._results["full"][-1].num_prompt_tokens
        work = self._link_pass(self._options.documents, self._results["linked"][-1])
        floor = self._machine.floor(work)
        report.figures |= {
            "floor_ms": round(floor.total_ms, 2),
            "floor_matmul_ms": round(floor.matmul_ms, 2),
            "floor_attention_ms": round(floor.attention_ms, 2),
            "floor_other_ms": round(floor.other_ms, 2),
            "floor_stream_gb_per_s": round(self._machine.stream_gb_per_s, 1),
            "floor_matmul_gflops": round(self._machine.matmul_gflops(work), 1),
            "floor_is_sound": floor.total_ms < min(ttft["linked"].values_ms),
            "ttft_over_floor": round(statistics.median(self._over_floor), 3),
            "ttft_over_best_floor": round(ttft["linked"].median_ms / floor.total_ms, 3),
        }
        self._report_wire(report, ttft["linked"], ttft["linked_remote"])
        if not report.figures["floor_is_sound"]:
            progress("an answer came faster than the floor: rates were measured on a busy machine; the floor is void")
            report.figures |= {"ttft_over_floor": None, "ttft_over_best_floor": None}

    def _report_wire(self, report: Report, linked: Sample, remote: Sample) -> None:
        """Beside what the store's memory costs: what moving the bytes alone does."""
        wire = Sample(tuple(self._wire_ms))
        num_bytes = self._results["linked_remote"][-1].reuse.bytes_moved
        report.figures |= {
            "floor_wire_ms": round(wire.median_ms, 2),
            "floor_wire_mb_per_s": round(num_bytes / wire.median_ms / 1e3, 1),
            "linked_remote_over_linked_and_wire": round(remote.median_ms / (linked.median_ms + wire.median_ms), 3),
        }
        table = Table(("MB from the store's memory", "gRPC alone ms", "linked + that ms", "linked, remote ms"))
        both = f"{linked.median_ms + wire.median_ms:.0f}"
        table.rows.append((f"{num_bytes / 1e6:.0f}", str(wire), both, str(remote)))
        report.tables.append(table)

    def _report_growth(self, report: Report) -> None:
        options, linked = self._options, self._results["linked"]
        table = Table(("documents", "TTFT ms, resident", "floor ms", "products ms", "attention ms", "TTFT ÷ floor"))
        for number, results in ((options.documents, linked), (options.growth_documents, self._long)):
            sample = Sample(tuple(r.ttft_ms for r in results))
            floor = self._machine.floor(self._link_pass(number, linked[-1]))
            table.rows.append(
                (
                    str(number),
                    str(sample),
                    *(f"{ms:.0f}" for ms in (floor.total_ms, floor.matmul_ms, floor.attention_ms)),
                    f"{sample.median_ms / floor.total_ms:.2f}",
                )
            )
            report.figures |= {
                f"growth_{number}_ttft_ms": round(sample.median_ms, 2),
                f"growth_{number}_floor_ms": round(floor.total_ms, 2),
                f"growth_{number}_floor_matmul_ms": round(floor.matmul_ms, 2),
                f"growth_{number}_floor_attention_ms": round(floor.attention_ms, 2),
            }
        few, many = options.documents, options.growth_documents
        name = f"growth_{few}_to_{many}"
        figures = report.figures
        figures[name] = round(figures[f"growth_{many}_ttft_ms"] / figures[f"growth_{few}_ttft_ms"], 3)
        figures[f"{name}_of_floor"] = round(figures[f"growth_{many}_floor_ms"] / figures[f"growth_{few}_floor_ms"], 3)
        report.tables.append(table)


def _row(way: Way, ttft: Sample, last: Result, full_ms: float) -> tuple[str, ...]:
    reuse = last.reuse
    num_reused = 0 if way.kv_source is KvSource.COMPILED else reuse.num_reused_tokens
    return (
        way.name.replace("_", ", "),
        way.kv_source.value,
        str(ttft),
        str(last.num_prompt_tokens - num_reused - reuse.num_link_tokens),
        str(reuse.num_link_tokens),
        str(num_reused),
        f"{reuse.bytes_moved / 1e6:.0f}",
        f"{full_ms / ttft.median_ms:.1f}",
    )
