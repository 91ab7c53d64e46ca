"""The link pass of a request: here over chunks as they come, or on a prefill node, whose rows come while chunks do."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass

from spolia.v1.directory_pb2 import NodeRecord
from spolia.v1.prefill_pb2 import LinkWork, TokenRange
from spolia_core.errors import SpoliaError
from spolia_core.prompt import Prompt
from spolia_core.reuse import ReuseReport
from spolia_decode.chunk_gatherer import ChunkGatherer
from spolia_decode.held_runs import HeldRuns
from spolia_decode.job import GenerateJob
from spolia_decode.link_place import LinkTask, Placed, place_link
from spolia_decode.local_chunks import LocalChunks, chunk_id_of
from spolia_decode.node_parts import NodeParts
from spolia_decode.prefill_client import HandedOff
from spolia_decode.prepared_context import PreparedContext
from spolia_engine.extent import Extent
from spolia_engine.kv_bytes import write_layer
from spolia_engine.link_plan import LinkPlan
from spolia_engine.run import Run
from spolia_node.deadline import Deadline
from spolia_node.logs import get_log
from spolia_node.rpc_messages import prompt_to_pb
from spolia_node.tracing import span
from spolia_worker.arriving import ChunkLost
from spolia_worker.engine_job import WorkKind

log = get_log(__name__)


@dataclass(frozen=True, slots=True)
class ToLink:
    """One request's context: what it holds, and the plan of what is computed."""

    job: GenerateJob
    prompt: Prompt
    plan: LinkPlan
    held: HeldRuns
    report: ReuseReport
    deadline: Deadline


