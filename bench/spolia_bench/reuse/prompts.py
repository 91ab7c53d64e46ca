"""Documents and questions nobody has asked before."""

from __future__ import annotations

import random
from dataclasses import dataclass

from spolia import Document
from spolia_bench.texts import text_of


@dataclass(frozen=True, slots=True)
class Asked:
    """Documents in the order in which they stand, and the question behind them."""

    documents: tuple[Document, ...]
    question: str

    @property
    def parts(self) -> list[Document | str]:
        """As a client gives them."""
        return [*self.documents, self.question]

    def led_by(self, number: int, rng: random.Random) -> Asked:
        """The same in a random order behind document `number` (counted round and round).

        Prompts of different heads have no exact prefix in common, and no linked chunk: what they share is documents.
        """
        head = self.documents[number % len(self.documents)]
        rest = [document for document in self.documents if document is not head]
        return Asked((head, *rng.sample(rest, len(rest))), self.question)


def fresh(num_documents: int, document_bytes: int, question_bytes: int, rng: random.Random) -> Asked:
    """New documents and a new question."""
    documents = tuple(Document(text_of(document_bytes, rng)) for _ in range(num_documents))
    return Asked(documents, text_of(question_bytes, rng))
