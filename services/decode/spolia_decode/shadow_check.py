"""One shadow check: what a LINKED request read and answered, and the exact recomputation it is compared with.

exact    [prompt ..........................][answer ........]    computed anew, nothing reused
linked   [link rows and chunk runs as served][answer ........]    the request's own context, its answer run again
                                           ↑ ↑ ↑ ↑ ↑ ↑ ↑ ↑      compared here: what predicts each answer token
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass

from torch import Tensor

from spolia_decode.shadow_divergence import Divergence
from spolia_engine.context import Context
from spolia_engine.core import EngineCore
from spolia_engine.extent import Extent


@dataclass(frozen=True, slots=True, eq=False)
class ShadowCheck:
    """A finished request to check. Owns `context`, which stands for the request's own with references of its own.

    `token_ids` are the context's, `answer_ids` (at least one) what was generated behind it.
    """

    request_id: str
    token_ids: tuple[int, ...]
    answer_ids: tuple[int, ...]
    context: Context


class ShadowComparison:
    """A check under way, in slices. Engine's thread only; `close` at any time between two slices frees everything."""

    def __init__(self, core: EngineCore, check: ShadowCheck, slice_tokens: int) -> None:
        """Takes the check's context. A slice runs at most `slice_tokens` rows (two, where that is 1)."""
        self.check = check
        self._core = core
        self._slice_tokens = slice_tokens
        self._linked: Context = check.context
        self._exact: Context | None = None
        self._found: list[Divergence] = []
        self._slices = self._run()

    @property
    def extents(self) -> list[Extent]:
        """Memory held now."""
        exact = self._exact
        return [*self._linked.extents, *(exact.extents if exact else [])]

    def advance(self) -> Divergence | None:
        """Runs a slice; the result once there is one. Raises `Busy` when the pool has no room."""
        for _ in self._slices:
            return None
        return Divergence.joined(self._found)

    def close(self) -> None:
        """Gives all memory back. Safe to call twice."""
        self._linked.close()
        if self._exact is not None:
            self._exact.close()

    def _run(self) -> Generator[None, None, None]:
        """The slices. Answer tokens run over both contexts, so half as many at a time."""
        prompt, answer = self.check.token_ids, self.check.answer_ids
        for end in [*range(self._slice_tokens, len(prompt), self._slice_tokens), len(prompt)]:
            exact = self._prefill(prompt[:end])
            yield
        assert exact.last_hidden is not None, "computed here"
        assert self._linked.last_hidden is not None, "linked contexts are computed on the node that decodes"
        self._compare(exact.last_hidden[None], self._linked.last_hidden[None], answer[:1])
        fed = answer[:-1]  # what follows the last token was never asked
        num_rows = max(1, self._slice_tokens // 2)
        for start in range(0, len(fed), num_rows):
            tail = fed[start : start + num_rows]
            exact, exact_hidden = self._follow(exact, tail)
            self._exact = exact
            self._linked, linked_hidden = self._follow(self._linked, tail)
            self._compare(exact_hidden, linked_hidden, answer[start + 1 : start + 1 + len(tail)])
            yield

    def _prefill(self, token_ids: Sequence[int]) -> Context:
        """The exact context, longer by what `token_ids` has behind it."""
        done = self._exact
        self._exact = None  # the runs' references move on, also when there is no room for more
        self._exact = self._core.exact_context(token_ids, [span.run for span in done.spans] if done else [])
        return self._exact

    def _follow(self, context: Context, tail: Sequence[int]) -> tuple[Context, Tensor]:
        """The context with `tail` behind it, in its place, and the hidden states of the tail [len(tail), hidden]."""
        forks = self._core.fork(context, [list(tail)])
        context.close()
        return forks.contexts[0], forks.hidden[0]

    def _compare(self, exact_hidden: Tensor, linked_hidden: Tensor, token_ids: Sequence[int]) -> None:
        logits = self._core.adapter.logits
        self._found.append(Divergence.of(logits(exact_hidden), logits(linked_hidden), token_ids))