class LinkPasses:
    """Runs link passes where they cost least."""

    def __init__(self, parts: NodeParts) -> None:
        self._parts = parts
        self._core = parts.core
        self._gatherer = ChunkGatherer(parts)

    async def run(self, work: ToLink, chunks: LocalChunks) -> PreparedContext:
        """A context of the work and the token after it. Raises `Busy` or `DeadlineExceeded`."""
        placed = self._place(work, chunks)
        started = time.monotonic()
        if placed.node is not None:
            prepared = await self._run_there(work, chunks, placed.node)
            if prepared is not None:
                self._parts.link_metrics.linked(placed.place, placed.predicted_s, time.monotonic() - started)
                return prepared
            placed = placed.here()
        prepared = await self._run_here(work, chunks)
        self._parts.link_metrics.linked(placed.place, placed.predicted_s, prepared.compute_s)
        return prepared

    def _place(self, work: ToLink, chunks: LocalChunks) -> Placed:
        per_token = self._core.adapter.kv_shape.bytes_per_token
        task = LinkTask(
            num_rows=len(work.plan.positions),
            num_context_tokens=work.prompt.num_tokens,
            chunk_bytes={i: len(part.token_ids) * per_token for i, part in chunks.wanted.items()},
            row_bytes=len(work.plan.positions) * per_token,
        )
        # Linked chunks that are held here are not there: a prompt that goes on from them is linked where they are.
        is_portable = self._parts.config.link_on_prefill and work.plan.num_held_rows == 0
        return place_link(
            task,
            self._parts.prefill_nodes.candidates(work.job.prefill_hints) if is_portable else [],
            self._parts.costs,
            num_decoding=self._parts.num_decoding(),
            min_rows=self._parts.config.local_prefill_tokens,
        )

    # Here

    async def _run_here(self, work: ToLink, chunks: LocalChunks) -> PreparedContext:
        """Begun anew where a chunk that the pass read was lost on its way."""
        while True:
            await self._gatherer.gather(chunks, work.job, work.report, work.deadline)
            try:
                prepared = await self._compute(work, chunks)
            except ChunkLost:
                await chunks.settle()
                chunks.drop_lost()
                continue
            try:
                await chunks.settle()
            except BaseException:
                prepared.context.close()
                raise
            if chunks.is_whole:
                return prepared
            prepared.context.close()  # the last that came of a chunk said that it is not what it was taken for
            chunks.drop_lost()

    async def _compute(self, work: ToLink, chunks: LocalChunks) -> PreparedContext:
        """One try. The pass has references of its own, so that another try finds everything here."""
        runs = self._retained(work, chunks)
        options = self._parts.pass_options(chunks.ready())
        steps = self._core.linked_context_steps(work.prompt, runs, work.plan, work.held.runs, options)
        taken = [*runs.values(), *work.held.runs]
        return await self._parts.compute(work.job, steps, taken, len(work.plan.positions), work.deadline, WorkKind.LINK)

    def _retained(self, work: ToLink, chunks: LocalChunks) -> dict[int, Run]:
        """Part index to run; a reference is added to each, and to each that is held."""
        runs = _run_of_part(work.prompt, work.plan, chunks.runs)
        for run in (*runs.values(), *work.held.runs):
            self._core.pool.retain(run.extent)
        return runs

    # On a prefill node

    async def _run_there(self, work: ToLink, chunks: LocalChunks, node: NodeRecord) -> PreparedContext | None:
        """The rows come from the node while the chunks, without which nothing can be decoded, come here.

        None when the node could not: its failure is never the request's.
        """
        num_rows = len(work.plan.positions)
        live = self._core.pool.allocate(num_rows, in_transfer=True)
        handing = asyncio.ensure_future(self._hand_over(work, node, live))
        try:
            await self._gather_all(work, chunks, handing)
            handed_off = await handing
        except BaseException:
            handing.cancel()
            try:
                await asyncio.gather(handing, return_exceptions=True)
            finally:
                self._core.pool.release(live)
            raise
        if handed_off is None:
            self._core.pool.release(live)
            return None
        self._core.pool.arrive(live)
        work.report.live_bytes += handed_off.num_bytes
        if node.node_id not in work.report.nodes:
            work.report.nodes.append(node.node_id)
        rows = Run(live, 0, num_rows, work.plan.positions[0])
        runs = self._retained(work, chunks)
        hidden = self._core.adapter.hidden_from_bytes(handed_off.last_hidden)
        context = self._core.arrived_linked_context(work.plan, runs, work.held.runs, rows, hidden)
        return PreparedContext(context, None, handed_off.compute_s, handed_off.seconds_per_token)

    async def _gather_all(self, work: ToLink, chunks: LocalChunks, handing: asyncio.Future[HandedOff | None]) -> None:
        """Returns when every chunk is here whole; earlier where the node has given up, and this one is to compute."""
        while True:
            await self._gatherer.gather(chunks, work.job, work.report, work.deadline)
            if handing.done() and handing.result() is None:
                return
            await chunks.settle()
            chunks.drop_lost()
            if not chunks.missing:
                return

    async def _hand_over(self, work: ToLink, node: NodeRecord, live: Extent) -> HandedOff | None:
        """Has a node compute the rows into `live`; None when it could not."""
        started = time.monotonic()
        share = work.deadline.share(self._parts.config.prefill_share)
        given_s = share.remaining()
        try:
            with span("transfer", node=node.node_id, num_tokens=len(work.plan.positions)) as transferring:
                handed_off = await self._parts.prefill.link(
                    node.address,
                    self._parts.start_message(work.job),
                    _message(work),
                    self._core.adapter.kv_shape,
                    lambda first, count, layer, key, value: write_layer(live, first, layer, count, key, value),
                    share,
                )
                transferring.set(num_bytes=handed_off.num_bytes)
            self._core.adapter.hidden_from_bytes(handed_off.last_hidden)  # one that is none is the node's failure
        except SpoliaError as error:
            self._parts.prefill_nodes.failed(node, error, given_s)
            return None
        moving_s = time.monotonic() - started - handed_off.compute_s
        self._parts.costs.handed_over(handed_off.num_bytes, max(1e-4, moving_s))
        return handed_off


def _run_of_part(prompt: Prompt, plan: LinkPlan, runs: Mapping[bytes, Run]) -> dict[int, Run]:
    """Part index to run."""
    indices = dict.fromkeys(f.part_index for f in plan.fragments)
    return {index: runs[chunk_id_of(prompt.parts[index])] for index in indices}


def _message(work: ToLink) -> LinkWork:
    """The rows, and all that they are computed from."""
    plan = work.plan
    assert plan.num_held_rows == 0, "rows that are held here are not linked elsewhere"
    return LinkWork(
        parts=prompt_to_pb(work.prompt),
        rows=[TokenRange(position=position, num_tokens=length) for _, position, length in plan.pieces()],
        num_prefix_tokens=plan.num_prefix_tokens,
    )
