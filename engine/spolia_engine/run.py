"""Runs and spans: what KV is and how a context names it.

A *run* is KV of consecutive tokens in an extent of pool memory; key i is rotated to position rope_base + i. A *span*
says that tokens start … end of a run count as standing `offset` further on. Local chunks have rope_base 0, so their
span's offset is where the chunk stands; prefix and live runs have absolute positions and offset 0.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from spolia_engine.extent import Extent


@dataclass(frozen=True, slots=True, eq=False)
class Run:
    """KV of `num_tokens` consecutive tokens in slots `start` … of `extent`. Sealed: never written again."""

    extent: Extent
    start: int
    num_tokens: int
    rope_base: int


@dataclass(frozen=True, slots=True, eq=False)
class Span:
    """Tokens `start` … `end` (counted in the run) of `run`, standing at `offset` + rope_base + start … ."""

    run: Run
    start: int
    end: int
    offset: int

    @property
    def num_tokens(self) -> int:
        """Tokens the span covers."""
        return self.end - self.start

    @property
    def first_position(self) -> int:
        """Position in the context of its first token."""
        return self.offset + self.run.rope_base + self.start

    @property
    def end_position(self) -> int:
        """Position in the context behind its last token."""
        return self.first_position + self.num_tokens

    @property
    def slots(self) -> SlotRange:
        """Where the span lies in memory."""
        return SlotRange(self.run.extent, self.run.start + self.start, self.run.start + self.end, self.offset)


@dataclass(frozen=True, slots=True, eq=False)
class SlotRange:
    """Slots `start` … `end` of an extent, seen by queries rotated by -`offset`. The unit attention works on."""

    extent: Extent
    start: int
    end: int
    offset: int


def copy_kv(spans: Iterable[Span], target: Extent, first_position: int, end_position: int) -> None:
    """Copies the KV of positions `first_position` … `end_position` of `spans` into `target`, from its slot 0 on.

    Only spans of offset 0 may be there: their keys are rotated to where they stand.
    """
    for span in spans:
        low, high = max(span.first_position, first_position), min(span.end_position, end_position)
        if low < high:
            assert span.offset == 0, "keys of a moved span are not rotated to their positions"
            first = span.slots.start - span.first_position
            for part in span.run.extent.parts(first + low, first + high):
                target.write(slice(None), part.start - first - first_position, part.key, part.value)


def coalesce(spans: Iterable[Span]) -> list[SlotRange]:
    """Joins spans that lie side by side in memory under one offset; what is left comes in order of first appearance.

    Softmax does not care where in a context a key stands once the query is rotated, so a joined range gives the same
    partial with one attend. Empty spans vanish.
    """
    pieces: dict[tuple[Extent, int], list[tuple[int, int]]] = {}
    for span in spans:
        if span.num_tokens:
            here = span.slots
            pieces.setdefault((here.extent, here.offset), []).append((here.start, here.end))
    ranges: list[SlotRange] = []
    for (extent, offset), found in pieces.items():
        start, end = (found := sorted(found))[0]
        for next_start, next_end in found[1:]:
            if next_start != end:
                ranges.append(SlotRange(extent, start, end, offset))
                start = next_start
            end = next_end
        ranges.append(SlotRange(extent, start, end, offset))
    return ranges
