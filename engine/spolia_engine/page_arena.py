"""Which pages of one piece of memory are taken: ranges of pages that follow each other. Pure bookkeeping."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable


class PageArena:
    """Hands out ranges of pages 0 … num_pages, the lowest that is long enough. Not thread-safe: its owner is."""

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        # Free ranges as (first, number), ascending, none touching the next.
        self._free: list[tuple[int, int]] = [(0, num_pages)] if num_pages else []

    @property
    def num_free(self) -> int:
        """Pages that nobody has, in however many ranges."""
        return sum(count for _, count in self._free)

    def longest_with(self, given_back: Iterable[tuple[int, int]]) -> int:
        """Pages of the longest free range there would be if these ranges, (first, number), were given back too."""
        longest = first = end = 0
        for start, count in sorted([*self._free, *given_back]):
            if start != end:
                first = start
            end = start + count
            longest = max(longest, end - first)
        return longest

    def take(self, num_pages: int) -> int | None:
        """The first page of a range; None where no free range is as long, though single pages may suffice."""
        assert num_pages > 0
        for index, (first, count) in enumerate(self._free):
            if count >= num_pages:
                rest = (first + num_pages, count - num_pages)
                self._free[index : index + 1] = [rest] if rest[1] else []
                return first
        return None

    def give_back(self, first: int, num_pages: int) -> None:
        """Takes back a range, or a part of one, that `take` gave."""
        assert num_pages > 0
        index = bisect_left(self._free, (first, 0))
        end = first + num_pages
        assert end <= self.num_pages, "pages that are not there"
        assert index == len(self._free) or end <= self._free[index][0], "pages given back twice"
        assert not index or sum(self._free[index - 1]) <= first, "pages given back twice"
        if index < len(self._free) and self._free[index][0] == end:
            end += self._free.pop(index)[1]
        if index and sum(self._free[index - 1]) == first:
            index -= 1
            first = self._free.pop(index)[0]
        self._free.insert(index, (first, end - first))

    def check_invariants(self) -> None:
        """Asserts that free ranges are in order and apart."""
        end = -1
        for first, count in self._free:
            assert first > end, "ranges that touch are one"
            assert count > 0
            end = first + count
        assert end <= self.num_pages
