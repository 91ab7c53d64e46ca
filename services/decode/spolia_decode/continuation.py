"""Which chunks an answer completes behind its context, so that the next turn of a chat starts warm."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from spolia_core.ids import IdSpace
from spolia_core.prompt import Part, Prompt
from spolia_core.reuse import PREFIX_CHUNK_TOKENS
from spolia_decode.composition import LinkTermsOfPrompt
from spolia_engine.link_plan import LinkPlan, plan_recompute
from spolia_engine.linked_blocks import LinkedBlock, linked_blocks
from spolia_engine.sealing import SealedBlock, prefix_blocks


class Continuation(Protocol):
    """What a context's chain of chunks goes on with."""

    def blocks(self, answer_ids: Sequence[int]) -> list[SealedBlock]:
        """Chunks that the whole answer, as far as it has KV, completes; those of the context are not among them."""
        ...

    @property
    def earlier(self) -> Sequence[SealedBlock]:
        """Chunks of the context that the store is not given unless something stands behind them."""
        ...


@dataclass(frozen=True, slots=True)
class ExactContinuation:
    """Prefix chunks. `num_context_tokens` had KV before the first token was drawn."""

    prompt: Prompt
    num_context_tokens: int
    ids: IdSpace

    def blocks(self, answer_ids: Sequence[int]) -> list[SealedBlock]:
        """See `Continuation`."""
        chain = list(self.ids.prefix_chain([*self.prompt.token_ids, *answer_ids]))
        return prefix_blocks(chain, self.num_context_tokens // PREFIX_CHUNK_TOKENS)

    @property
    def earlier(self) -> Sequence[SealedBlock]:
        """None: prefix chunks are stored when they are computed."""
        return ()


@dataclass(frozen=True, slots=True)
class LinkedContinuation:
    """Linked chunks, of a context whose rows were those of the plan `whole`."""

    prompt: Prompt
    num_context_tokens: int
    ids: IdSpace
    whole: LinkPlan
    linked: tuple[LinkedBlock, ...]
    terms: LinkTermsOfPrompt

    def blocks(self, answer_ids: Sequence[int]) -> list[SealedBlock]:
        """See `Continuation`. A context without any document is exact, and goes on with prefix chunks."""
        if not self.whole.fragments:
            return ExactContinuation(self.prompt, self.num_context_tokens, self.ids).blocks(answer_ids)
        longer = Prompt((*self.prompt.parts, Part(tuple(answer_ids))))
        plan = plan_recompute(longer, self.whole.positions, num_prefix_tokens=self.whole.num_prefix_tokens)
        chain = list(self.ids.prefix_chain(longer.token_ids))
        name, num_link_tokens = self.terms.name, self.terms.policy.num_link_tokens
        found = linked_blocks(longer, plan, self.ids, name, num_link_tokens, chain)
        return [block for block in found if block.end > self.num_context_tokens]

    @property
    def earlier(self) -> Sequence[SealedBlock]:
        """The linked chunks before the answer."""
        return self.linked
