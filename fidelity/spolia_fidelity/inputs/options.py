"""How a file becomes cases."""

from __future__ import annotations

from dataclasses import dataclass, fields

from spolia_core.errors import InvalidRequest


@dataclass(frozen=True, slots=True)
class InputOptions:
    """Limits and sizes; one set for every layout, each of which reads what concerns it."""

    max_context_tokens: int
    """The model's context. A case that does not fit with its longest question is left out and counted, never cut."""
    seed: int = 0
    """Fixes which records are drawn, which are put together, and their order."""
    max_cases: int | None = None
    """Cases wanted, drawn at random; None: all that the file gives."""
    max_chunk_tokens: int | None = None
    """Passages are cut to this many tokens, and the cuts counted; None: passages stay whole."""
    num_passages: int = 10
    """Passages of one context, where the file has one passage a record (the others are its distractors)."""
    sentences_per_chunk: int = 5
    """Of a story (bAbI)."""
    pairs_per_chunk: int = 15
    """Of a key-value list."""
    text_chunks: int = 8
    """Chunks of a context cut from plain text."""
    text_chunk_tokens: int = 128
    """Tokens of each of those."""
    text_scored_tokens: int = 65
    """Tokens of a text's continuation: the first is the live question, the others are scored."""

    def __post_init__(self) -> None:
        """Raises `InvalidRequest`, by name, for a size that makes no case."""
        least = {"seed": 0, "text_scored_tokens": 2}
        for field in fields(self):
            value = getattr(self, field.name)
            limit = least.get(field.name, 1)
            if value is not None and value < limit:
                raise InvalidRequest(
                    f"{field.name} is {value}", field=field.name, limit=f"≥ {limit}", actual=str(value)
                )
