"""An answer as it grows: ids, text, and the reason it ends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from spolia_core.reuse import FinishReason
from spolia_core.sampling import SamplingParams
from spolia_engine.text import Decode, IncrementalText


@dataclass(frozen=True, slots=True)
class Delta:
    """New ids and newly final text. `token_index` is the index of the first id, `text_offset` counts code points."""

    token_index: int
    token_ids: tuple[int, ...]
    text: str
    text_offset: int


class Generation:
    """Generated tokens of one sequence. Pure bookkeeping: knows no tensors."""

    def __init__(self, params: SamplingParams, eos_token_ids: frozenset[int], decode: Decode) -> None:
        self.params = params
        self.token_ids: list[int] = []
        self.finish_reason: FinishReason | None = None
        self._eos = frozenset() if params.ignore_eos else eos_token_ids
        self._text = IncrementalText(decode, params.stop)

    @property
    def text(self) -> str:
        """Text that has become final."""
        return self._text.emitted

    def resume(self, token_ids: Sequence[int], num_text_code_points: int) -> Delta | None:
        """Takes the ids another node generated; text up to `num_text_code_points` was given out by it.

        Returns what that node may not have given out any more when these ids already end the answer, else None.
        """
        self._text.skip(num_text_code_points)
        for token_id in token_ids:
            delta = self.accept(token_id)
            if self.finish_reason is not None:
                return Delta(delta.token_index, (), delta.text, delta.text_offset)
        return None

    def accept(self, token_id: int) -> Delta:
        """Adds a token, decides whether the answer ends with it, and says what to stream."""
        index, offset = len(self.token_ids), self._text.num_emitted
        self.token_ids.append(token_id)
        if token_id in self._eos:
            self.finish_reason = FinishReason.EOS
            text = self._text.finish()
        else:
            text = self._text.push(token_id)
            if self._text.stopped:
                self.finish_reason = FinishReason.STOP
            elif len(self.token_ids) >= self.params.max_tokens:
                self.finish_reason = FinishReason.LENGTH
                text += self._text.finish()
        return Delta(index, (token_id,), text, offset)
