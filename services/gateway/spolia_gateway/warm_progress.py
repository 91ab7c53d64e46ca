"""Which documents are done, told from the chunks that are."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from spolia.v1 import gateway_pb2
from spolia_gateway.documents import DocumentChunk


@dataclass(frozen=True, slots=True)
class WarmedChunk:
    """A chunk that is in the store now."""

    chunk: DocumentChunk
    size_bytes: int
    already_stored: bool
    elapsed_ms: float


class WarmProgress:
    """Collects chunks. What a chunk cost is told of the first document that has it; to the others it was there."""

    def __init__(self, documents: Sequence[Sequence[DocumentChunk]]) -> None:
        self._documents = documents
        self._warmed: dict[bytes, WarmedChunk] = {}
        self._places: defaultdict[bytes, list[int]] = defaultdict(list)
        self._num_missing = []
        for index, chunks in enumerate(documents):
            distinct = dict.fromkeys(chunk.chunk_id for chunk in chunks)
            self._num_missing.append(len(distinct))
            for chunk_id in distinct:
                self._places[chunk_id].append(index)

    def take(self, warmed: WarmedChunk) -> Iterator[gateway_pb2.WarmResponse]:
        """The documents whose last missing chunk this was. Each chunk is taken once."""
        self._warmed[warmed.chunk.chunk_id] = warmed
        for index in self._places[warmed.chunk.chunk_id]:
            self._num_missing[index] -= 1
            if not self._num_missing[index]:
                yield self._done(index)

    def _done(self, index: int) -> gateway_pb2.WarmResponse:
        chunks = self._documents[index]
        distinct = [self._warmed[chunk_id] for chunk_id in dict.fromkeys(chunk.chunk_id for chunk in chunks)]
        own = [warmed for warmed in distinct if self._places[warmed.chunk.chunk_id][0] == index]
        num_computed = sum(not warmed.already_stored for warmed in own)
        return gateway_pb2.WarmResponse(
            document_index=index,
            num_tokens=sum(len(chunk.token_ids) for chunk in chunks),
            size_bytes=sum(warmed.size_bytes for warmed in distinct),
            already_stored=num_computed == 0,
            elapsed_ms=sum(warmed.elapsed_ms for warmed in own),
            num_chunks=len(chunks),
            num_computed_chunks=num_computed,
        )
