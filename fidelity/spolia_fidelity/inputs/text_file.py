"""Any text as cases: contexts of equal chunks, and what the text goes on with as the scored tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise
from random import Random

from spolia_core.errors import InvalidRequest
from spolia_fidelity.case import Case, Question
from spolia_fidelity.case_set import CaseSet, describe
from spolia_fidelity.encoder import TextEncoder
from spolia_fidelity.inputs.options import InputOptions

CHARACTERS_PER_TOKEN = 8
"""More than any tokenizer in use makes of prose, so that a section holds at least one context."""


def text_cases(name: str, task: str, texts: Sequence[str], encoder: TextEncoder, options: InputOptions) -> CaseSet:
    """Cuts `texts` into contexts of `text_chunks` × `text_chunk_tokens` tokens, each with its continuation.

    Texts are encoded in sections (cut at white space) that give one or more contexts each; what is left of a section
    is not used. With `max_cases`, sections are drawn in random order, so contexts come from all over the texts and
    nothing else is encoded. Chunks of one context follow each other in the text. Raises `InvalidRequest` where a
    context would not fit the model, or no section is long enough for one.
    """
    num_tokens = options.text_chunks * options.text_chunk_tokens + options.text_scored_tokens
    if len(encoder.bos_ids) + num_tokens > options.max_context_tokens:
        raise InvalidRequest(
            f"{name}: {options.text_chunks} chunks of {options.text_chunk_tokens} tokens and "
            f"{options.text_scored_tokens} behind them exceed a context of {options.max_context_tokens} tokens; "
            "lower --chunks or --chunk-tokens",
            field="chunks",
            limit=f"{options.max_context_tokens} tokens",
            actual=f"{len(encoder.bos_ids) + num_tokens} tokens",
        )
    sections = [section for text in texts for section in _sections(text, num_tokens * CHARACTERS_PER_TOKEN)]
    if options.max_cases is not None:
        Random(f"sections {options.seed}").shuffle(sections)
    cases: list[Case] = []
    for index, section in enumerate(sections):
        ids = encoder.encode(section)
        for start in range(0, len(ids) - num_tokens + 1, num_tokens):
            cases.append(_case(f"{task}/{index}.{start}", task, ids[start : start + num_tokens], encoder, options))
        if options.max_cases is not None and len(cases) >= options.max_cases:
            break
    if not cases:
        raise InvalidRequest(
            f"{name}: no {num_tokens} tokens in a row", field="input", limit=f"≥ {num_tokens} tokens", actual="fewer"
        )
    notes = [
        f"{options.text_chunks} chunks of {options.text_chunk_tokens} tokens, then {options.text_scored_tokens} tokens "
        "of the same text: the first is the live question, the others are scored.",
        "Intervals hold for other places in these texts, not for other texts.",
    ]
    kept = cases[: options.max_cases]
    if len(kept) == options.max_cases:
        notes.append(f"Stopped at {len(kept)} contexts, drawn at random (seed {options.seed}).")
    return describe(name, "text", kept, num_records=len(kept), notes=notes)


def _case(name: str, task: str, ids: tuple[int, ...], encoder: TextEncoder, options: InputOptions) -> Case:
    cuts = [0, *accumulate([options.text_chunk_tokens] * options.text_chunks)]
    chunks = tuple(ids[start:end] for start, end in pairwise(cuts))
    rest = ids[cuts[-1] :]
    return Case(name, encoder.bos_ids, chunks, (Question(task, rest[:1], rest[1:], exact=False),))


def _sections(text: str, size: int) -> Iterator[str]:
    """Consecutive parts of about `size` characters that together are `text`; each ends before white space."""
    start = 0
    while len(text) - start > size:
        end = next((i for i in range(start + size, start, -1) if text[i].isspace()), start + size)
        yield text[start:end]
        start = end
    yield text[start:]
