"""How documents are cut into chunks: the choice that a request makes, or a server for those that make none."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

from spolia_core.errors import InvalidRequest

MIN_SPLIT_TOKENS = 32
"""With 16 link tokens and 16 behind them, the shortest chunk that linking still reuses by default."""
MAX_SPLIT_TOKENS = 1 << 16
DEFAULT_SPLIT_TOKENS = 512


class Splitter(IntEnum):
    """Where a document may be cut. Values equal the protos' enum numbers."""

    DOCUMENT = 1
    """Nowhere: one chunk, however long."""
    PARAGRAPH = 2
    """At blank lines; a paragraph over the limit is packed by sentences."""
    SENTENCE = 3
    """At ends of sentences, packed up to the limit; finds its old cuts again behind an edit."""
    FIXED = 4
    """Every so many tokens; an edit loses all behind it."""


@dataclass(frozen=True, slots=True)
class Splitting:
    """A splitter and the most tokens of its chunks; `DOCUMENT` takes no notice of the limit."""

    splitter: Splitter = Splitter.DOCUMENT
    max_tokens: int = DEFAULT_SPLIT_TOKENS

    def __post_init__(self) -> None:
        if not MIN_SPLIT_TOKENS <= self.max_tokens <= MAX_SPLIT_TOKENS:
            limit = f"{MIN_SPLIT_TOKENS} … {MAX_SPLIT_TOKENS}"
            raise InvalidRequest(
                f"splitting.max_tokens must be {limit}, got {self.max_tokens}",
                field="splitting.max_tokens",
                limit=limit,
                actual=str(self.max_tokens),
            )
