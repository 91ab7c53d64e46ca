"""Layouts without passages: key-value retrieval (Lost in the Middle) and bAbI stories."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

from spolia_core.errors import InvalidRequest
from spolia_fidelity.inputs.draft import Draft, DraftQuestion, Drafts, ask, get, pair
from spolia_fidelity.inputs.options import InputOptions
from spolia_fidelity.inputs.reading import Record


def kv_retrieval(task: str, records: Sequence[Record], options: InputOptions) -> Drafts:
    """`{ordered_kv_records: [[key, value]], key, value}`: chunks of `pairs_per_chunk` lines, one question a record."""

    def draft(record: Record, index: int) -> Iterator[Draft]:
        where = f"record {index}"
        pairs = [pair(item, where) for item in get(record, "ordered_kv_records", list, where)]
        lines = [f'"{key}": "{value}"\n' for key, value in pairs]
        text = f'Key: "{get(record, "key", str, where)}"\nCorresponding value:'
        question = DraftQuestion(task, text, get(record, "value", str, where))
        yield Draft(f"{task}/{index}", _grouped(lines, options.pairs_per_chunk), (question,))

    units = tuple(partial(draft, record, index) for index, record in enumerate(records))
    return Drafts("kv-retrieval", len(records), units)


def babi(task: str, records: Sequence[Record], options: InputOptions) -> Drafts:
    """`{file, text}`: chunks of `sentences_per_chunk` sentences of a story; a task, "babi/qa1", for each of bAbI's.

    A question sees the sentences before it, so a story has a context for each point at which it asks; they are one
    cluster. Chunks are grouped from the story's start, so its contexts share them. Contexts of a single chunk, in which
    nothing can be put together, are left out and counted.
    """
    stories = [
        (f"{task}/{name}/{number}", f"{task}/{name.partition('_')[0]}", story)
        for record in records
        for name in [get(record, "file", str, "record").removesuffix(".txt")]
        for number, story in enumerate(_stories(get(record, "text", str, name), name))
    ]

    def states(cluster: str, subtask: str, story: list[list[str]]) -> Iterator[Draft]:
        asked: dict[int, list[DraftQuestion]] = {}
        sentences: list[str] = []
        for fields in story:
            if len(fields) == 1:
                sentences.append(f"{fields[0].strip()}\n")
            else:
                asked.setdefault(len(sentences), []).append(DraftQuestion(subtask, ask(fields[0]), fields[1].strip()))
        for count, questions in asked.items():
            if count > options.sentences_per_chunk:
                chunks = _grouped(sentences[:count], options.sentences_per_chunk)
                yield Draft(f"{cluster}@{count}", chunks, tuple(questions), cluster)

    positions = [position for *_, story in stories for position in _positions(story)]
    num_early = sum(position <= options.sentences_per_chunk for position in positions)
    notes = (f"{num_early} of {len(positions)} questions left out: asked before there is a second chunk.",)
    units = tuple(partial(states, *story) for story in stories)
    return Drafts("babi", len(positions), units, notes if num_early else ())


def _positions(story: list[list[str]]) -> Iterator[int]:
    """How many sentences stand before each question of a story."""
    num_sentences = 0
    for fields in story:
        if len(fields) == 1:
            num_sentences += 1
        else:
            yield num_sentences


def _stories(text: str, name: str) -> list[list[list[str]]]:
    """Lines of each story, their number taken off, split at tabs: [sentence] or [question, answer, support]."""
    stories: list[list[list[str]]] = []
    for place, line in enumerate(text.removesuffix("\n").split("\n"), 1):
        number, _, rest = line.partition(" ")
        if not number.isdigit() or not rest or (number != "1" and not stories):
            raise InvalidRequest(
                f"{name}, line {place}: not a numbered line of a story",
                field="text",
                limit="1 sentence …",
                actual=line[:40],
            )
        if number == "1":
            stories.append([])
        stories[-1].append(rest.rstrip("\r").split("\t"))
    return stories


def _grouped(lines: Sequence[str], size: int) -> tuple[str, ...]:
    return tuple("".join(lines[start : start + size]) for start in range(0, len(lines), size))
