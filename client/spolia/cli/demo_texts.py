"""What the demo asks about: the model's own samples where it brings some, else a few documents of ours."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from spolia.errors import InvalidRequest
from spolia.parts import Document

SAMPLES_FILE = "demo.json"
"""In a model's directory: {"documents": [{"name", "text"}], "questions": [{"question", "answer"}]}."""


@dataclass(frozen=True, slots=True)
class Question:
    """A question as the model is asked it, and the answer the documents hold; empty where nobody checks."""

    text: str
    answer: str = ""


@dataclass(frozen=True, slots=True)
class Samples:
    """Documents and questions about them."""

    documents: tuple[Document, ...]
    questions: tuple[Question, ...]


def load_samples(model: Path) -> Samples:
    """The samples for a model. Raises `InvalidRequest` for a samples file that cannot be read."""
    path = model / SAMPLES_FILE
    if not path.is_file():
        return BUILT_IN
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        documents = tuple(Document(d["text"], name=d["name"]) for d in found["documents"])
        questions = tuple(Question(q["question"], q["answer"]) for q in found["questions"])
    except (ValueError, KeyError, TypeError) as error:
        raise InvalidRequest(f"{path} cannot be read: {error!r}", field="model") from error
    return Samples(documents, questions)


BUILT_IN = Samples(
    (
        Document(
            "The lighthouse of Orrin stands on a rock two miles from the shore. It was built of grey stone in nine "
            "years. Its keeper, Marta Voss, climbs the stairs twice a day and writes down every ship that passes.\n",
            name="lighthouse",
        ),
        Document(
            "The library of Tellow lends seeds as well as books. Whoever takes a packet in spring brings two back in "
            "autumn. The librarian, Jonas Field, keeps the rarest beans in a drawer under the stairs.\n",
            name="library",
        ),
        Document(
            "The railway to Hask climbs through eleven tunnels. In winter a plough with red lamps goes before the "
            "first train. The driver of the plough is called Edda Brandt, and she has never been late.\n",
            name="railway",
        ),
        Document(
            "The market of Lume opens before sunrise. Fish is sold on the north side, wool on the south side, and in "
            "between an old man named Pell repairs clocks for whatever people care to give him.\n",
            name="market",
        ),
    ),
    (
        Question("Question: Who keeps the lighthouse of Orrin?\nAnswer:"),
        Question("Question: Who drives the plough of the railway?\nAnswer:"),
        Question("Question: What does the library of Tellow lend?\nAnswer:"),
    ),
)
