"""Training batches, a function of (seed, stage, step): a resumed run sees what an unbroken one would."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random

import torch
from tokenizers import Tokenizer
from torch import Tensor

from spolia_fidelity.tasks import TASKS, Corpus, Question, Style, make_corpus

from .stage import Stage
from .tokenizer import encode_parts, special_ids

_NUM_PAIRS = 8
_NUM_FILLERS = 64
_MAX_INLINE = 3
_PART_SHARE = 0.15  # of the tokens of parts, that carry loss
_PART_WEIGHT = 0.1
_RARE_SHARE = 0.5  # at most so much of the questions is not of the task "fact"


@dataclass(frozen=True, slots=True)
class Batch:
    """Tensors of one step: what `Network.forward` takes, and a target and its weight per selected place.

    Each row is a *stream* of BOS, parts and perhaps exchanges, int64 [rows, tokens] with padding behind `lengths`,
    and *tails* [rows, num_tails, tail_tokens]: exchanges which see the stream and themselves, not each other. Places
    count through [rows, tokens + num_tails · tail_tokens]. `answers` numbers the answer a target belongs to, -1 for
    plain text; `tasks` names the task of each answer as an index into TASKS.
    """

    ids: Tensor
    positions: Tensor
    lengths: Tensor
    tail_ids: Tensor
    tail_positions: Tensor
    select: Tensor
    targets: Tensor
    weights: Tensor
    answers: Tensor
    tasks: Tensor

    @property
    def num_tokens(self) -> int:
        """Tokens of streams and tails, padding included."""
        return self.ids.numel() + self.tail_ids.numel()


@dataclass(frozen=True, slots=True)
class _Target:
    place: int
    token: int
    weight: float
    answer: int  # number in this row, or -1


@dataclass(slots=True)
class _Row:
    """One stream, its tails, and the targets in each; `stream` counts answers first."""

    ids: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    targets: list[_Target] = field(default_factory=list)
    tails: list[list[int]] = field(default_factory=list)
    tail_starts: list[int] = field(default_factory=list)  # first target's place in each tail
    tasks: list[int] = field(default_factory=list)

    def append(self, ids: Sequence[int], position: int) -> int:
        """Adds tokens that stand from `position` on; returns the place of the first."""
        start = len(self.ids)
        self.ids += ids
        self.positions += range(position, position + len(ids))
        return start


def make_batch(tokenizer: Tokenizer, stage: Stage, seed: int, step: int) -> Batch:
    """Builds the batch of one step of a stage."""
    rng = Random(f"{seed} {stage.name} {step}")
    if stage.pair_gap >= 0:
        count = max(1, stage.step_tokens // stage.stream_tokens)
        return _stack([_pair_row(rng, tokenizer.get_vocab_size(), stage) for _ in range(count)], 0)
    style = rng.choice(stage.styles)
    num_parts = stage.max_parts if rng.random() < 0.5 else rng.randint(stage.min_parts, stage.max_parts)
    first = _text_row(rng, tokenizer, stage, style, num_parts)
    count = max(1, stage.step_tokens // len(first.ids))
    rows = [first, *(_text_row(rng, tokenizer, stage, style, num_parts) for _ in range(count - 1))]
    return _stack(rows, max(1, stage.step_tails // count))


def make_prose_batch(prose: Tensor, rows: int, tokens: int, seed: int, step: int, bos: int) -> Batch:
    """Draws windows of a long int32 stream of prose; half of them open with BOS."""
    rng = Random(f"{seed} prose {step}")
    windows = []
    for _ in range(rows):
        start = rng.randrange(len(prose) - tokens - 1)
        window = prose[start : start + tokens + 1].long()
        if rng.random() < 0.5:
            window[0] = bos
        windows.append(window)
    stack = torch.stack(windows)
    none, count = torch.zeros(rows, 0, 0, dtype=torch.long), rows * tokens
    return Batch(
        ids=stack[:, :-1],
        positions=torch.arange(tokens).expand(rows, tokens),
        lengths=torch.full((rows,), tokens),
        tail_ids=none,
        tail_positions=none,
        select=torch.arange(count),
        targets=stack[:, 1:].reshape(-1),
        weights=torch.ones(count),
        answers=torch.full((count,), -1),
        tasks=torch.zeros(0, dtype=torch.long),
    )


def _pair_row(rng: Random, vocab: int, stage: Stage) -> _Row:
    """Pairs once, then again in random order until the row is full; only repeated values carry loss."""
    row = _Row()
    drawn = rng.sample(range(2 + _NUM_FILLERS, vocab), 2 * _NUM_PAIRS)
    pairs = list(zip(drawn[::2], drawn[1::2], strict=True))
    order = list(range(_NUM_PAIRS))
    for round_number in range(100):
        rng.shuffle(order)
        for index in order:
            key, value = pairs[index]
            gap = rng.randint(max(0, stage.pair_gap - 2), stage.pair_gap)
            piece = [key, *(2 + rng.randrange(_NUM_FILLERS) for _ in range(gap)), value]
            if len(row.ids) + len(piece) > stage.stream_tokens:
                return row
            start = row.append(piece, len(row.ids))
            if round_number:
                row.targets.append(_Target(start + len(piece) - 2, value, 1.0, len(row.tasks)))
                row.tasks.append(0)
    return row


def _text_row(rng: Random, tokenizer: Tokenizer, stage: Stage, style: Style, num_parts: int) -> _Row:
    """BOS and parts, perhaps some exchanges that later ones see, and a tail for every other question."""
    corpus = make_corpus(rng.getrandbits(48), num_parts, held_out=False, style=style)
    parts = encode_parts(tokenizer, list(corpus.parts))
    bos, eos = special_ids(tokenizer)
    spread = rng.random() < stage.spread
    row, position = _Row(), 1
    row.append([bos], 0)
    for index, ids in enumerate(parts):
        if index == 0 or corpus.parts[index - 1].endswith("\n"):  # a text that goes on is not torn apart
            position += _gap(rng, spread)
        start = row.append(ids, position)
        position += len(ids)
        places = (place for place in range(len(ids) - 1) if rng.random() < _PART_SHARE)
        row.targets += [_Target(start + place, ids[place + 1], _PART_WEIGHT, -1) for place in places]
    questions = _choose(rng, corpus, stage)
    asked = encode_parts(tokenizer, [question.text for question in questions])
    answers = encode_parts(tokenizer, [f" {question.answer}" for question in questions])
    exchanges = [[*question, *answer, eos] for question, answer in zip(asked, answers, strict=True)]
    num_inline = rng.randint(1, _MAX_INLINE) if rng.random() < stage.inline else 0
    for number, ids in enumerate(exchanges):
        row.tasks.append(TASKS.index(questions[number].task))
        if number >= num_inline:
            row.tails.append(ids)
            row.tail_starts.append(len(asked[number]))
            continue
        start = row.append(ids, position)
        position += len(ids)
        row.targets += [
            _Target(start + place - 1, ids[place], 1.0, number) for place in range(len(asked[number]), len(ids))
        ]
    return row


def _choose(rng: Random, corpus: Corpus, stage: Stage) -> list[Question]:
    """Questions of the rarer tasks first, up to their share, then single facts, shuffled."""
    rare = [question for question in corpus.questions if question.task != "fact"]
    facts = [question for question in corpus.questions if question.task == "fact"]
    chosen = rare[: int(_RARE_SHARE * stage.step_tails)] + facts
    chosen = chosen[: stage.step_tails]
    rng.shuffle(chosen)
    return chosen


def _gap(rng: Random, spread: bool) -> int:
    return rng.randint(0, rng.choice((20, 150, 800))) if spread else 0


def _stack(rows: Sequence[_Row], max_tails: int) -> Batch:
    tokens = max(len(row.ids) for row in rows)
    num_tails = min(max_tails, max(len(row.tails) for row in rows))
    kept = [row.tails[:num_tails] for row in rows]
    tail_tokens = max((len(tail) for tails in kept for tail in tails), default=0)
    ids = torch.ones(len(rows), tokens, dtype=torch.long)
    positions = torch.zeros(len(rows), tokens, dtype=torch.long)
    tail_ids = torch.ones(len(rows), num_tails, tail_tokens, dtype=torch.long)
    ends = torch.tensor([row.positions[-1] + 1 for row in rows])
    found: list[tuple[int, int, float, int]] = []
    tasks: list[int] = []
    width = tokens + num_tails * tail_tokens
    for index, row in enumerate(rows):
        ids[index, : len(row.ids)] = torch.tensor(row.ids)
        positions[index, : len(row.ids)] = torch.tensor(row.positions)
        base, first = index * width, len(tasks)
        found += [(base + t.place, t.token, t.weight, first + t.answer if t.answer >= 0 else -1) for t in row.targets]
        num_inline = len(row.tasks) - len(row.tails)
        tasks += row.tasks[: num_inline + len(kept[index])]
        for number, tail in enumerate(kept[index]):
            tail_ids[index, number, : len(tail)] = torch.tensor(tail)
            start = base + tokens + number * tail_tokens
            answer = first + num_inline + number
            found += [
                (start + place - 1, tail[place], 1.0, answer) for place in range(row.tail_starts[number], len(tail))
            ]
    select, targets, weights, answers = zip(*found, strict=True)
    return Batch(
        ids,
        positions,
        torch.tensor([len(row.ids) for row in rows]),
        tail_ids,
        (ends[:, None, None] + torch.arange(tail_tokens)).expand_as(tail_ids),
        torch.tensor(select),
        torch.tensor(targets),
        torch.tensor(weights),
        torch.tensor(answers),
        torch.tensor(tasks),
    )
