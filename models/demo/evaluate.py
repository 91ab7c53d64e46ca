"""Measures a checkpoint as it is used: float32 on the stored weights, plain transformers, greedy decoding.

`python -m models.demo.evaluate --documents 1 2 4 --questions 1000 --prose books.jsonl.gz`
"""

from __future__ import annotations

import argparse
import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from tokenizers import Tokenizer
from transformers import LlamaForCausalLM

from .context import Context
from .data import PLAIN_STYLE, Document, Question, Style, make_corpus, make_questions
from .prose import read_prose, split_prose
from .tokenizer import EOS, encode_parts, special_ids

_FOLDER = Path(__file__).parent
_MAX_ANSWER_TOKENS = 16


@dataclass(frozen=True, slots=True)
class Trial:
    """One prompt in parts, every part encoded alone, and the question it ends with."""

    bos: int
    documents: list[list[int]]
    asked: list[int]
    question: Question

    @property
    def ids(self) -> list[int]:
        """The whole prompt."""
        return [self.bos, *(token for document in self.documents for token in document), *self.asked]


@dataclass(frozen=True, slots=True)
class Score:
    """Right answers of a number asked, with the 95 % Wilson interval of the share."""

    right: int
    asked: int

    @property
    def share(self) -> float:
        """Exact match."""
        return self.right / self.asked

    @property
    def interval(self) -> tuple[float, float]:
        """Bounds of the 95 % interval."""
        z, n, p = 1.96, self.asked, self.share
        middle, spread = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        return (middle - spread) / (1 + z * z / n), (middle + spread) / (1 + z * z / n)

    def __str__(self) -> str:
        low, high = self.interval
        return f"{100 * self.share:.1f} % [{100 * low:.1f}, {100 * high:.1f}] of {self.asked}"


def load(folder: Path = _FOLDER) -> tuple[LlamaForCausalLM, Tokenizer]:
    """The model in float32 and its tokenizer."""
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval(), load_tokenizer(folder)


def load_tokenizer(folder: Path = _FOLDER) -> Tokenizer:
    """The checkpoint's tokenizer."""
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


def make_trials(
    tokenizer: Tokenizer,
    seed: int,
    num_documents: int,
    num_questions: int,
    *,
    per_corpus: int = 4,
    style: Style = PLAIN_STYLE,
) -> list[Trial]:
    """Held-out corpora with a few questions on each, until there are `num_questions`."""
    trials: list[Trial] = []
    corpus_seed = seed * 1_000_003
    while len(trials) < num_questions:
        documents = make_corpus(corpus_seed, num_documents, style=style)
        questions = make_questions(corpus_seed, documents, per_corpus)[: num_questions - len(trials)]
        trials += [_trial(tokenizer, documents, question) for question in questions]
        corpus_seed += 1
    return trials


def _trial(tokenizer: Tokenizer, documents: Sequence[Document], question: Question) -> Trial:
    parts = encode_parts(tokenizer, [*(document.text for document in documents), question.text])
    return Trial(special_ids(tokenizer)[0], parts[:-1], parts[-1], question)


@torch.inference_mode()
def answer(model: LlamaForCausalLM, tokenizer: Tokenizer, trials: Sequence[Trial], batch: int = 32) -> list[str]:
    """Greedy answers up to EOS or a newline, in the order of the trials; like lengths share a batch."""
    order = sorted(range(len(trials)), key=lambda index: len(trials[index].ids))
    answers = [""] * len(trials)
    for start in range(0, len(order), batch):
        chosen = order[start : start + batch]
        longest = max(len(trials[index].ids) for index in chosen)
        ids = torch.full((len(chosen), longest), special_ids(tokenizer)[1])
        mask = torch.zeros_like(ids)
        for row, index in enumerate(chosen):
            ids[row, longest - len(trials[index].ids) :] = torch.tensor(trials[index].ids)
            mask[row, longest - len(trials[index].ids) :] = 1
        out = model.generate(ids, attention_mask=mask, max_new_tokens=_MAX_ANSWER_TOKENS, do_sample=False)
        for row, index in enumerate(chosen):
            text = tokenizer.decode(out[row, longest:].tolist(), skip_special_tokens=False)
            answers[index] = text.split(EOS)[0].split("\n")[0].strip()
    return answers


