"""A node's operations on a model and its KV: compile chunks, build contexts, decode.

What schedules them is elsewhere: `spolia_worker` and the services, or `Engine` (engine.py), which adds prompts answered
in one process.

One thread at a time may compute; pool and residents are safe to use from others, and so are `adopt` and
`acquire_prefix`.

Ownership: a run handed out or taken in carries one reference on its extent, except where a function says otherwise.
Functions that build a context take the references of the runs they are given, also when they raise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from spolia_core.chunk_object import ChunkMeta
from spolia_core.errors import NotSupported
from spolia_core.ids import IdSpace, Recipe
from spolia_core.prompt import Prompt
from spolia_core.reuse import DEFAULT_LINK_TOKENS, ChunkKind
from spolia_core.sampling import SamplingParams
from spolia_engine.adapter import ModelAdapter
from spolia_engine.context import Context, release_runs, whole
from spolia_engine.decode_steps import DecodeSteps, PlannedBatch
from spolia_engine.deviation import most_deviant
from spolia_engine.device_decoding import DeviceDecoding, DeviceSettings, DrawnRow
from spolia_engine.drawing import accept_row, draw, drawn_rows
from spolia_engine.extent import Extent
from spolia_engine.fork import DEFAULT_MAX_FORK_ROWS, Forks, fork
from spolia_engine.generation import Delta, Generation
from spolia_engine.grammar import Grammar, Grammars
from spolia_engine.link_plan import LinkPlan, check_runs, plan_link
from spolia_engine.linked_blocks import LinkedBlock, register_linked
from spolia_engine.passes import AT_ONCE, OnLayer, PassOptions, run_rows
from spolia_engine.pool import DEFAULT_BLOCK_SIZE, TORCH_DTYPE, Pool
from spolia_engine.resident import ResidentChunks
from spolia_engine.run import Run, Span, copy_kv
from spolia_engine.sampler import sample
from spolia_engine.sealing import SealedBlock, register_prefix, seal_answer
from spolia_engine.sequence import Sequence as DecodeSequence
from spolia_engine.sequence import close_all
from spolia_engine.sharing import Sharing, always_shared, never_shared
from spolia_engine.sharing_table import AttentionShape
from spolia_engine.sinks import sink_token_ids
from spolia_engine.slot_memory import SlotMemory
from spolia_engine.steps import Came, Slice, Steps, finish
from spolia_engine.text import Decode

__all__ = ["EngineCore", "OnLayer", "PassOptions"]


class EngineCore:
    """A model, a pool, and the operations on them. Nodes hold an `Engine`, and call what is here."""

    def __init__(
        self,
        adapter: ModelAdapter,
        decode: Decode,
        *,
        num_blocks: int,
        block_size: int = DEFAULT_BLOCK_SIZE,
        num_sink_tokens: int = 0,
        grammars: Grammars | None = None,
        device: DeviceSettings | None = None,
    ) -> None:
        """`num_sink_tokens` dummy sinks before every local chunk are part of the recipe, and so of every id. Without
        `grammars` no request may have a constraint. `device`: decode as a GPU does, out of one piece of memory that is
        taken now; None: so on a CUDA device, with the defaults, and not elsewhere.

        Raises `NotSupported` for sinks of a model without a begin-of-sequence token, or a model that the device's
        kernels do not have; `InvalidRequest` for too many sinks, or blocks that are no pages.
        """
        self._sinks = sink_token_ids(adapter, num_sink_tokens)
        self.adapter = adapter
        if device is None and adapter.device.type == "cuda":
            device = DeviceSettings()
        slots = None
        if device is not None:
            dtype = TORCH_DTYPE[adapter.kv_shape.dtype]
            slots = SlotMemory(
                adapter.kv_shape, num_pages=num_blocks, page_size=block_size, dtype=dtype, device=adapter.device
            )
        self.pool = Pool(
            adapter.kv_shape, num_blocks=num_blocks, block_size=block_size, device=adapter.device, slots=slots
        )
        self.device = None if device is None or slots is None else DeviceDecoding(adapter, slots, device)
        """What decodes on a GPU; None on a CPU, where `plan_batch` and `run_step` do."""
        self.resident = ResidentChunks(self.pool)
        self.recipe = Recipe(adapter.compute_dtype, num_sink_tokens)
        self._decode = decode
        self._grammars = grammars
        self.sharing: Sharing = always_shared
        self.deterministic = False
        """Each sequence takes its steps alone: what it says then does not depend on who decodes beside it, to the bit.

        Costs the batch: the weights are read once a sequence, and nothing is attended together.
        """
        self._steps = DecodeSteps(adapter)

    def id_space(self, tenant_key: bytes) -> IdSpace:
        """The ids of a tenant's chunks under this engine's model and recipe."""
        return IdSpace(tenant_key, self.adapter.fingerprint, self.recipe)

    @property
    def attention_shape(self) -> AttentionShape:
        """What decides whether rows of this model attend together (`sharing_table`)."""
        shape, page_size = self.adapter.kv_shape, None if self.device is None else self.pool.block_size
        return AttentionShape(
            self.adapter.num_q_heads, shape.num_kv_heads, shape.head_dim, self.adapter.compute_dtype, page_size
        )

    def meta(self, chunk_id: bytes, kind: ChunkKind, run: Run) -> ChunkMeta:
        """Metadata of the chunk object a run would make."""
        return ChunkMeta(
            chunk_id, kind, self.adapter.fingerprint, run.num_tokens, self.adapter.kv_shape, rope_base=run.rope_base
        )

    # Chunks

    def compile(self, chunk_id: bytes, token_ids: Sequence[int]) -> Run:
        """`compile_steps`, at once."""
        return finish(self.compile_steps(chunk_id, token_ids))

    def compile_steps(self, chunk_id: bytes, token_ids: Sequence[int], options: PassOptions = AT_ONCE) -> Steps[Run]:
        """Computes a local chunk alone at positions 0, 1, 2, … and registers it. Source: EPIC §4, KVCompile.

        The recipe's sinks stand before it, at positions -s … -1, and are dropped. Where another thread registered the
        chunk meanwhile, the run is a second copy, which goes with its last reader. Raises `Busy` when the pool has no
        room.
        """
        positions = range(-len(self._sinks), len(token_ids))
        ran = yield from run_rows(
            self.adapter,
            self.pool,
            [*self._sinks, *token_ids],
            positions,
            [],
            options,
            num_dropped=len(self._sinks),
        )
        self.resident.register(chunk_id, ChunkKind.LOCAL, ran.run)
        return ran.run

    def adopt(
        self, extent: Extent, start: int, num_tokens: int, *, rope_base: int, chunk_id: bytes, kind: ChunkKind
    ) -> Run:
        """Registers KV that arrived in an extent. The run shares the caller's reference."""
        run = Run(extent, start, num_tokens, rope_base)
        self.resident.register(chunk_id, kind, run)
        return run

    def acquire_prefix(self, chain: Sequence[bytes]) -> list[Run]:
        """The longest resident beginning of a chain of prefix or linked chunk ids, one reference for each run."""
        runs: list[Run] = []
        for chunk_id in chain:
            run = self.resident.acquire(chunk_id)
            if run is None:
                break
            runs.append(run)
        return runs

    # Contexts

    def exact_context(self, token_ids: Sequence[int], prefix: Sequence[Run]) -> Context:
        """`exact_context_steps`, at once."""
        return finish(self.exact_context_steps(token_ids, prefix))

    def exact_context_steps(
        self, token_ids: Sequence[int], prefix: Sequence[Run], options: PassOptions = AT_ONCE
    ) -> Steps[Context]:
        """Prefills the tokens behind `prefix` (runs from position 0, without gap). Takes the runs' references, once it
        has begun.

        At least one token must be left to compute. Raises `Busy` when the pool has no room.
        """
        num_cached = sum(run.num_tokens for run in prefix)
        spans = [whole(run) for run in prefix]
        try:
            positions = range(num_cached, len(token_ids))
            visible = [(span, 0) for span in spans]
            ran = yield from run_rows(self.adapter, self.pool, token_ids[num_cached:], positions, visible, options)
        except BaseException:
            release_runs(self.pool, prefix)
            raise
        extents = [run.extent for run in (*prefix, ran.run)]
        spans.append(whole(ran.run))
        return Context(self.pool, spans, extents, ran.last_hidden, ran.run.num_tokens, live=ran.run)

    def linked_context(
        self, prompt: Prompt, runs: Mapping[int, Run], plan: LinkPlan | None = None, held: Sequence[Run] = ()
    ) -> Context:
        """`linked_context_steps`, at once."""
        return finish(self.linked_context_steps(prompt, runs, plan, held))

    def linked_context_steps(
        self,
        prompt: Prompt,
        runs: Mapping[int, Run],
        plan: LinkPlan | None = None,
        held: Sequence[Run] = (),
        options: PassOptions = AT_ONCE,
    ) -> Steps[Context]:
        """The link pass: recomputes the plan's rows over what is reused, in one forward pass.

        `runs` maps part index to the chunk's run, for every part that has a fragment in `plan` (default: leading
        `DEFAULT_LINK_TOKENS`). `held` are runs of KV at their absolute positions: the plan's exact prefix, and the
        linked chunks of the rows it leaves out. Takes the references of all of them, once it has begun. Nothing of what
        is reused is copied. Raises `InvalidRequest` when a run is not as long as its part, `Busy` when the pool has no
        room.
        """
        try:
            plan = plan or plan_link(prompt, DEFAULT_LINK_TOKENS, num_sink_tokens=self.recipe.num_sink_tokens)
            check_runs(prompt, runs)
            assert sum(run.num_tokens for run in held) == plan.num_prefix_tokens + plan.num_held_rows
            fragments = [Span(runs[f.part_index], f.start, f.end, f.offset) for f in plan.fragments]
            before = [whole(run) for run in held]
            visible = [(span, 0) for span in before]
            visible += [(span, f.first_row) for span, f in zip(fragments, plan.fragments, strict=True)]
            ran = yield from run_rows(self.adapter, self.pool, plan.token_ids, plan.positions, visible, options)
        except BaseException:
            release_runs(self.pool, [*runs.values(), *held])
            raise
        num_computed = ran.run.num_tokens
        return self._joined(
            plan, fragments, [*runs.values()], held, ran.run, ran.last_hidden, num_computed=num_computed
        )

    def arrived_linked_context(
        self,
        plan: LinkPlan,
        runs: Mapping[int, Run],
        held: Sequence[Run],
        live: Run,
        last_hidden: torch.Tensor | None = None,
    ) -> Context:
        """A linked context whose rows another node computed: `live` holds their KV, row after row.

        `last_hidden` as for `arrived_context`, `runs` and `held` as for `linked_context_steps`; takes the references of
        all runs.
        """
        fragments = [Span(runs[f.part_index], f.start, f.end, f.offset) for f in plan.fragments]
        return self._joined(plan, fragments, [*runs.values()], held, live, last_hidden, num_computed=0)

    def _joined(
        self,
        plan: LinkPlan,
        fragments: Sequence[Span],
        chunks: Sequence[Run],
        held: Sequence[Run],
        live: Run,
        last_hidden: torch.Tensor | None,
        *,
        num_computed: int,
    ) -> Context:
        """The context of what was held, what was reused, and the rows of `live`."""
        pieces = [
            whole(Run(live.extent, live.start + row, length, position)) for row, position, length in plan.pieces()
        ]
        before = [whole(run) for run in held]
        spans = sorted([*before, *pieces, *fragments], key=lambda span: span.first_position)
        extents = [*(run.extent for run in (*chunks, *held)), live.extent]
        behind_sinks = bool(self._sinks and fragments)
        return Context(self.pool, spans, extents, last_hidden, num_computed, behind_sinks, live)

    def most_deviant(self, prompt: Prompt, runs: Mapping[int, Run], share: float) -> tuple[int, ...]:
        """Positions of the reused tokens that CacheBlend would recompute, ascending; hand them to `plan_recompute`.

        `runs` as for `linked_context`, but references stay the caller's; `share` (0 … 1) of their tokens is chosen.
        Costs one layer of full recompute; holds no pool memory. `spolia_engine.deviation` says how the choice is made
        and what is like the paper. Raises `InvalidRequest` for a share outside 0 … 1 or a run of another length than
        its part, `NotSupported` for a model of one layer.
        """
        return most_deviant(self.adapter, prompt, runs, share)

    def fork(self, context: Context, tails: Sequence[Sequence[int]], *, max_rows: int = DEFAULT_MAX_FORK_ROWS) -> Forks:
        """Computes many continuations of a context together, each as if it alone followed it.

        A range of the context is attended once with the rows of all tails; nothing of it is copied. `context` stays
        open and unchanged; the forks hold references of their own on its memory, so either may be closed first. A
        pass has at most `max_rows` rows (a longer tail runs alone). Source: Hydragen (2402.05099) §3.

        Raises `InvalidRequest` for no tails, an empty one, bad ids or too many, before memory is held; `Busy`, with
        nothing held, when the pool has no room for all tails together.
        """
        return fork(self.adapter, context, tails, max_rows)

    def arrived_context(self, prefix: Sequence[Run], live: Run, last_hidden: torch.Tensor | None = None) -> Context:
        """A context whose live run another node computed, and the hidden state of its last token. Takes the references
        of all runs.
        """
        runs = [*prefix, live]
        return Context(self.pool, [whole(run) for run in runs], [run.extent for run in runs], last_hidden, live=live)

    def register_prefix(self, context: Context, chain: Sequence[bytes]) -> list[tuple[bytes, Run]]:
        """Registers the full prefix chunks of an exact context's live run; returns the newly registered ones.

        `chain` holds the ids of the context's full blocks from position 0. The returned runs carry no reference of
        their own: they are good while the context is open.
        """
        return register_prefix(self.resident, context, chain)

    def register_linked(
        self, context: Context, plan: LinkPlan, blocks: Sequence[LinkedBlock]
    ) -> list[tuple[bytes, Run]]:
        """Registers the chunks that a link pass of `plan` computed; returns the newly registered ones.

        `blocks` as `exact_blocks` and `linked_chain` give them. The returned runs are good while the context is open.
        """
        return register_linked(self.resident, context, plan, blocks)

    # Decoding

    def compile_constraint(self, params: SamplingParams) -> Grammar | None:
        """The grammar of the request's constraint, if it has one. Takes time, off the thread that computes.

        Raises as `Grammars.compile` does, and `NotSupported` where this model has no constraints.
        """
        if params.constraint is None:
            return None
        if self._grammars is None:
            raise NotSupported("this engine was made without its model's tokenizer", field=params.constraint.field)
        return self._grammars.compile(params.constraint)

    def generation(self, params: SamplingParams, sample_index: int = 0, grammar: Grammar | None = None) -> Generation:
        """An answer with no tokens yet; `sample_index` tells the samples of one prompt apart.

        `grammar` is that of the request's constraint; an answer follows it with a matcher of its own.
        """
        assert (grammar is None) == (params.constraint is None), "compile the constraint first"
        matcher = None if grammar is None else grammar.matcher()
        return Generation(params, self.adapter.eos_token_ids, self._decode, sample_index, matcher)

    def start(self, context: Context, generation: Generation) -> DecodeSequence:
        """Makes a sequence of a context. Takes the context, also when it raises.

        Tokens a resumed answer has already are part of the context. Memory for the next one is taken now, for others as
        they come. Raises `Busy` when the pool has no room.
        """
        try:
            sequence = DecodeSequence(context, generation)
        except BaseException:
            context.close()
            raise
        try:
            sequence.make_room()
        except BaseException:
            sequence.close()
            raise
        return sequence

    def start_samples(self, context: Context, generations: Sequence[Generation]) -> list[DecodeSequence]:
        """Makes a sequence of each generation, at least one, all of one context: its KV is held once.

        Takes the context, also when it raises: `Busy`, with nothing held, when the pool has no room for all.
        """
        started: list[DecodeSequence] = []
        try:
            for generation in generations[:-1]:
                started.append(self.start(context.shared(), generation))
        except BaseException:
            context.close()
            close_all(started)
            raise
        try:
            started.append(self.start(context, generations[-1]))
        except BaseException:
            close_all(started)
            raise
        return started

    def branch(self, sequence: DecodeSequence, sample_indices: Sequence[int]) -> list[DecodeSequence]:
        """Goes on from where a sequence stands in more ways than one; `sequence` goes on too.

        The tail's KV is copied once, and every branch reads the copy; what any of them writes is its own. With that,
        prompts and answers branch into trees. Raises `Busy`, with nothing held, when the pool has no room.
        """
        tail, base = sequence.tail, sequence.context
        context = base.shared()
        if tail.length:
            try:
                extent = self.pool.allocate(tail.length)
            except BaseException:
                context.close()
                raise
            copy_kv([tail.span], extent, tail.rope_base, tail.rope_base + tail.length)
            run = Run(extent, 0, tail.length, tail.rope_base)
            context.spans.append(whole(run))
            context.extents.append(extent)
        context.live = None  # the sequence's own, who reads it in its slot
        return self.start_samples(context, [sequence.generation.branch(index) for index in sample_indices])

    def logits_after(self, contexts: Sequence[Context]) -> torch.Tensor:
        """Logits [num_contexts, vocab_size] of the token after each context, computed here or handed over."""
        hidden = [context.last_hidden for context in contexts if context.last_hidden is not None]
        assert len(hidden) == len(contexts), "nobody computed the last token of one"
        if self.deterministic:
            return torch.cat([self.adapter.logits(each[None]) for each in hidden])
        return self.adapter.logits(torch.stack(hidden))

    def first_token(self, context: Context, params: SamplingParams, token_index: int = 0, sample_index: int = 0) -> int:
        """Draws the token after a context, for who wants no more than that."""
        return sample(self.logits_after([context])[0], params, token_index, sample_index)

    def first_rows(self, sequences: Sequence[DecodeSequence]) -> Sequence[torch.Tensor | DrawnRow]:
        """A row for `accept` of each sequence that has no token yet: what comes after its context."""
        logits = self.logits_after([each.context for each in sequences])
        return drawn_rows([each.generation for each in sequences], logits) if self.device is None else list(logits)

    def draw(self, generation: Generation, logits: torch.Tensor) -> Delta:
        """Draws an answer's next token from `logits` [vocab_size] and adds it."""
        return draw(generation, logits)

    def accept(self, sequence: DecodeSequence, row: torch.Tensor | DrawnRow) -> Delta:
        """Adds a sequence's next token: what the device drew, else by `draw`."""
        return accept_row(sequence.generation, row)

    def step_rows(self, sequences: Sequence[DecodeSequence]) -> Sequence[torch.Tensor | DrawnRow]:
        """Runs each sequence's newest token; a row each for `accept`. Otherwise as `step_logits`."""
        if self.device is None:
            return drawn_rows([each.generation for each in sequences], self.step_logits(sequences))
        for sequence in sequences:
            sequence.make_room()
        rows: list[DrawnRow] = []
        for batch in [[each] for each in sequences] if self.deterministic else [list(sequences)]:
            found = self.device.step(batch, never_shared if self.deterministic else self.sharing)
            if self.deterministic:  # the next one's step overwrites them
                found = [replace(row, logits=row.logits.clone()) for row in found]
            rows += found
        for sequence in sequences:
            sequence.tail.length += 1
        return rows

    def step_logits(self, sequences: Sequence[DecodeSequence]) -> torch.Tensor:
        """Runs each sequence's newest token and returns the logits of the next, [num_sequences, vocab_size].

        At least one sequence. When it raises, every sequence stands where it stood before; `Busy` where the pool has no
        room for the KV of this step.
        """
        if self.device is not None:
            rows = self.step_rows(sequences)
            return torch.stack([row.logits if isinstance(row, DrawnRow) else row for row in rows]).float()
        return self._steps.alone(sequences) if self.deterministic else self._steps.together(sequences, self.sharing)

    @property
    def steps_beside_slices(self) -> bool:
        """Whether `step_beside` is for this engine: not where steps are graphs of a device, or each alone."""
        return self.device is None and not self.deterministic

    def step_beside(
        self, sequences: Sequence[DecodeSequence], slices: Sequence[Slice]
    ) -> tuple[Sequence[torch.Tensor | DrawnRow], list[Came]]:
        """`step_rows` in one pass with slices of prompts, at least one of each; and what came of the slices."""
        logits, found = self._steps.beside(sequences, self.sharing, slices)
        return drawn_rows([each.generation for each in sequences], logits), found

    def plan_batch(self, sequences: Sequence[DecodeSequence], sharing: Sharing) -> PlannedBatch:
        """What steps of these sequences do, good while all of them are open."""
        return self._steps.plan(sequences, sharing)

    def run_step(self, planned: PlannedBatch) -> torch.Tensor:
        """`step_logits` of a planned batch."""
        return self._steps.run(planned)

    def forget_plan(self) -> None:
        """Drops the plan of the last batch, which names its extents. Call it when a sequence of it is closed."""
        self._steps.forget()
        if self.device is not None:
            self.device.forget()

    def seal_answer(self, sequence: DecodeSequence, blocks: Sequence[SealedBlock]) -> list[tuple[bytes, Run]]:
        """Registers chunks that the answer completed, for the next turn; returns the newly registered ones.

        `blocks` stand side by side, as far as they have KV (the newest token has none yet), and only over KV at its own
        position. They may begin in the prompt's live run and end in the tail, so they are copied once into one
        extent of their own; all returned runs share one reference on it: the caller releases that of the first.
        Nothing is sealed when the pool has no room: a cache is not worth an error.
        """
        return seal_answer(self.resident, sequence, blocks)
