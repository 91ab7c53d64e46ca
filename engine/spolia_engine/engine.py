"""The engine as nodes load it, and the whole system in one process: `Engine.generate`, without a network, is the oracle
for all else, and the easiest place to start.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from spolia_core.errors import InvalidRequest
from spolia_core.ids import IdSpace
from spolia_core.link_policy import LinkPolicy
from spolia_core.link_terms import LinkTerms
from spolia_core.profile import MANUAL_PROFILE, ReuseProfile, find_profile
from spolia_core.prompt import Part, Prompt, check_answer_length
from spolia_core.reuse import (
    DEFAULT_MIN_REUSED_TOKENS,
    PREFIX_CHUNK_TOKENS,
    ChunkKind,
    FinishReason,
    Miss,
    MissReason,
    ReuseMode,
    ReuseReport,
    TokenSource,
)
from spolia_core.sampling import DEFAULT_MAX_TOKENS, SamplingParams
from spolia_engine.adapter import ModelAdapter
from spolia_engine.context import Context, release_runs
from spolia_engine.core import EngineCore
from spolia_engine.device_decoding import DeviceSettings, DrawnRow
from spolia_engine.generation import Generation
from spolia_engine.grammar import Grammars
from spolia_engine.link_plan import LinkPlan, plan_link
from spolia_engine.next_tokens import accept_row
from spolia_engine.pool import DEFAULT_BLOCK_SIZE, TORCH_DTYPE
from spolia_engine.pool_budget import free_bytes, pool_budget
from spolia_engine.run import Run
from spolia_engine.sealing import prefix_blocks
from spolia_engine.sequence import Sequence as DecodeSequence
from spolia_engine.sequence import close_all
from spolia_engine.sequence_starts import start_samples
from spolia_engine.text import Decode, load_decode

LOCAL_TENANT_KEY = bytes(32)
"""Key of the only tenant of a single process."""


@dataclass(frozen=True, slots=True)
class Completion:
    """An answer. `margins[i]` is the gap in logits between the two best candidates for token i, whatever was drawn;
    infinite where a constraint left one.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    reuse: ReuseReport
    margins: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class _ReuseOptions:
    mode: ReuseMode
    num_link_tokens: int | None
    min_reused_tokens: int
    force_linked: bool


