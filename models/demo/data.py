"""Generated documents about invented things, and questions on them with one right answer each.

Everything is a function of its seed. Names are pairs of pieces; one pair in eight is *held out*: training
never shows it, and corpora for evaluation and demonstration use no other.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from . import lexicon
from .lexicon import KINDS, FactTemplate, Kind, words

_HELD_OUT_SHARE = 8
_PIECES: dict[str, tuple[Sequence[str], Sequence[str], str]] = {
    "village": (lexicon.PLACE_HEADS, lexicon.PLACE_TAILS, ""),
    "place": (lexicon.PLACE_HEADS, lexicon.PLACE_TAILS, ""),
    "school": (lexicon.PLACE_HEADS, lexicon.PLACE_TAILS, ""),
    "ship": (lexicon.PLACE_HEADS, lexicon.SHIP_TAILS, ""),
    "castle": (lexicon.PLACE_HEADS, lexicon.CASTLE_TAILS, ""),
    "inn": (lexicon.INN_ADJECTIVES, lexicon.INN_NOUNS, " "),
    "person": (lexicon.FIRST_NAMES, lexicon.LAST_NAMES, " "),
}
_VALUES: dict[str, Sequence[str]] = {
    "goods": lexicon.GOODS,
    "year": lexicon.YEARS,
    "month": lexicon.MONTHS,
    "colour": lexicon.COLOURS,
    "animal": lexicon.ANIMALS,
    "stone": lexicon.STONES,
    "profession": lexicon.PROFESSIONS,
    "subject": lexicon.SUBJECTS,
}
_WILD_ONSETS = words("b bl c ch d dr f fl g gl h j k l m n p pr qu r s sh sl t v w y z")
_WILD_RIMES = words("a ai ane ash e ea eck em i ia ick ine o oan ock oss u ub uff umb y ystra")


@dataclass(frozen=True, slots=True)
class Style:
    """How documents are written.

    Facts per document lie in [min_facts, max_facts]. The rates are probabilities per sentence (`short`:
    pronoun in place of the name, `turned`: value before the name, `filler`: a sentence without a fact
    follows), per name (`wild`: built from rare syllables rather than the usual pieces), and per corpus
    (`same_kind`: all documents are about one kind of thing, so that only the name tells their facts apart).
    """

    min_facts: int = 3
    max_facts: int = 5
    short: float = 0.4
    turned: float = 0.0
    filler: float = 0.2
    wild: float = 0.0
    same_kind: float = 0.5


PLAIN_STYLE = Style()


@dataclass(frozen=True, slots=True)
class Fact:
    """One statement of a document; `sentence` is its place among the sentences, the intro being 0."""

    template: FactTemplate
    value: str
    sentence: int
    form: str  # "named", "short" or "turned"


@dataclass(frozen=True, slots=True)
class Document:
    """A text that ends with a newline, so that its tokens do not depend on what follows."""

    text: str
    entity: str
    kind: str
    facts: tuple[Fact, ...]


@dataclass(frozen=True, slots=True)
class Question:
    """`text` ends with "Answer:"; the model should go on with " " + `answer` and the end of sequence."""

    text: str
    answer: str
    document: int
    form: str


def is_held_out(name: str) -> bool:
    """Tells whether training may never show this pair of name pieces."""
    return zlib.crc32(name.encode()) % _HELD_OUT_SHARE == 0


def make_name(rng: Random, pool: str, held_out: bool, wild: bool = False) -> str:
    """Draws a name from one side of the held-out split; `wild` names are made of syllables in no list."""
    if wild:
        words = 2 if pool in ("inn", "person") else 1
        return " ".join(_wild_word(rng) for _ in range(words))
    heads, tails, joint = _PIECES[pool]
    while True:
        name = rng.choice(heads) + joint + rng.choice(tails)
        if is_held_out(name) == held_out:
            return name


def make_corpus(seed: int, num_documents: int, *, held_out: bool = True, style: Style = PLAIN_STYLE) -> list[Document]:
    """Writes documents about distinct things; with the same arguments always the same ones."""
    rng = Random(f"corpus {seed}")
    common = rng.choice(KINDS) if rng.random() < style.same_kind else None
    documents: list[Document] = []
    names: set[str] = set()
    while len(documents) < num_documents:
        kind = common or rng.choice(KINDS)
        name = make_name(rng, kind.name, held_out, rng.random() < style.wild)
        if name not in names:
            names.add(name)
            documents.append(_make_document(rng, kind, name, held_out, style))
    return documents


def make_questions(seed: int, documents: Sequence[Document], num_questions: int | None = None) -> list[Question]:
    """Asks for facts of the documents in random order, each fact at most once; None asks for every fact."""
    rng = Random(f"questions {seed}")
    asked = [(index, fact) for index, document in enumerate(documents) for fact in document.facts]
    rng.shuffle(asked)
    questions = []
    for index, fact in asked[:num_questions]:
        text = rng.choice(fact.template.questions).format(e=documents[index].entity)
        questions.append(Question(f"Question: {text}\nAnswer:", fact.value, index, fact.form))
    return questions


def _make_document(rng: Random, kind: Kind, name: str, held_out: bool, style: Style) -> Document:
    entity = kind.form.format(n=name)
    sentences = [rng.choice(kind.intros).format(e=entity)]
    facts = []
    for template in rng.sample(kind.facts, rng.randint(style.min_facts, style.max_facts)):
        value = _make_value(rng, template.value, held_out, style)
        form = _draw_form(rng, style)
        sentence = rng.choice(getattr(template, form)).format(e=entity, v=value)
        facts.append(Fact(template, value, len(sentences), form))
        sentences.append(sentence[0].upper() + sentence[1:])
        if rng.random() < style.filler:
            sentences.append(rng.choice(kind.fillers))
    return Document(" ".join(sentences) + "\n", entity, kind.name, tuple(facts))


def _draw_form(rng: Random, style: Style) -> str:
    draw = rng.random()
    if draw < style.short:
        return "short"
    return "turned" if draw < style.short + style.turned else "named"


def _make_value(rng: Random, value: str, held_out: bool, style: Style) -> str:
    if value in _VALUES:
        return rng.choice(_VALUES[value])
    return make_name(rng, value, held_out, rng.random() < style.wild)


def _wild_word(rng: Random) -> str:
    return "".join(rng.choice(_WILD_ONSETS) + rng.choice(_WILD_RIMES) for _ in range(rng.randint(2, 3))).capitalize()
