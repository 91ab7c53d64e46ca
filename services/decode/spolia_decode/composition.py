"""Of what a LINKED prompt is put together here: an exact prefix, linked chunks, local chunks, and what is computed.

    prompt   [system prompt][ chunk A ......... ][ chunk B ........ ][ question ]
              prefix         linked, then local   linked, then local  computed

The longest exact prefix comes first: nothing beats it. Behind it, documents are local chunks, and the rows between them
(link tokens, text) linked chunks, as far as everything before them is what it was when they were computed.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

from spolia_core.ids import IdSpace
from spolia_core.link_policy import LinkPolicy
from spolia_core.prompt import Prompt
from spolia_core.reuse import PREFIX_CHUNK_TOKENS, SourceSpan, TokenSource
from spolia_engine.link_plan import LinkPlan, plan_link, plan_recompute
from spolia_engine.linked_blocks import LinkedBlock, LinkedChain, exact_blocks, linked_chain, num_exact_tokens


@dataclass(frozen=True, slots=True)
class LinkTermsOfPrompt:
    """All that decides which tokens of a prompt are recomputed."""

    policy: LinkPolicy
    min_reused_tokens: int
    profile: str

    @property
    def name(self) -> str:
        """What ids of linked chunks say of it."""
        return f"{self.profile}/{self.policy.name}/{self.min_reused_tokens}"

    def plan(self, prompt: Prompt, context: Prompt, num_prefix_tokens: int = 0) -> LinkPlan:
        """The plan of `context`: the prompt, and on a replay the tokens received.

        A replay recomputes what the first node did, and the received tokens: planned anew, a document that ends the
        prompt would no longer have its last token recomputed, and the answer could go on differently.
        """
        plan = plan_link(
            prompt,
            self.policy.num_link_tokens,
            self.min_reused_tokens,
            num_sink_tokens=self.policy.num_sink_tokens,
            num_prefix_tokens=num_prefix_tokens,
        )
        if context is prompt:
            return plan
        return plan_recompute(context, plan.positions, num_prefix_tokens=num_prefix_tokens)


@dataclass(frozen=True, slots=True)
class Composition:
    """A context under one exact prefix: the chunks it is made of besides local ones, first to last.

    `chain` are the prefix chunk ids of its tokens; `linked_chain` is None where it has no document.
    """

    context: Prompt
    whole: LinkPlan
    chain: Sequence[bytes]
    exact: tuple[LinkedBlock, ...]
    linked_chain: LinkedChain | None

    @classmethod
    def of(
        cls,
        prompt: Prompt,
        context: Prompt,
        terms: LinkTermsOfPrompt,
        ids: IdSpace,
        chain: Sequence[bytes],
        num_prefix_tokens: int,
    ) -> Composition:
        """`chain` are the prefix chunk ids of the context's tokens."""
        whole = terms.plan(prompt, context, num_prefix_tokens)
        linked = linked_chain(context, whole, ids, terms.name, terms.policy.num_link_tokens, chain)
        return cls(context, whole, chain, tuple(exact_blocks(whole, chain)), linked)

    @property
    def linked(self) -> tuple[LinkedBlock, ...]:
        """Every linked chunk, first to last."""
        return self.linked_chain.blocks if self.linked_chain else ()

    @property
    def usable(self) -> tuple[LinkedBlock, ...]:
        """Linked chunks that may be held: not before the exact part is whole, and at least one row is computed."""
        if self.exact:
            return ()
        num_rows = len(self.whole.positions)
        return tuple(b for b in self.linked if b.first_row + b.num_tokens < num_rows)

    def plan(self, num_held: int) -> LinkPlan:
        """The plan where so many of the usable chunks are held."""
        return self.whole.without_first_rows(sum(block.num_tokens for block in self.linked[:num_held]))

    def computed_spans(self, plan: LinkPlan, num_prompt_tokens: int) -> Iterator[SourceSpan]:
        """Prompt tokens that the plan computes, one by one: those of documents are LINK, all others COMPUTED."""
        ends = list(accumulate(len(part.token_ids) for part in self.context.parts))
        for position in plan.positions:
            if position < num_prompt_tokens:
                part = self.context.parts[bisect_right(ends, position)]
                yield SourceSpan(position, 1, TokenSource.COMPUTED if part.chunk_id is None else TokenSource.LINK)


def usable_prefix(chain: Sequence[bytes], num_prompt_tokens: int) -> Sequence[bytes]:
    """The prefix chunks that a prompt may hold: at least its last token is computed."""
    return chain[: (num_prompt_tokens - 1) // PREFIX_CHUNK_TOKENS]


def num_blocks_before_documents(whole: LinkPlan) -> int:
    """Prefix chunks that lie before the first document of a plan without prefix."""
    return num_exact_tokens(whole) // PREFIX_CHUNK_TOKENS
