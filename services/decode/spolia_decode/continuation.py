"""Which chunks an answer completes behind its context, so that the next turn of a chat starts warm.

Both kinds go on from the last chunk of the context: what it costs depends on the answer alone, however long the prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from spolia_core.ids import IdSpace
from spolia_core.reuse import PREFIX_CHUNK_TOKENS, ChunkKind
from spolia_engine.linked_blocks import LinkedBlock, LinkedChain
from spolia_engine.sealing import SealedBlock


class Continuation(Protocol):
    """What a context's chain of chunks goes on with."""

    def blocks(self, more_ids: Sequence[int]) -> Sequence[SealedBlock]:
        """Chunks that `more_ids`, the tokens with KV behind the context, complete."""
        ...

    @property
    def earlier(self) -> Sequence[SealedBlock]:
        """Chunks of the context that the store is not given unless something stands behind them."""
        ...


@dataclass(frozen=True, slots=True)
class ExactContinuation:
    """Prefix chunks. `open_ids` are the tokens behind the context's last chunk, `predecessor`, from `position` on."""

    ids: IdSpace
    predecessor: bytes | None
    position: int
    open_ids: tuple[int, ...]

    @classmethod
    def of(cls, ids: IdSpace, token_ids: Sequence[int], chain: Sequence[bytes]) -> ExactContinuation:
        """Behind a context of `token_ids`, whose prefix chunk ids are `chain`."""
        position = len(chain) * PREFIX_CHUNK_TOKENS
        return cls(ids, chain[-1] if chain else None, position, tuple(token_ids[position:]))

    def blocks(self, more_ids: Sequence[int]) -> list[SealedBlock]:
        """See `Continuation`."""
        chain = self.ids.prefix_chain([*self.open_ids, *more_ids], self.predecessor)
        return [
            SealedBlock(chunk_id, self.position + number * PREFIX_CHUNK_TOKENS, PREFIX_CHUNK_TOKENS, ChunkKind.PREFIX)
            for number, chunk_id in enumerate(chain)
        ]

    @property
    def earlier(self) -> Sequence[SealedBlock]:
        """None: prefix chunks are stored when they are computed."""
        return ()


@dataclass(frozen=True, slots=True)
class LinkedContinuation:
    """Linked chunks, behind those of a context."""

    chain: LinkedChain

    def blocks(self, more_ids: Sequence[int]) -> list[LinkedBlock]:
        """See `Continuation`."""
        return self.chain.end.blocks(more_ids)

    @property
    def earlier(self) -> Sequence[SealedBlock]:
        """The linked chunks before the answer."""
        return self.chain.blocks