class Engine(EngineCore):
    """A model that answers prompts, keeping and reusing KV as the cluster would, on the terms of its profile.

    Nodes make one too, and use the operations of `EngineCore` alone: their profile is in the node's `LinkTerms`.
    """

    def __init__(
        self,
        adapter: ModelAdapter,
        decode: Decode,
        *,
        num_blocks: int,
        block_size: int = DEFAULT_BLOCK_SIZE,
        num_sink_tokens: int | None = None,
        profile: ReuseProfile | None = None,
        grammars: Grammars | None = None,
        device: DeviceSettings | None = None,
    ) -> None:
        """As `EngineCore`; `num_sink_tokens` unset are those of `profile`, the model's, or none without one."""
        if num_sink_tokens is None:
            num_sink_tokens = LinkTerms.of(profile).policy.num_sink_tokens
        super().__init__(
            adapter,
            decode,
            num_blocks=num_blocks,
            block_size=block_size,
            num_sink_tokens=num_sink_tokens,
            grammars=grammars,
            device=device,
        )
        self.profile = profile

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        dtype: str = "float32",
        max_context_tokens: int | None = None,
        pool_bytes: int = 1 << 30,
        block_size: int | None = None,
        device: str = "cpu",
        num_sink_tokens: int | None = None,
    ) -> Engine:
        """Loads a Hugging Face-format directory with a `tokenizer.json`, and the profile beside the model, if any.

        `pool_bytes` is the budget for KV, taken whole at once on a GPU; `block_size` unset is what suits the device.
        `num_sink_tokens` set by hand take the place of the profile's. Raises `NotFound`, `NotSupported`, `DataCorrupt`
        or `InvalidRequest`, and as `find_profile` does for a profile that cannot be used.
        """
        adapter = ModelAdapter.load(path, dtype=dtype, max_context_tokens=max_context_tokens, device=device)
        return cls.of(
            adapter,
            load_decode(path),
            pool_bytes=pool_bytes,
            block_size=block_size,
            num_sink_tokens=num_sink_tokens,
            profile=find_profile(Path(path), None, adapter.fingerprint.hex()),
            grammars=Grammars.of(path, adapter.vocab_size, adapter.eos_token_ids),
        )

    @classmethod
    def of(
        cls,
        adapter: ModelAdapter,
        decode: Decode,
        *,
        pool_bytes: int = 1 << 30,
        block_size: int | None = None,
        num_sink_tokens: int | None = None,
        profile: ReuseProfile | None = None,
        grammars: Grammars | None = None,
    ) -> Engine:
        """An engine around a loaded model; `decode` turns ids into text. No profile is looked for.

        `pool_bytes` and `block_size` as for `load`. Raises `InvalidRequest` where the device has not so much.
        """
        budget = pool_budget(
            pool_bytes,
            block_size,
            adapter.kv_shape.bytes_per_token,
            on_device=adapter.device.type == "cuda",
            free_bytes=free_bytes(adapter.device),
            step_bytes=DeviceSettings().buffer_bytes(
                num_q_heads=adapter.num_q_heads,
                head_dim=adapter.kv_shape.head_dim,
                vocab_size=adapter.vocab_size,
                itemsize=TORCH_DTYPE[adapter.kv_shape.dtype].itemsize,
            ),
        )
        return cls(
            adapter,
            decode,
            num_blocks=budget.num_blocks,
            block_size=budget.block_size,
            num_sink_tokens=num_sink_tokens,
            profile=profile,
            grammars=grammars,
        )

    @property
    def ids(self) -> IdSpace:
        """The ids of this process's only tenant."""
        return self.id_space(LOCAL_TENANT_KEY)

    def chunk(self, token_ids: Sequence[int]) -> Part:
        """A prompt part that is a local chunk."""
        return Part(tuple(token_ids), self.ids.local(token_ids))

    def terms(self, num_link_tokens: int | None = None) -> LinkTerms:
        """On what terms LINKED is served; `num_link_tokens`: set by hand, if anything.

        Sinks other than the profile's were set by hand too: nothing was measured for them. Raises `InvalidRequest` for
        a number of link tokens that no policy has.
        """
        terms, num_sinks = LinkTerms.of(self.profile, num_link_tokens), self.recipe.num_sink_tokens
        if terms.policy.num_sink_tokens == num_sinks:
            return terms
        return LinkTerms(MANUAL_PROFILE, LinkPolicy(terms.policy.num_link_tokens, num_sinks))

    def generate(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        mode: ReuseMode = ReuseMode.EXACT,
        num_link_tokens: int | None = None,
        min_reused_tokens: int = DEFAULT_MIN_REUSED_TOKENS,
        force_linked: bool = False,
    ) -> Completion:
        """Answers a prompt. EXACT reuses prefix chunks of earlier answers; LINKED reuses and keeps local chunks.

        `params` unset is greedy, up to the default number of tokens or what the prompt leaves of the context.
        `num_link_tokens` unset are the profile's; set by hand they take its place, its refusal included. Chunks with
        fewer than `min_reused_tokens` behind their link tokens are recomputed whole; below what profiles are calibrated
        with, the report says "manual", and a refusal stands.
        Raises `InvalidRequest` for bad input before memory is held, `NotSupported` for LINKED on a model that has none,
        or one whose profile forbids it unless `force_linked`; `Busy` when the pool has no room.
        """
        options = _ReuseOptions(mode, num_link_tokens, min_reused_tokens, force_linked)
        return self._generate(prompt, params, 1, options)[0]

    def generate_samples(
        self,
        prompt: Prompt,
        num_samples: int,
        params: SamplingParams | None = None,
        *,
        mode: ReuseMode = ReuseMode.EXACT,
        num_link_tokens: int | None = None,
        min_reused_tokens: int = DEFAULT_MIN_REUSED_TOKENS,
        force_linked: bool = False,
    ) -> list[Completion]:
        """Several answers to one prompt, decoded together over one copy of its KV; otherwise as `generate`.

        Sample i draws numbers of its own; sample 0 is the answer that `generate` gives. All have the same report.
        """
        if num_samples < 1:
            raise InvalidRequest(f"num_samples must be ≥ 1, got {num_samples}", field="num_samples", limit="≥ 1")
        options = _ReuseOptions(mode, num_link_tokens, min_reused_tokens, force_linked)
        return self._generate(prompt, params, num_samples, options)

    def _generate(
        self, prompt: Prompt, params: SamplingParams | None, num_samples: int, options: _ReuseOptions
    ) -> list[Completion]:
        mode, min_reused_tokens = options.mode, options.min_reused_tokens
        terms, forced = self.terms(options.num_link_tokens), False
        if mode is ReuseMode.LINKED:
            self.adapter.support.require_linked()
            forced = terms.check(force_linked=options.force_linked)
        prompt.validate(vocab_size=self.adapter.vocab_size, max_context_tokens=self.adapter.max_context_tokens)
        params = params or self._default_params(prompt)
        params.validate()
        check_answer_length(prompt.num_tokens, params.max_tokens, self.adapter.max_context_tokens)
        grammar = self.compile_constraint(params)
        is_as_measured = min_reused_tokens >= DEFAULT_MIN_REUSED_TOKENS  # with which profiles are calibrated
        report = ReuseReport(mode, profile=terms.profile if is_as_measured else MANUAL_PROFILE, forced=forced)
        if mode is ReuseMode.LINKED:
            policy = terms.policy
            plan = plan_link(prompt, policy.num_link_tokens, min_reused_tokens, num_sink_tokens=policy.num_sink_tokens)
            report.link_tokens_per_chunk = policy.num_link_tokens
            report.sink_tokens_per_chunk = policy.num_sink_tokens
            context = self._linked(prompt, plan, report)
        else:
            context = self._exact(prompt.token_ids, report)
        hidden = context.last_hidden
        assert hidden is not None
        generations = [self.generation(params, index, grammar) for index in range(num_samples)]
        sequences = start_samples(context, generations)
        try:
            margins = self._run(sequences, self.adapter.logits(hidden[None])[0])
            if mode is ReuseMode.EXACT:
                self._seal(prompt, sequences[0])
        finally:
            self.decoding.forget_plan()
            close_all(sequences)
        return [_completion(g, report, found) for g, found in zip(generations, margins, strict=True)]

    def _default_params(self, prompt: Prompt) -> SamplingParams:
        room = self.adapter.max_context_tokens - prompt.num_tokens
        return SamplingParams(max_tokens=min(DEFAULT_MAX_TOKENS, room))

    def _exact(self, token_ids: list[int], report: ReuseReport) -> Context:
        chain = list(self.ids.prefix_chain(token_ids))
        prefix = self.acquire_prefix(chain[: (len(token_ids) - 1) // PREFIX_CHUNK_TOKENS])
        num_cached = len(prefix) * PREFIX_CHUNK_TOKENS
        report.sources.update({TokenSource.DEVICE: num_cached, TokenSource.COMPUTED: len(token_ids) - num_cached})
        context = self.exact_context(token_ids, prefix)
        self.register_prefix(context, chain)
        return context

    def _linked(self, prompt: Prompt, plan: LinkPlan, report: ReuseReport) -> Context:
        self._check_chunk_ids(prompt)
        report.sources.update(linked_sources(prompt, plan))
        runs: dict[int, Run] = {}
        try:
            for index in dict.fromkeys(f.part_index for f in plan.fragments):
                runs[index] = self._chunk_run(prompt.parts[index], plan, index, report)
        except BaseException:
            release_runs(self.pool, list(runs.values()))
            raise
        return self.linked_context(prompt, runs, plan)

    def _check_chunk_ids(self, prompt: Prompt) -> None:
        for index, part in enumerate(prompt.parts):
            if part.chunk_id is not None and part.chunk_id != self.ids.local(part.token_ids):
                raise InvalidRequest(f"parts[{index}] names another chunk", field=f"parts[{index}].chunk_id")

    def _chunk_run(self, part: Part, plan: LinkPlan, index: int, report: ReuseReport) -> Run:
        assert part.chunk_id is not None
        reused = plan.num_reused(index)
        run = self.resident.acquire(part.chunk_id)
        if run is not None:
            report.sources[TokenSource.DEVICE] += reused
            return run
        report.sources[TokenSource.COMPILED] += reused
        report.misses.append(Miss(part.chunk_id, ChunkKind.LOCAL, MissReason.NOT_FOUND, len(part.token_ids)))
        return self.compile(part.chunk_id, part.token_ids)

    def _run(self, sequences: Sequence[DecodeSequence], first: torch.Tensor) -> list[list[float]]:
        """Decodes all to their ends, `first` being the logits [vocab_size] of their first token; returns margins."""
        margins = [[_margin(first, sequence)] for sequence in sequences]
        for sequence in sequences:
            accept_row(sequence.generation, first)
        while going := [i for i, sequence in enumerate(sequences) if not sequence.finished]:
            for i, row in zip(going, self.decoding.step_rows([sequences[i] for i in going]), strict=True):
                margins[i].append(_margin(row, sequences[i]))
                accept_row(sequences[i].generation, row)
        return margins

    def _seal(self, prompt: Prompt, sequence: DecodeSequence) -> None:
        with_kv = prompt.token_ids + sequence.generation.token_ids[:-1]
        first = prompt.num_tokens // PREFIX_CHUNK_TOKENS
        sealed = self.seal_answer(sequence, prefix_blocks(list(self.ids.prefix_chain(with_kv)), first))
        if sealed:
            self.pool.release(sealed[0][1].extent)


def linked_sources(prompt: Prompt, plan: LinkPlan) -> dict[TokenSource, int]:
    """What a link plan recomputes, by source: tokens of chunks are LINK, all others COMPUTED."""
    num_link = sum(len(p.token_ids) for p in prompt.parts if p.chunk_id is not None)
    num_link -= sum(f.end - f.start for f in plan.fragments)
    return {TokenSource.LINK: num_link, TokenSource.COMPUTED: len(plan.positions) - num_link}


def _completion(generation: Generation, report: ReuseReport, margins: Sequence[float]) -> Completion:
    assert generation.finish_reason is not None
    return Completion(generation.text, tuple(generation.token_ids), generation.finish_reason, report, tuple(margins))


def _margin(row: torch.Tensor | DrawnRow, sequence: DecodeSequence) -> float:
    logits = row.logits.float() if isinstance(row, DrawnRow) else row
    matcher = sequence.generation.matcher
    if matcher is not None:
        logits = logits[torch.from_numpy(matcher.allowed()).to(logits.device)]
    if len(logits) == 1:
        return math.inf
    best = torch.topk(logits, 2).values
    return float(best[0] - best[1])
