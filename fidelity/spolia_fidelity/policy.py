"""Reuse policies by name: what of a case's chunks is reused, and what is recomputed.

    full               everything is computed: the reference
    prefix             exact prefix chunks that a first, identical request left behind
    naive              chunks as they were compiled, nothing recomputed (k = 0)
    link:K             the first K tokens of each chunk recomputed in place (EPIC §4, AttnLink / LegoLink)
    sinks:S            k = 0 behind S dummy sink tokens at compile time (EPIC §4, LegoLink-0)
    sinks:S+link:K     both
    cacheblend:R       the share R of chunk tokens whose V at layer 1 deviates most (CacheBlend, 2405.16444, §4)

A policy opens a *context* for a case: preamble and chunks, ready for questions to be forked from it. What can be
served is a `LinkPolicy`; the others are measured only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Protocol

from spolia_core.errors import InvalidRequest
from spolia_core.profile import LinkPolicy
from spolia_core.prompt import Part, Prompt
from spolia_core.reuse import DEFAULT_MIN_REUSED_TOKENS, PREFIX_CHUNK_TOKENS
from spolia_engine.context import Context, release_runs
from spolia_engine.core import EngineCore
from spolia_engine.link_plan import LinkPlan, plan_link, plan_recompute
from spolia_engine.run import Run, Span
from spolia_fidelity.case import Case

FORMS = "full, prefix, naive, link:K, sinks:S, sinks:S+link:K, cacheblend:R (0 < R ≤ 1)"
KEY = bytes(32)
"""Key of the only tenant of a measurement."""


@dataclass(frozen=True, slots=True)
class Opened:
    """A context whose owner closes it, and what it cost in chunk tokens; the two add up to the case's."""

    context: Context
    recomputed_tokens: int
    reused_tokens: int


class Policy(Protocol):
    """What the harness does for one policy name."""

    @property
    def name(self) -> str:
        """As the caller writes it."""
        ...

    @property
    def num_sink_tokens(self) -> int:
        """Of the recipe whose engine `open` needs."""
        ...

    @property
    def needs_chunks(self) -> bool:
        """Whether it reads chunks compiled alone: then the model must be one that can link."""
        ...

    def open(self, engine: EngineCore, case: Case) -> Opened:
        """Computes the context of a case on an engine of the policy's recipe.

        Raises `Busy` when the pool has no room.
        """
        ...


@dataclass(frozen=True, slots=True)
class Full:
    """Everything is computed."""

    name: str = "full"
    num_sink_tokens: int = 0
    needs_chunks: bool = False

    def open(self, engine: EngineCore, case: Case) -> Opened:
        """One exact prefill."""
        return Opened(engine.exact_context(prompt_of(engine, case).token_ids, []), case.num_chunk_tokens, 0)


