"""The link plan: which tokens of a prompt are recomputed, and what the rest is seen as.

R is the set of recomputed tokens: all live tokens, and usually the first k of each reused chunk (EPIC §4, LegoLink).
What is reused of a chunk is its maximal fragments outside R. A query at position p sees every fragment that ends at or
before p, and the tokens of R at or before p. So no mask is needed inside a fragment, for any R.

    prompt      [bos][ chunk A .......... ][ chunk B ........ ][ question ]
    R            x    xx                    xx                  xxxxxxxxxx      (k = 2, A not at position 0)
    fragments            [A 2…n)               [B 2…m)
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain

from spolia_core.errors import InvalidRequest
from spolia_core.prompt import Prompt
from spolia_engine.run import Run


@dataclass(frozen=True, slots=True)
class Fragment:
    """Tokens `start` … `end` of the chunk of part `part_index`, reused with the chunk's token 0 at position `offset`.

    Rows of R from `first_row` on see all of it; rows before see none.
    """

    part_index: int
    start: int
    end: int
    offset: int
    first_row: int


@dataclass(frozen=True, slots=True)
class LinkPlan:
    """R as `positions` and `token_ids`, sorted by position, and the fragments in order.

    Positions before `num_prefix_tokens` are an exact prefix: neither recomputed nor part of a fragment. `num_held_rows`
    rows that R would begin with are held as linked chunks, and left out of it.
    """

    positions: tuple[int, ...]
    token_ids: tuple[int, ...]
    fragments: tuple[Fragment, ...]
    num_prefix_tokens: int = 0
    num_held_rows: int = 0

    def num_reused(self, part_index: int) -> int:
        """Tokens of a part that are reused."""
        return sum(f.end - f.start for f in self.fragments if f.part_index == part_index)

    def pieces(self) -> Iterator[tuple[int, int, int]]:
        """Maximal consecutive pieces of R as (first row, first position, length): the live runs they become."""
        start = 0
        for row in range(1, len(self.positions) + 1):
            if row == len(self.positions) or self.positions[row] != self.positions[row - 1] + 1:
                yield start, self.positions[start], row - start
                start = row

    def without_first_rows(self, num_rows: int) -> LinkPlan:
        """The plan where the KV of so many rows that R begins with is held already; at least one row stays."""
        assert 0 <= num_rows < len(self.positions), "the last token is always recomputed"
        return LinkPlan(
            self.positions[num_rows:],
            self.token_ids[num_rows:],
            tuple(replace(f, first_row=max(0, f.first_row - num_rows)) for f in self.fragments),
            self.num_prefix_tokens,
            self.num_held_rows + num_rows,
        )


def plan_link(
    prompt: Prompt,
    num_link_tokens: int,
    min_reused_tokens: int = 1,
    *,
    num_sink_tokens: int = 0,
    num_prefix_tokens: int = 0,
) -> LinkPlan:
    """Leading-k: live tokens, the first `num_link_tokens` of every chunk not at position 0, and the last token.

    A chunk at position 0 needs no link tokens, unless it was compiled behind `num_sink_tokens` dummy sinks (the
    recipe's), which do not stand before it. A chunk that would have fewer than `min_reused_tokens` left to reuse is
    recomputed whole. The last token is always recomputed: its hidden state gives the first answer token.

    With an exact prefix of `num_prefix_tokens`, all that is counted from its end: of a chunk across it, what is behind.
    Raises `InvalidRequest` for a negative number.
    """
    _check_count("num_link_tokens", num_link_tokens)
    _check_count("min_reused_tokens", min_reused_tokens)
    ranges: list[tuple[int, int]] = []
    base = 0
    for part in prompt.parts:
        size, num_exact = len(part.token_ids), max(0, num_prefix_tokens - base)
        is_exact = base == 0 and num_sink_tokens == 0
        linked = 0 if is_exact else min(num_link_tokens, size)
        if part.chunk_id is None or size - max(linked, num_exact) < min_reused_tokens:
            linked = size
        ranges.append((base, base + linked))
        base += size
    return _plan(prompt, ranges, num_prefix_tokens)


def plan_recompute(prompt: Prompt, positions: Collection[int], *, num_prefix_tokens: int = 0) -> LinkPlan:
    """Any R: live tokens, `positions` of chunk tokens chosen by the caller, and the last token; behind the prefix."""
    ranges = [(position, position + 1) for position in positions if position < prompt.num_tokens]
    base = 0
    for part in prompt.parts:
        if part.chunk_id is None:
            ranges.append((base, base + len(part.token_ids)))
        base += len(part.token_ids)
    return _plan(prompt, ranges, num_prefix_tokens)


def check_runs(prompt: Prompt, runs: Mapping[int, Run]) -> None:
    """Raises `InvalidRequest` unless every run (by part index) is as long as its part.

    A chunk id comes with the request; a run of another length shows that it is not the id of these tokens.
    """
    for index, run in runs.items():
        expected = len(prompt.parts[index].token_ids)
        if run.num_tokens != expected:
            raise InvalidRequest(
                f"parts[{index}] has {expected} tokens, the chunk it names has {run.num_tokens}",
                field=f"parts[{index}].chunk_id",
                limit=f"{run.num_tokens} tokens",
                actual=f"{expected} tokens",
            )


def _check_count(name: str, value: int) -> None:
    if value < 0:
        raise InvalidRequest(f"{name} must be ≥ 0, got {value}", field=name, limit="≥ 0", actual=str(value))


def _plan(prompt: Prompt, ranges: Iterable[tuple[int, int]], num_prefix_tokens: int) -> LinkPlan:
    """`ranges` as (start, end), in any order. Beside one copy of the prompt, it costs what R and the parts do."""
    num_tokens = prompt.num_tokens
    assert num_prefix_tokens < num_tokens, "the last token is always recomputed"
    merged = _merged([*ranges, (num_tokens - 1, num_tokens)], num_prefix_tokens)
    tokens = prompt.token_ids
    positions = tuple(chain.from_iterable(range(start, end) for start, end in merged))
    token_ids = tuple(chain.from_iterable(tokens[start:end] for start, end in merged))
    return LinkPlan(positions, token_ids, tuple(_fragments(prompt, merged, num_prefix_tokens)), num_prefix_tokens)


def _merged(ranges: Iterable[tuple[int, int]], first: int) -> list[tuple[int, int]]:
    """The union of ranges as ascending ones that do not touch; nothing before `first`."""
    merged: list[tuple[int, int]] = []
    for start, end in sorted(ranges):
        start = max(start, first)
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        elif start < end:
            merged.append((start, end))
    return merged


def _fragments(prompt: Prompt, merged: Sequence[tuple[int, int]], num_prefix_tokens: int) -> Iterator[Fragment]:
    """What R, as `_merged` gives it, leaves of the chunks behind the prefix."""
    base = num_rows = number = 0
    for index, part in enumerate(prompt.parts):
        part_end, at = base + len(part.token_ids), max(base, num_prefix_tokens)
        while at < part_end:
            start, end = merged[number]  # the last range ends where the prompt does
            if at < start and part.chunk_id is not None:
                yield Fragment(index, at - base, min(start, part_end) - base, base, num_rows)
            if end > part_end or start >= part_end:
                break
            num_rows, number, at = num_rows + end - start, number + 1, end
        base = part_end
