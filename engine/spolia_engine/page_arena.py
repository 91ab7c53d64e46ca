"""Which pages of one piece of memory are taken: ranges of pages that follow each other. Pure bookkeeping."""

from __future__ import annotations

from bisect import bisect_left

PageRange = tuple[int, int]
"""The first page and how many follow each other from it on."""


class PageArena:
    """Hands out pages 0 … num_pages in as few ranges as the free ones allow. Not thread-safe: its owner is.

    A range is cut from the smallest free one that holds it, so that long ones last.
    """

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        # Ascending, none touching the next.
        self._free: list[PageRange] = [(0, num_pages)] if num_pages else []

    @property
    def num_free(self) -> int:
        """Pages that nobody has."""
        return sum(count for _, count in self._free)

    def num_ranges(self, num_pages: int) -> int:
        """Ranges that `take` would give for so many pages, which must be free."""
        counts = sorted((count for _, count in self._free), reverse=True)
        taken = 0
        while num_pages > 0:
            num_pages -= counts[taken]
            taken += 1
        return taken

    def take(self, num_pages: int) -> list[PageRange]:
        """Ranges of so many pages in all, ascending; so many must be free."""
        assert 0 < num_pages <= self.num_free
        taken: list[PageRange] = []
        while num_pages:
            longest = max(count for _, count in self._free)
            wanted = min(num_pages, longest)
            _, index = min((count, i) for i, (_, count) in enumerate(self._free) if count >= wanted)
            first, count = self._free[index]
            self._free[index : index + 1] = [(first + wanted, count - wanted)] if count > wanted else []
            taken.append((first, wanted))
            num_pages -= wanted
        return sorted(taken)

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
