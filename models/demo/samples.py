"""Writes `demo.json`, what `spolia demo` asks this model about: `python -m models.demo.samples --seed 10`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from spolia_fidelity.tasks import Style, make_corpus

_FOLDER = Path(__file__).parent
NUM_DOCUMENTS = 4
NUM_QUESTIONS = 6
# Documents that stand alone, since the demo shows them in another order too.
_STYLE = Style(cuts=0.0, same_kind=0.0)


def samples(seed: int) -> dict[str, list[dict[str, Any]]]:
    """Documents on held-out names and questions on them; answers are there to be checked, not to be shown the model."""
    corpus = make_corpus(seed, NUM_DOCUMENTS, style=_STYLE)
    documents = zip(corpus.subjects, corpus.parts, strict=True)
    questions = corpus.questions[:NUM_QUESTIONS]
    return {
        "documents": [{"name": subject, "text": text} for subject, text in documents],
        "questions": [{"question": question.text, "answer": question.answer} for question in questions],
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=10, help="seed of the documents and questions")
    text = json.dumps(samples(parser.parse_args().seed), indent=2, ensure_ascii=False) + "\n"
    (_FOLDER / "demo.json").write_text(text, encoding="utf-8")
