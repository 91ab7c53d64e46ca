"""A conversation as a prompt: documents, then questions and answers as plain text.

An answer goes into the next prompt as the token ids it was drawn as, so that the KV of the conversation so far is found
again; what ended it is left out.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from spolia.parts import Document, Part, TokenIds
from spolia.results import Result
from spolia_core.reuse import FinishReason


@dataclass(slots=True)
class Conversation:
    """Turns under their labels, behind documents."""

    documents: list[Document]
    user_label: str
    assistant_label: str
    system: str = ""
    _turns: list[Part] = field(default_factory=list)

    @property
    def num_turns(self) -> int:
        """Questions that were answered."""
        return len(self._turns) // 2

    @property
    def stop(self) -> str:
        """Where an answer ends: a model that goes on writes the next question itself."""
        return f"\n{self.user_label}"

    def prompt(self, question: str) -> list[Part]:
        """What to ask; changes nothing."""
        beginning: list[Part] = [self.system] if self.system else []
        return [*beginning, *self.documents, *self._turns, self._asked(question)]

    def answered(self, question: str, result: Result) -> None:
        """A turn is complete."""
        self._turns += [self._asked(question), _said(result)]

    def reset(self) -> None:
        """Forgets the turns, not the documents."""
        self._turns.clear()

    def _asked(self, question: str) -> str:
        return f"\n{self.user_label} {question}\n{self.assistant_label}"


def _said(result: Result) -> Part:
    """The answer without what ended it: an end-of-sequence token, or the stop string, whose tokens may hold more."""
    token_ids = result.token_ids
    if result.finish_reason is FinishReason.EOS:
        token_ids = token_ids[:-1]
    if result.finish_reason is FinishReason.STOP or not token_ids:
        return result.text or " "
    return TokenIds(token_ids)
