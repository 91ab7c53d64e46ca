"""What is measured on: a context of chunks, and the questions asked behind it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from spolia_core.errors import InvalidRequest
from spolia_core.prompt import check_token_ids


@dataclass(frozen=True, slots=True)
class Question:
    """Live tokens behind a context, and the tokens scored behind them."""

    task: str
    """What figures are grouped by, for example "fact" or "text"."""
    token_ids: tuple[int, ...]
    """The live question; at least one token, since the first scored token is predicted from the last of these."""
    answer_ids: tuple[int, ...]
    """Scored with teacher forcing; at least one token, end-of-sequence included where the task ends there."""
    exact: bool
    """Whether "every answer token is the model's first choice" is this task's exact match. False: text has none."""
    answers: tuple[str, ...] = ()
    """Accepted texts, where the answer has to be generated and compared after normalisation (`answers.py`)."""

    @property
    def num_tokens(self) -> int:
        """Tokens behind the context: question and answer."""
        return len(self.token_ids) + len(self.answer_ids)


@dataclass(frozen=True, slots=True)
class Case:
    """One context, `preamble_ids` then every chunk in order, and all questions asked behind it."""

    name: str
    """Unique in a run."""
    preamble_ids: tuple[int, ...]
    """Live tokens before the first chunk, for example BOS; may be empty."""
    chunks: tuple[tuple[int, ...], ...]
    """Token ids of each reusable chunk, encoded alone; no special tokens."""
    questions: tuple[Question, ...]
    cluster: str = ""
    """What the case was drawn from, where several cases are drawn from one source (states of one story): they are
    resampled together. Empty: the case stands for itself."""

    @property
    def cluster_name(self) -> str:
        """The unit of resampling: `cluster`, or the case's own name."""
        return self.cluster or self.name

    @property
    def num_chunk_tokens(self) -> int:
        """Tokens of all chunks: what a policy may reuse."""
        return sum(len(chunk) for chunk in self.chunks)

    @property
    def num_context_tokens(self) -> int:
        """Tokens before the questions: preamble and chunks."""
        return len(self.preamble_ids) + self.num_chunk_tokens

    @property
    def num_tokens(self) -> int:
        """Length of the context with its longest question and answer."""
        return self.num_context_tokens + max((question.num_tokens for question in self.questions), default=0)

    def validate(self, *, vocab_size: int, max_context_tokens: int) -> None:
        """Raises `InvalidRequest`, naming case and field, for empty parts, ids out of range or a context too long."""
        where = f"case {self.name!r}: "
        if self.preamble_ids:
            check_token_ids(self.preamble_ids, vocab_size, field=f"{where}preamble_ids")
        _check_any(self.chunks, f"{where}chunks")
        for index, chunk in enumerate(self.chunks):
            check_token_ids(chunk, vocab_size, field=f"{where}chunks[{index}]")
        _check_any(self.questions, f"{where}questions")
        for index, question in enumerate(self.questions):
            field = f"{where}questions[{index}]"
            if not question.task:
                raise InvalidRequest(f"{field} has no task name", field=f"{field}.task", limit="≥ 1 character")
            check_token_ids(question.token_ids, vocab_size, field=f"{field}.token_ids")
            check_token_ids(question.answer_ids, vocab_size, field=f"{field}.answer_ids")
        if self.num_tokens > max_context_tokens:
            raise InvalidRequest(
                f"{where}{self.num_tokens} tokens with its longest question; this model's context is "
                f"{max_context_tokens} tokens",
                field=f"{where}chunks",
                limit=f"{max_context_tokens} tokens",
                actual=f"{self.num_tokens} tokens",
            )


def check_cases(cases: Sequence[Case], *, vocab_size: int, max_context_tokens: int) -> None:
    """Raises `InvalidRequest` for no case at all, two cases of one name, or the first case that is not valid."""
    _check_any(cases, "cases")
    seen: set[str] = set()
    for case in cases:
        if case.name in seen:
            raise InvalidRequest(f"two cases are named {case.name!r}", field="cases", actual=case.name)
        seen.add(case.name)
        case.validate(vocab_size=vocab_size, max_context_tokens=max_context_tokens)


def _check_any(items: Sequence[object], field: str) -> None:
    if not items:
        raise InvalidRequest(f"{field} is empty", field=field, limit="≥ 1", actual="0")
