"""Measures a checkpoint with full recompute: float32 on the stored weights, plain transformers, greedy decoding.

`python -m models.demo.evaluate --parts 8 16 --corpora 200 --prose books.jsonl.gz`

What reuse costs on top is measured by `spolia eval`.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import LlamaForCausalLM

from spolia_fidelity.bootstrap import design_effect, wilson
from spolia_fidelity.tasks import PLAIN_STYLE, TASKS, Corpus, Question, Style, make_corpus

from .prose import read_prose, split_prose
from .tokenizer import encode_parts, special_ids

_FOLDER = Path(__file__).parent


@dataclass(frozen=True, slots=True)
class Score:
    """Right answers of a number asked, with the 95 % Wilson interval of the share.

    Questions on one corpus err together: `effect` is by how much that widens the variance (bootstrap.py).
    """

    right: int
    asked: int
    effect: float = 1.0

    @property
    def share(self) -> float:
        """Exact match."""
        return self.right / self.asked

    def __str__(self) -> str:
        found = wilson(self.right, self.asked, design_effect=self.effect)
        return f"{100 * found.value:.1f} % [{100 * found.low:.1f}, {100 * found.high:.1f}] of {self.asked}"


def load(folder: Path = _FOLDER) -> tuple[LlamaForCausalLM, Tokenizer]:
    """The model in float32 and its tokenizer."""
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval(), load_tokenizer(folder)


def load_tokenizer(folder: Path = _FOLDER) -> Tokenizer:
    """The checkpoint's tokenizer."""
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


def make_corpora(
    seed: int, num_corpora: int, num_parts: int, *, style: Style = PLAIN_STYLE, held_out: bool = True
) -> Iterator[Corpus]:
    """Corpora on names that training never showed, unless `held_out` is False."""
    for index in range(num_corpora):
        yield make_corpus(seed * 1_000_003 + index, num_parts, style=style, held_out=held_out)


@torch.inference_mode()
def right_answers(
    model: LlamaForCausalLM, tokenizer: Tokenizer, corpus: Corpus, questions: Sequence[Question]
) -> list[bool]:
    """Whether greedy decoding gives each question's answer and then EOS; questions do not see each other.

    An answer is right when each of its tokens, and EOS, is the likeliest after those before it: then, and only then,
    greedy decoding gives it. The corpus is read once for all questions.
    """
    bos, eos = special_ids(tokenizer)
    context = [bos, *(token for part in encode_parts(tokenizer, list(corpus.parts)) for token in part)]
    asked = encode_parts(tokenizer, [question.text for question in questions])
    answers = [[*ids, eos] for ids in encode_parts(tokenizer, [f" {question.answer}" for question in questions])]
    tails = [[*ask, *answer[:-1]] for ask, answer in zip(asked, answers, strict=True)]
    cache = model.model(torch.tensor([context]), use_cache=True).past_key_values
    # All behind one copy of the context: a row of each question would read a copy of its own.
    asker = torch.tensor([row for row, tail in enumerate(tails) for _ in tail])
    own_and_before = (asker[:, None] == asker).tril()
    sees = torch.cat([torch.ones(len(asker), len(context), dtype=torch.bool), own_and_before], 1)
    positions = [len(context) + index for tail in tails for index in range(len(tail))]
    likeliest: Tensor = (
        model(
            torch.tensor([[token for tail in tails for token in tail]]),
            past_key_values=cache,
            position_ids=torch.tensor([positions]),
            attention_mask=torch.zeros(sees.shape).masked_fill(~sees, -torch.inf)[None, None],
        )
        .logits[0]
        .argmax(-1)
    )
    said = [likeliest[asker == row].tolist() for row in range(len(tails))]
    return [row[len(ask) - 1 :] == answer for row, ask, answer in zip(said, asked, answers, strict=True)]


def score_tasks(model: LlamaForCausalLM, tokenizer: Tokenizer, corpora: Iterator[Corpus]) -> dict[str, Score]:
    """Exact match per task, over every question on the corpora."""
    right: dict[str, list[bool]] = {task: [] for task in TASKS}
    clusters: dict[str, list[str]] = {task: [] for task in TASKS}
    for number, corpus in enumerate(corpora):
        found = right_answers(model, tokenizer, corpus, corpus.questions)
        for question, is_right in zip(corpus.questions, found, strict=True):
            right[question.task].append(is_right)
            clusters[question.task].append(str(number))
    return {
        task: Score(sum(right[task]), len(right[task]), design_effect(right[task], clusters[task]))
        for task in TASKS
        if right[task]
    }


@torch.inference_mode()
def bits_per_byte(model: LlamaForCausalLM, tokenizer: Tokenizer, texts: Sequence[str], windows: int = 200) -> float:
    """Bits per byte of UTF-8 over evenly spaced windows of at most 1,000 characters, each behind a BOS."""
    joined = [text[start : start + 1000] for text in texts for start in range(0, max(1, len(text) - 1000), 1000)]
    chosen = joined[:: max(1, len(joined) // windows)]
    nats, num_bytes = 0.0, 0
    for text in chosen:
        ids = torch.tensor([[special_ids(tokenizer)[0], *tokenizer.encode(text, add_special_tokens=False).ids]])
        logits = model(ids).logits[0, :-1]
        nats += torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum").item()
        num_bytes += len(text.encode())
    return nats / math.log(2) / num_bytes


def main() -> None:
    """Prints one JSON line per measurement."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=_FOLDER)
    parser.add_argument("--parts", type=int, nargs="*", default=[8])
    parser.add_argument("--corpora", type=int, default=200, help="number of corpora, all questions asked on each")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prose", type=Path, nargs="*", default=[])
    for part in fields(Style):
        parser.add_argument(f"--{part.name.replace('_', '-')}", type=type(part.default), default=part.default)
    options = parser.parse_args()
    style = Style(**{part.name: getattr(options, part.name) for part in fields(Style)})
    torch.set_num_threads(options.threads)
    model, tokenizer = load(options.model)
    for num_parts in options.parts:
        scores = score_tasks(model, tokenizer, make_corpora(options.seed, options.corpora, num_parts, style=style))
        print(json.dumps({"parts": num_parts} | {task: str(score) for task, score in scores.items()}), flush=True)
    if options.prose:
        held_out = split_prose(read_prose(options.prose)).held_out
        print(json.dumps({"bits_per_byte": round(bits_per_byte(model, tokenizer, held_out), 3)}))


if __name__ == "__main__":
    main()
