"""A node's operations on a model and its KV: compile chunks, build contexts, and what decodes them (`decoding.py`).

What schedules them is elsewhere: `spolia_worker` and the services, or `Engine` (engine.py), which adds prompts answered
in one process.

One thread at a time may compute; pool and residents are safe to use from others, and so are `adopt` and
`acquire_prefix`.

Ownership: a run handed out or taken in carries one reference on its extent, except where a function says otherwise.
Functions that build a context take the references of the runs they are given, also when they raise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from spolia_core.chunk_object import ChunkMeta
from spolia_core.errors import NotSupported
from spolia_core.ids import IdSpace, Recipe
from spolia_core.prompt import Prompt
from spolia_core.reuse import DEFAULT_LINK_TOKENS, ChunkKind
from spolia_core.sampling import SamplingParams
from spolia_engine.adapter import ModelAdapter
from spolia_engine.context import Context, release_runs, whole
from spolia_engine.decoding import Decoding
from spolia_engine.deviation import most_deviant
from spolia_engine.device_decoding import DeviceDecoding, DeviceSettings
from spolia_engine.extent import Extent
from spolia_engine.fork import DEFAULT_MAX_FORK_ROWS, Forks, fork
from spolia_engine.generation import Generation
from spolia_engine.grammar import Grammar, Grammars
from spolia_engine.link_plan import LinkPlan, check_runs, plan_link
from spolia_engine.linked_blocks import LinkedBlock, register_linked
from spolia_engine.passes import AT_ONCE, PassOptions, run_rows
from spolia_engine.pool import DEFAULT_BLOCK_SIZE, TORCH_DTYPE, Pool
from spolia_engine.resident import ResidentChunks
from spolia_engine.run import Run, Span
from spolia_engine.sealing import SealedBlock, register_prefix, seal_answer
from spolia_engine.sequence import Sequence as DecodeSequence
from spolia_engine.sharing_table import AttentionShape
from spolia_engine.sinks import sink_token_ids
from spolia_engine.slot_memory import SlotMemory
from spolia_engine.steps import Steps, finish
from spolia_engine.text import Decode


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
        self.resident = ResidentChunks(self.pool)
        self.recipe = Recipe(adapter.compute_dtype, num_sink_tokens)
        self._decode = decode
        self._grammars = grammars
        self.decoding = Decoding(
            adapter, None if device is None or slots is None else DeviceDecoding(adapter, slots, device)
        )

    def id_space(self, tenant_key: bytes) -> IdSpace:
        """The ids of a tenant's chunks under this engine's model and recipe."""
        return IdSpace(tenant_key, self.adapter.fingerprint, self.recipe)

    @property
    def attention_shape(self) -> AttentionShape:
        """What decides whether rows of this model attend together (`sharing_table`)."""
        shape, page_size = self.adapter.kv_shape, None if self.decoding.device is None else self.pool.block_size
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

    # Answers

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

    def seal_answer(self, sequence: DecodeSequence, blocks: Sequence[SealedBlock]) -> list[tuple[bytes, Run]]:
        """Registers chunks that the answer completed, for the next turn; returns the newly registered ones.

        `blocks` stand side by side, as far as they have KV (the newest token has none yet), and only over KV at its own
        position. They may begin in the prompt's live run and end in the tail, so they are copied once into one
        extent of their own; all returned runs share one reference on it: the caller releases that of the first.
        Nothing is sealed when the pool has no room: a cache is not worth an error.
        """
        return seal_answer(self.resident, sequence, blocks)
