"""Training batches, a function of (seed, stage, step): a resumed run sees what an unbroken one would."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random

import torch
from tokenizers import Tokenizer
from torch import Tensor

from .context import Context, Role
from .data import PLAIN_STYLE, Style, make_corpus, make_questions
from .tokenizer import encode_parts, special_ids

_PREAMBLE = 0  # the part number of BOS; documents count from 1, exchanges follow
_NUM_PAIRS = 8
_NUM_FILLERS = 64
_LINK = 16
_DOCUMENT_SHARE = 0.8  # of a sequence; the rest is for exchanges


@dataclass(frozen=True, slots=True)
class Stage:
    """One step of the curriculum, left when `pass_at` of the answers are right on average over recent steps.

    With `pair_gap` >= 0 sequences are key-value pairs of random tokens with up to that many fillers between
    key and value, otherwise documents and questions. `tokens` is the length of a sequence, `rows` their
    number. Shares of the sequences: in `blocks` documents do not see each other, or with their first 16
    tokens only; in `alone` exchanges do not see each other; in `spread` there are gaps in the positions. The
    learning rate goes from `rate` to `last_rate` times the run's over `max_steps`.
    """

    name: str
    rows: int
    tokens: int
    pass_at: float
    pair_gap: int = -1
    min_documents: int = 1
    max_documents: int = 4
    style: Style = PLAIN_STYLE
    blocks: float = 0.0
    alone: float = 0.3
    spread: float = 0.0
    prose_rows: int = 0
    document_weight: float = 0.1
    max_steps: int = 100_000
    rate: float = 1.0
    last_rate: float = 1.0


@dataclass(frozen=True, slots=True)
class Batch:
    """Tensors of one step: what `Network.forward` takes, and a target and its weight per selected place.

    `answers` numbers the answer a target belongs to, -1 for plain text.
    """

    ids: Tensor
    positions: Tensor
    mask: Tensor
    select: Tensor
    targets: Tensor
    weights: Tensor
    answers: Tensor


@dataclass(slots=True)
class _Row:
    """One sequence and its targets: place, target, weight, and answer number in this row or -1."""

    context: Context = field(default_factory=Context)
    targets: list[tuple[int, int, float, int]] = field(default_factory=list)


def make_batch(tokenizer: Tokenizer, stage: Stage, seed: int, step: int) -> Batch:
    """Builds the batch of one step of a stage."""
    rng = Random(f"{seed} {stage.name} {step}")
    if stage.pair_gap >= 0:
        rows = [_pair_row(rng, tokenizer.get_vocab_size(), stage) for _ in range(stage.rows)]
        causal = torch.ones(stage.tokens, stage.tokens, dtype=torch.bool).tril()
        return _stack(rows, stage.tokens, causal[None])
    rows = [_text_row(rng, tokenizer, stage) for _ in range(stage.rows)]
    return _stack(rows, stage.tokens, torch.stack([row.context.mask(stage.tokens) for row in rows]))


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
    count = rows * tokens
    return Batch(
        ids=stack[:, :-1],
        positions=torch.arange(tokens).expand(rows, tokens),
        mask=torch.ones(1, tokens, tokens, dtype=torch.bool).tril(),
        select=torch.arange(count),
        targets=stack[:, 1:].reshape(-1),
        weights=torch.ones(count),
        answers=torch.full((count,), -1),
    )


def _pair_row(rng: Random, vocab: int, stage: Stage) -> _Row:
    """Pairs once, then again in random order until the row is full; only repeated values carry loss."""
    row = _Row()
    drawn = rng.sample(range(2 + _NUM_FILLERS, vocab), 2 * _NUM_PAIRS)
    pairs = list(zip(drawn[::2], drawn[1::2], strict=True))
    order = list(range(_NUM_PAIRS))
    answer = 0
    for round_number in range(100):
        rng.shuffle(order)
        for index in order:
            key, value = pairs[index]
            gap = rng.randint(max(0, stage.pair_gap - 2), stage.pair_gap)
            piece = [key, *(2 + rng.randrange(_NUM_FILLERS) for _ in range(gap)), value]
            if len(row.context.ids) + len(piece) > stage.tokens:
                return row
            start = row.context.append(_PREAMBLE, piece, len(row.context.ids))
            if round_number:
                row.targets.append((start + len(piece) - 2, value, 1.0, answer))
                answer += 1
    return row


def _text_row(rng: Random, tokenizer: Tokenizer, stage: Stage) -> _Row:
    """BOS, documents, and as many exchanges as fit."""
    drawn = rng.randint(stage.min_documents, stage.max_documents)
    documents = make_corpus(rng.getrandbits(48), drawn, held_out=False, style=stage.style)
    encoded = encode_parts(tokenizer, [document.text for document in documents])
    while sum(len(ids) + _LINK for ids in encoded) > _DOCUMENT_SHARE * stage.tokens:
        encoded.pop()
    num_documents = len(encoded)
    questions = make_questions(rng.getrandbits(48), documents[:num_documents])
    asked = encode_parts(tokenizer, [question.text for question in questions])
    answers = encode_parts(tokenizer, [f" {question.answer}" for question in questions])
    bos, eos = special_ids(tokenizer)
    spread, alone = rng.random() < stage.spread, rng.random() < stage.alone
    reused = rng.random() < stage.blocks
    row = _Row(Context(link=rng.choice((0, _LINK, _LINK))))
    row.context.append(_PREAMBLE, [bos], 0)
    position = 1
    for part, ids in enumerate(encoded, start=1):
        position += _gap(rng, spread)
        start = (row.context.append_reused if reused else row.context.append)(part, ids, position)
        position += len(ids)
        places = [place for place in range(len(ids) - 1) if rng.random() < 0.5]
        row.targets += [(start + place, ids[place + 1], stage.document_weight, -1) for place in places]
    for number, (question_ids, answer_ids) in enumerate(zip(asked, answers, strict=True)):
        ids = [*question_ids, *answer_ids, eos]
        if len(row.context.ids) + len(ids) > stage.tokens:
            break
        part, role = num_documents + 1 + number, Role.APART if alone else Role.LIVE
        start = row.context.append(part, ids, position + _gap(rng, spread), role)
        position += 0 if alone else len(ids)
        row.targets += [(start + place - 1, ids[place], 1.0, number) for place in range(len(question_ids), len(ids))]
    return row


def _gap(rng: Random, spread: bool) -> int:
    return rng.randint(0, rng.choice((20, 150, 800))) if spread else 0


def _stack(rows: Sequence[_Row], tokens: int, mask: Tensor) -> Batch:
    ids = torch.ones(len(rows), tokens, dtype=torch.long)
    positions = torch.zeros(len(rows), tokens, dtype=torch.long)
    select, targets, weights, answers = [], [], [], []
    first_answer = 0
    for index, row in enumerate(rows):
        length = len(row.context.ids)
        ids[index, :length] = torch.tensor(row.context.ids)
        positions[index, :length] = torch.tensor(row.context.positions)
        last = -1
        for place, target, weight, answer in row.targets:
            select.append(index * tokens + place)
            targets.append(target)
            weights.append(weight)
            answers.append(first_answer + answer if answer >= 0 else -1)
            last = max(last, answer)
        first_answer += last + 1
    return Batch(
        ids,
        positions,
        mask,
        torch.tensor(select),
        torch.tensor(targets),
        torch.tensor(weights),
        torch.tensor(answers),
    )