@dataclass(frozen=True, slots=True)
class ExactPrefix:
    """A second, identical request: the prefix chunks of the first one are read, the rest is computed. Exact."""

    name: str = "prefix"
    num_sink_tokens: int = 0
    needs_chunks: bool = False

    def open(self, engine: EngineCore, case: Case) -> Opened:
        """Computes the context once, to have its prefix chunks, and once more behind them."""
        token_ids = prompt_of(engine, case).token_ids
        chain = list(engine.id_space(KEY).prefix_chain(token_ids))
        first = engine.exact_context(token_ids, [])
        try:
            engine.register_prefix(first, chain)
            prefix = engine.acquire_prefix(chain[: (len(token_ids) - 1) // PREFIX_CHUNK_TOKENS])
        finally:
            first.close()
        context = engine.exact_context(token_ids, prefix)
        reused = max(0, sum(run.num_tokens for run in prefix) - len(case.preamble_ids))
        return Opened(context, case.num_chunk_tokens - reused, reused)


@dataclass(frozen=True, slots=True)
class Linked:
    """What LINKED serves: leading-k recompute over local chunks, short remainders recomputed whole."""

    policy: LinkPolicy
    needs_chunks: bool = True

    @property
    def name(self) -> str:
        """That of the link policy."""
        return self.policy.name

    @property
    def num_sink_tokens(self) -> int:
        """That of the link policy."""
        return self.policy.num_sink_tokens

    def open(self, engine: EngineCore, case: Case) -> Opened:
        """Compiles the chunks that are not resident and links."""
        prompt = prompt_of(engine, case)
        k, sinks = self.policy.num_link_tokens, self.policy.num_sink_tokens
        plan = plan_link(_with_question(prompt), k, DEFAULT_MIN_REUSED_TOKENS, num_sink_tokens=sinks)
        plan = _without_question(plan)
        runs = chunk_runs(engine, prompt, sorted({fragment.part_index for fragment in plan.fragments}))
        return _opened(engine, case, prompt, runs, plan)


@dataclass(frozen=True, slots=True)
class CacheBlend:
    """The share of chunk tokens whose value vectors deviate most is recomputed. Needs all chunks' layer 1 first."""

    share: float
    num_sink_tokens: int = 0
    needs_chunks: bool = True

    @property
    def name(self) -> str:
        """ "cacheblend:0.16"."""
        return f"cacheblend:{self.share:g}"

    def open(self, engine: EngineCore, case: Case) -> Opened:
        """Compiles the chunks that are not resident, chooses positions and links."""
        prompt = prompt_of(engine, case)
        reusable = [index for index, part in enumerate(prompt.parts) if part.chunk_id is not None]
        runs = chunk_runs(engine, prompt, reusable)
        try:
            chosen = engine.most_deviant(prompt, runs, self.share)
            plan = _without_question(plan_recompute(_with_question(prompt), chosen))
        except BaseException:
            release_runs(engine.pool, list(runs.values()))
            raise
        return _opened(engine, case, prompt, runs, plan)


def parse_policies(names: str) -> tuple[Policy, ...]:
    """The policies of a comma-separated list, in its order.

    Raises `InvalidRequest` for an empty list, a name twice, and a name of no policy, with the accepted forms.
    """
    found = [parse_policy(name.strip()) for name in names.split(",") if name.strip()]
    if not found:
        raise InvalidRequest("policies is empty", field="policies", limit=f"≥ 1 of {FORMS}", actual=names)
    for index, policy in enumerate(found):
        if policy.name in {other.name for other in found[:index]}:
            raise InvalidRequest(f"policies holds {policy.name} twice", field="policies", actual=names)
    return tuple(found)


def parse_policy(name: str) -> Policy:
    """The policy of this name. Raises `InvalidRequest`, naming it and the accepted forms."""
    if name in ("full", "prefix"):
        return Full() if name == "full" else ExactPrefix()
    kind, _, value = name.partition(":")
    try:
        if kind == "cacheblend":
            share = float(value)
            if not 0 < share <= 1:
                raise ValueError(value)
            return CacheBlend(share)
        return Linked(LinkPolicy.parse(name))
    except (ValueError, InvalidRequest) as error:
        raise InvalidRequest(
            f"policies names {name!r}; known: {FORMS}", field="policies", limit=FORMS, actual=name
        ) from error


def prompt_of(engine: EngineCore, case: Case) -> Prompt:
    """The context of a case as a prompt: preamble live, every chunk a local chunk of the engine's recipe."""
    ids = engine.id_space(KEY)
    preamble = (Part(case.preamble_ids),) if case.preamble_ids else ()
    return Prompt((*preamble, *(Part(chunk, ids.local(chunk)) for chunk in case.chunks)))


def chunk_runs(engine: EngineCore, prompt: Prompt, part_indices: Sequence[int]) -> dict[int, Run]:
    """Runs of these parts, resident or compiled now, with a reference each that the caller owns."""
    runs: dict[int, Run] = {}
    try:
        for index in part_indices:
            part = prompt.parts[index]
            assert part.chunk_id is not None
            runs[index] = engine.resident.acquire(part.chunk_id) or engine.compile(part.chunk_id, part.token_ids)
    except BaseException:
        release_runs(engine.pool, list(runs.values()))
        raise
    return runs


# A link plan always recomputes the prompt's last token, which would be the last chunk's here: the questions come later,
# by forking. So the plan is made with one live token behind the chunks, in a question's place, whose row is taken off.


def _with_question(prompt: Prompt) -> Prompt:
    return Prompt((*prompt.parts, Part((0,))))


def _without_question(plan: LinkPlan) -> LinkPlan:
    return LinkPlan(plan.positions[:-1], plan.token_ids[:-1], plan.fragments)


def _opened(engine: EngineCore, case: Case, prompt: Prompt, runs: dict[int, Run], plan: LinkPlan) -> Opened:
    """Links, taking the references of `runs`; counts from the plan."""
    reused = sum(fragment.end - fragment.start for fragment in plan.fragments)
    if plan.positions:
        context = engine.linked_context(prompt, runs, plan)
    else:  # no preamble and nothing recomputed: the chunks as they lie are the context
        bases = list(accumulate((len(part.token_ids) for part in prompt.parts), initial=0))
        spans = [Span(run, 0, run.num_tokens, bases[index]) for index, run in sorted(runs.items())]
        context = Context(engine.pool, spans, [run.extent for run in runs.values()])
    return Opened(context, case.num_chunk_tokens - reused, reused)