def score(trials: Sequence[Trial], answers: Sequence[str]) -> Score:
    """Counts exact matches."""
    return Score(sum(t.question.answer == a for t, a in zip(trials, answers, strict=True)), len(trials))


@torch.inference_mode()
def score_reused(model: LlamaForCausalLM, tokenizer: Tokenizer, trials: Sequence[Trial], link: int) -> Score:
    """Exact match where each document's KV was computed alone, but for its first `link` tokens.

    The answer is right when each of its tokens, and then EOS, is the likeliest after those before it: then
    greedy decoding gives it.
    """
    right = 0
    for trial in trials:
        context = Context(link=link)
        context.append(0, [trial.bos], 0)
        position = 1
        for part, ids in enumerate(trial.documents, start=1):
            context.append_reused(part, ids, position)
            position += len(ids)
        answer_ids = [*encode_parts(tokenizer, [f" {trial.question.answer}"])[0], special_ids(tokenizer)[1]]
        context.append(len(trial.documents) + 1, [*trial.asked, *answer_ids[:-1]], position)
        seen = context.mask(len(context.ids))[None, None]
        logits = model(
            torch.tensor([context.ids]),
            attention_mask=torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min),
            position_ids=torch.tensor([context.positions]),
        ).logits[0, -len(answer_ids) :]
        right += logits.argmax(-1).tolist() == answer_ids
    return Score(right, len(trials))


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


def _by_form(trials: Sequence[Trial], answers: Sequence[str]) -> dict[str, str]:
    asked = Counter(t.question.form for t in trials)
    right = Counter(t.question.form for t, a in zip(trials, answers, strict=True) if a == t.question.answer)
    return {form: str(Score(right[form], number)) for form, number in sorted(asked.items())}


def main() -> None:
    """Prints one JSON line per measurement."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=_FOLDER)
    parser.add_argument("--documents", type=int, nargs="*", default=[1, 2, 4])
    parser.add_argument("--links", type=int, nargs="*", default=[], help="also with reuse and so many link tokens")
    parser.add_argument("--questions", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prose", type=Path, nargs="*", default=[])
    parser.add_argument("--show", type=int, default=0, help="wrong answers to print per measurement")
    for part in fields(Style):
        parser.add_argument(f"--{part.name.replace('_', '-')}", type=type(part.default), default=part.default)
    options = parser.parse_args()
    style = Style(**{part.name: getattr(options, part.name) for part in fields(Style)})
    torch.set_num_threads(options.threads)
    model, tokenizer = load(options.model)
    for num_documents in options.documents:
        trials = make_trials(tokenizer, options.seed, num_documents, options.questions, style=style)
        answers = answer(model, tokenizer, trials)
        result = {"documents": num_documents, "exact_match": str(score(trials, answers))}
        print(json.dumps(result | _by_form(trials, answers)), flush=True)
        for link in options.links:
            reused = score_reused(model, tokenizer, trials, link)
            print(json.dumps({"documents": num_documents, "link": link, "exact_match": str(reused)}), flush=True)
        wrong = [(t, a) for t, a in zip(trials, answers, strict=True) if a != t.question.answer]
        for trial, given in wrong[: options.show]:
            print(f"  {trial.question.text!r} wanted {trial.question.answer!r} got {given!r}")
    if options.prose:
        held_out = split_prose(read_prose(options.prose)).held_out
        print(json.dumps({"bits_per_byte": round(bits_per_byte(model, tokenizer, held_out), 3)}))


if __name__ == "__main__":
    main()
