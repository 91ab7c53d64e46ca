"""An answer as it grows: ids, text, and the reason it ends."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass

from spolia_core.errors import InternalError, InvalidRequest
from spolia_core.reuse import FinishReason
from spolia_core.sampling import SamplingParams
from spolia_engine.grammar import Matcher
from spolia_engine.logprobs import TokenLogprobs
from spolia_engine.text import Decode, IncrementalText


@dataclass(frozen=True, slots=True)
class Delta:
    """New ids and newly final text. `token_index` is the index of the first id, `text_offset` counts code points.

    `logprobs` has one entry for each id where the request asked for them.
    """

    token_index: int
    token_ids: tuple[int, ...]
    text: str
    text_offset: int
    sample_index: int = 0
    logprobs: tuple[TokenLogprobs, ...] = ()

    def then(self, after: Delta) -> Delta:
        """This one and the one right after it, as one."""
        return Delta(
            self.token_index,
            self.token_ids + after.token_ids,
            self.text + after.text,
            self.text_offset,
            self.sample_index,
            self.logprobs + after.logprobs,
        )


class Generation:
    """Generated tokens of one sequence. Pure bookkeeping: knows no tensors."""

    def __init__(
        self,
        params: SamplingParams,
        eos_token_ids: frozenset[int],
        decode: Decode,
        sample_index: int = 0,
        matcher: Matcher | None = None,
    ) -> None:
        """`sample_index` tells samples of one prompt apart: each draws numbers of its own.

        `matcher` says which tokens may come next; without one, all may.
        """
        self.params = params
        self.matcher = matcher
        self.sample_index = sample_index
        self.token_ids: list[int] = []
        self.finish_reason: FinishReason | None = None
        self._eos = frozenset() if params.ignore_eos else eos_token_ids
        self._text = IncrementalText(decode, params.stop)

    @property
    def text(self) -> str:
        """Text that has become final."""
        return self._text.emitted

    @property
    def max_tail_tokens(self) -> int:
        """Tokens for which a tail has to have room at most: those that may still come, and one in any case."""
        return max(1, self.params.max_tokens - len(self.token_ids))

    def branch(self, sample_index: int) -> Generation:
        """Another answer that begins as this one stands: the same tokens, the same text given out."""
        other = copy(self)
        other.sample_index = sample_index
        other.token_ids = list(self.token_ids)
        other._text = self._text.branch()
        other.matcher = None if self.matcher is None else self.matcher.branch()
        return other

    def resume(self, token_ids: Sequence[int], num_text_code_points: int) -> Delta | None:
        """Takes the ids another node generated; text up to `num_text_code_points` was given out by it.

        Text behind that which these ids settle comes with the next token. When they already end the answer there is no
        next token: then it is returned, in a delta without ids; else None. Raises `InvalidRequest` for ids behind the
        end of the answer, or that the constraint forbids. Call it before the first `accept`.
        """
        self._text.skip(num_text_code_points)
        for index, token_id in enumerate(token_ids):
            if not self._add(token_id):
                raise InvalidRequest(
                    f"resume.token_ids breaks the request's constraint at token {index}",
                    field="resume.token_ids",
                    limit="ids that match it",
                    actual=str(token_id),
                )
            if self.finish_reason is not None:
                if index + 1 < len(token_ids):
                    raise InvalidRequest(
                        f"resume.token_ids goes on behind the end of the answer at token {index}",
                        field="resume.token_ids",
                        limit=f"{index + 1} ids",
                        actual=f"{len(token_ids)} ids",
                    )
                return self._delta(())
        return None

    def accept(self, token_id: int, logprobs: TokenLogprobs | None = None) -> Delta:
        """Adds a token, decides whether the answer ends with it, and says what to stream."""
        if not self._add(token_id):
            raise InternalError(f"token {token_id} was drawn, and the request's constraint forbids it")
        return self._delta((token_id,), () if logprobs is None else (logprobs,))

    def _add(self, token_id: int) -> bool:
        """Whether the constraint allows it."""
        self.token_ids.append(token_id)
        if self.matcher is not None and not self.matcher.take(token_id):
            return False
        if token_id in self._eos:
            self.finish_reason = FinishReason.EOS
            return True
        self._text.add(token_id)
        if self._text.stopped:
            self.finish_reason = FinishReason.STOP
        elif self.matcher is not None and self.matcher.is_complete:
            self.finish_reason = FinishReason.EOS  # the only token left; a step would draw it with certainty
        elif len(self.token_ids) >= self.params.max_tokens:
            self.finish_reason = FinishReason.LENGTH
        return True

    def _delta(self, token_ids: tuple[int, ...], logprobs: tuple[TokenLogprobs, ...] = ()) -> Delta:
        """The newest `token_ids` with all text that has become final and was not given out."""
        offset = self._text.num_emitted
        text = self._text.take() if self.finish_reason is None else self._text.finish()
        return Delta(len(self.token_ids) - len(token_ids), token_ids, text, offset, self.sample_index, logprobs)
