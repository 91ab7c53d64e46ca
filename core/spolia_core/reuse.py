"""What was reused and what was not: the vocabulary of reuse reports. Values equal the protos' enum numbers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import IntEnum


class ReuseMode(IntEnum):
    """How much a request may give up for speed."""

    EXACT = 1
    """The answer equals full recompute."""
    LINKED = 2
    """Documents are reused wherever they stand; approximate (EPIC)."""


class ChunkKind(IntEnum):
    """The three kinds of chunk; they never share an id."""

    LOCAL = 1
    """Computed alone at positions 0, 1, 2, …."""
    PREFIX = 2
    """`PREFIX_CHUNK_TOKENS` tokens computed behind all before them."""
    LINKED = 3
    """Live KV of a context that holds local chunks."""


class MissReason(IntEnum):
    """Why a chunk was not reused."""

    NOT_FOUND = 1
    CODEC = 2
    FORMAT_VERSION = 3
    FINGERPRINT = 4
    DIGEST = 5
    STORE_UNREACHABLE = 6
    STORE_LATE = 7
    CLAIM_TIMEOUT = 8
    SLOWER_THAN_COMPUTING = 9
    UNREADABLE = 10


class TokenSource(IntEnum):
    """Where the KV of a prompt token came from."""

    COMPUTED = 1
    LINK = 2
    DEVICE = 3
    HOST = 4
    DISK = 5
    PEER = 6
    COMPILED = 7


class FinishReason(IntEnum):
    """Why generation ended."""

    EOS = 1
    STOP = 2
    LENGTH = 3


PREFIX_CHUNK_TOKENS = 128
"""Length of a prefix chunk. A last partial block is never stored."""

DEFAULT_MIN_REUSED_TOKENS = 16
"""Fragments shorter than this are recomputed: each costs an attend and a merge over all later rows, so many short ones
cost more than they save (demo model, one thread of a busy machine, three runs each, 16 link tokens: break-even near 16
tokens with 16 documents, below it with 64, between 16 and 32 with 128)."""

DEFAULT_LINK_TOKENS = 16
"""Link tokens per reused chunk where the model has no profile (EPIC's LegoLink default)."""


@dataclass(frozen=True, slots=True)
class Miss:
    """A chunk that was wanted and not had."""

    chunk_id: bytes
    kind: ChunkKind
    reason: MissReason
    num_tokens: int


@dataclass(frozen=True, slots=True)
class SourceSpan:
    """Tokens `start` … `start + num_tokens` of a prompt, and where their KV came from."""

    start: int
    num_tokens: int
    source: TokenSource


@dataclass(frozen=True, slots=True)
class SourceRun:
    """Neighbouring tokens of a prompt whose KV came from one source."""

    source: TokenSource
    num_tokens: int


@dataclass(slots=True)
class ReuseReport:
    """What a request reused. `sources` adds up to the prompt's length, and so do `runs`, which are in its order; bytes
    are KV bytes over gRPC.

    `forced` says that LINKED was served although `profile` forbids it.
    """

    mode: ReuseMode
    sources: Counter[TokenSource] = field(default_factory=Counter)
    misses: list[Miss] = field(default_factory=list)
    chunk_bytes: int = 0
    live_bytes: int = 0
    inline_bytes: int = 0
    profile: str = "default"
    link_tokens_per_chunk: int = 0
    nodes: list[str] = field(default_factory=list)
    forced: bool = False
    sink_tokens_per_chunk: int = 0
    runs: list[SourceRun] = field(default_factory=list)

    def place(self, spans: Iterable[SourceSpan]) -> None:
        """Says where prompt tokens came from. Spans of one call may come in any order, but all of them stand behind
        those of earlier calls; empty ones count for nothing.
        """
        for span in sorted(spans, key=lambda span: span.start):
            if span.num_tokens <= 0:
                continue
            self.sources[span.source] += span.num_tokens
            before = self.runs.pop() if self.runs and self.runs[-1].source == span.source else None
            self.runs.append(SourceRun(span.source, span.num_tokens + (before.num_tokens if before else 0)))

    def count_transfers(self, later: ReuseReport) -> None:
        """Adds bytes and nodes of a context that was built once more; what `sources` says of the first stands."""
        self.chunk_bytes += later.chunk_bytes
        self.live_bytes += later.live_bytes
        self.inline_bytes += later.inline_bytes
        self.nodes += [node for node in later.nodes if node not in self.nodes]

    @property
    def num_prompt_tokens(self) -> int:
        """Prompt tokens accounted for."""
        return sum(self.sources.values())

    @property
    def num_reused_tokens(self) -> int:
        """Prompt tokens whose KV this request did not have to wait for a computation of."""
        fresh = (TokenSource.COMPUTED, TokenSource.LINK, TokenSource.COMPILED)
        return sum(n for source, n in self.sources.items() if source not in fresh)
