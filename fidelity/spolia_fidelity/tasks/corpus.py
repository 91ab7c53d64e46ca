"""Generated texts about invented things, and questions with one right answer each.

A corpus is a list of *parts* of about 128 tokens: what a splitter would have made of a few articles. Four tasks ask
about them:

- `fact`: one fact, stated in one part.
- `cut`: a sentence that begins at the end of one part ("... The mayor of Lemdale") and ends at the start of the next
  ("is Orla Marsh. ...").
- `pronoun`: the last sentence of one part names a thing, the first of the next says something about "it".
- `two_hop`: a fact whose value is what another part is about, and a fact from there; the answer gives both.

Everything is a function of its seed. Where names are held out, training never shows them (names.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from random import Random

from spolia_fidelity.tasks.lexicon import FILLERS, KINDS, FactTemplate, Kind
from spolia_fidelity.tasks.names import make_name, make_value
from spolia_fidelity.tasks.style import PLAIN_STYLE, Style

TASKS = ("fact", "cut", "pronoun", "two_hop")
_BRIDGE_KINDS = {"person": "person", "place": "village"}  # what kind of thing a value may be


@dataclass(frozen=True, slots=True)
class Question:
    """`text` ends with "Answer:"; the model should go on with " " + `answer` and the end of sequence.

    `parts` are the indices of the parts one has to read, in the order of reading.
    """

    text: str
    answer: str
    task: str
    parts: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Corpus:
    """Texts in order, what each is about, and every question on them, in random order.

    Each part is to be encoded alone. A part that goes on in the next one ends without a newline, and the next one
    begins with a space.
    """

    parts: tuple[str, ...]
    subjects: tuple[str, ...]
    questions: tuple[Question, ...]


def make_corpus(seed: int, num_parts: int, *, held_out: bool = True, style: Style = PLAIN_STYLE) -> Corpus:
    """Writes `num_parts` parts; equal arguments give equal texts."""
    return _Writer(Random(f"corpus {seed}"), num_parts, held_out, style).write()


@dataclass(frozen=True, slots=True)
class _Thing:
    kind: Kind
    name: str

    @property
    def entity(self) -> str:
        return self.kind.form.format(n=self.name)


@dataclass(frozen=True, slots=True)
class _Fact:
    template: FactTemplate
    value: str
    target: int | None  # the part that is about the value


@dataclass(frozen=True, slots=True)
class _Crossing:
    """What stands across the border of two parts: the end of one, the start of the next, and its question."""

    head: str
    rest: str
    question: Question


class _Writer:
    def __init__(self, rng: Random, num_parts: int, held_out: bool, style: Style) -> None:
        self._rng, self._held_out, self._style = rng, held_out, style
        self._common = rng.choice(KINDS) if rng.random() < style.same_kind else None
        self._names: set[str] = set()
        self._things = [self._draw_thing() for _ in range(num_parts)]
        self._facts = [self._draw_facts(index) for index in range(num_parts)]

    def write(self) -> Corpus:
        last = len(self._things) - 1
        crossings = [
            self._cross(index) if self._rng.random() < self._style.cuts else None for index in range(max(0, last))
        ]
        parts = [
            self._part(index, crossings[index - 1] if index else None, crossings[index] if index < last else None)
            for index in range(len(self._things))
        ]
        questions = [crossing.question for crossing in crossings if crossing]
        for index in range(len(self._things)):
            questions += self._questions(index)
        self._rng.shuffle(questions)
        return Corpus(tuple(parts), tuple(thing.entity for thing in self._things), tuple(questions))

    def _draw_thing(self) -> _Thing:
        while True:
            kind = self._common or self._rng.choice(KINDS)
            name = make_name(self._rng, kind.name, self._held_out, self._wild())
            if name not in self._names:
                self._names.add(name)
                return _Thing(kind, name)

    def _wild(self) -> bool:
        return self._rng.random() < self._style.wild

    def _draw_facts(self, index: int) -> list[_Fact]:
        count = self._rng.randint(self._style.min_facts, self._style.max_facts)
        return [
            self._draw_fact(index, template) for template in self._rng.sample(self._things[index].kind.facts, count)
        ]

    def _draw_fact(self, index: int, template: FactTemplate) -> _Fact:
        kind = _BRIDGE_KINDS.get(template.value)
        targets = [i for i, thing in enumerate(self._things) if i != index and thing.kind.name == kind]
        if targets and self._rng.random() < self._style.bridges:
            target = self._rng.choice(targets)
            return _Fact(template, self._things[target].name, target)
        return _Fact(template, self._draw_value(template), None)

    def _draw_value(self, template: FactTemplate) -> str:
        while True:
            value = make_value(self._rng, template.value, self._held_out, self._wild())
            if value not in self._names:
                return value

    def _cross(self, index: int) -> _Crossing:
        thing = self._draw_thing()
        template = self._rng.choice(thing.kind.facts)
        value = self._draw_value(template)
        text = self._rng.choice(template.questions).format(e=thing.entity)
        task = self._rng.choice(("cut", "pronoun"))
        question = Question(f"Question: {text}\nAnswer:", value, task, (index, index + 1))
        if task == "pronoun":
            head = self._rng.choice(thing.kind.intros).format(e=thing.entity)
            return _Crossing(head, _sentence(self._rng.choice(template.short), thing, value), question)
        start, between = self._rng.choice(template.named).split("{v}")[0].split("{e}")
        end = f"{between}{value}."
        # The cut falls at a space behind the name and before the value; both sides keep whole words.
        borders = [i for i, letter in enumerate(between) if letter == " "]
        border = self._rng.choice(borders)
        head = f"{start}{thing.entity}{between[:border]}"
        return _Crossing(head[0].upper() + head[1:], end[border + 1 :], question)

    def _part(self, index: int, before: _Crossing | None, after: _Crossing | None) -> str:
        thing = self._things[index]
        stated = [
            _sentence(self._rng.choice(getattr(fact.template, self._form())), thing, fact.value)
            for fact in self._facts[index]
        ]
        body = [self._rng.choice(thing.kind.intros).format(e=thing.entity), *stated]
        around = [before.rest if before else "", after.head if after else ""]
        self._fill(thing.kind, body, self._style.part_words - sum(len(text.split()) for text in around))
        lead = [" " + before.rest] if before else []
        text = " ".join([*lead, *body])
        return f"{text} {after.head}" if after else f"{text}\n"

    def _form(self) -> str:
        draw = self._rng.random()
        if draw < self._style.short:
            return "short"
        return "turned" if draw < self._style.short + self._style.turned else "named"

    def _fill(self, kind: Kind, body: list[str], words: int) -> None:
        """Puts sentences without facts anywhere behind the first one until there are about `words` words."""
        fillers = [*kind.fillers, *FILLERS]
        self._rng.shuffle(fillers)
        while fillers and sum(len(sentence.split()) for sentence in body) < words - 4:
            body.insert(self._rng.randint(1, len(body)), fillers.pop())

    def _questions(self, index: int) -> Iterator[Question]:
        for fact in self._facts[index]:
            text = self._rng.choice(fact.template.questions).format(e=self._things[index].entity)
            yield Question(f"Question: {text}\nAnswer:", fact.value, "fact", (index,))
            if fact.target is not None:
                yield self._two_hop(index, fact, fact.target)

    def _two_hop(self, index: int, first: _Fact, target: int) -> Question:
        second = self._rng.choice(self._facts[target])
        asked = self._rng.choice(first.template.questions).format(e=self._things[index].entity)
        text = f"{asked.removesuffix('?')}, and {second.template.clause}?"
        answer = f"{first.value}, {second.value}"
        return Question(f"Question: {text}\nAnswer:", answer, "two_hop", (index, target))


def _sentence(pattern: str, thing: _Thing, value: str) -> str:
    text = pattern.format(e=thing.entity, v=value)
    return text[0].upper() + text[1:]
