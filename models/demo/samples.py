"""Writes `demo.json`, what `spolia demo` asks this model about: `python -m models.demo.samples --seed 6`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from .data import make_corpus, make_questions

_FOLDER = Path(__file__).parent
NUM_DOCUMENTS = 4
NUM_QUESTIONS = 6


def samples(seed: int) -> dict[str, list[dict[str, Any]]]:
    """Documents on held-out names and questions on them; answers are there to be checked, not to be shown the model."""
    documents = make_corpus(seed, NUM_DOCUMENTS)
    questions = make_questions(seed, documents, NUM_QUESTIONS)
    return {
        "documents": [{"name": document.entity, "text": document.text} for document in documents],
        "questions": [{"question": question.text, "answer": question.answer} for question in questions],
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=6, help="seed of the documents and questions")
    text = json.dumps(samples(parser.parse_args().seed), indent=2, ensure_ascii=False) + "\n"
    (_FOLDER / "demo.json").write_text(text, encoding="utf-8")
