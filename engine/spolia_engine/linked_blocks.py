"""Linked chunks: what a link pass computed, kept for a prompt that repeats everything before it.

    prompt     [system prompt ....... ][ chunk A ......... ][ chunk B ........ ][ question ........... ]
    R           xxxxxxxxxxxxxxxxxxxxxxx xx                   xx                  xxxxxxxxxxxxxxxxxxxxxx
    chunks     [prefix   ][prefix   ][L0  ]                 [L1]                [L2        ][ open end
                0          128        256 … A's fragment     up to B's fragment  128 tokens

Up to the last whole block before the first fragment the context is exact: prefix chunks. Behind it every piece of R is
cut into blocks of `PREFIX_CHUNK_TOKENS`; a shorter last block is a chunk only where a fragment follows it. The id of
each covers the one before it, and the place of every fragment between the two: so a chain that matches means that
all of the context up to there is the same, and its KV may be used as if it had been computed now.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from spolia_core.ids import IdSpace, Placement
from spolia_core.prompt import Prompt
from spolia_core.reuse import PREFIX_CHUNK_TOKENS, ChunkKind
from spolia_engine.context import Context
from spolia_engine.link_plan import LinkPlan
from spolia_engine.resident import ResidentChunks
from spolia_engine.run import Run
from spolia_engine.sealing import SealedBlock, prefix_blocks


@dataclass(frozen=True, slots=True)
class LinkedBlock(SealedBlock):
    """A chunk that a link pass computes: the KV of its tokens is that of rows `first_row` … of the whole R."""

    first_row: int


def num_exact_tokens(plan: LinkPlan) -> int:
    """Where exact prefix chunks end: behind the last whole block before the first fragment, or the plan's prefix."""
    exact_end = plan.positions[-1] + 1
    if plan.fragments:
        exact_end = plan.fragments[0].offset + plan.fragments[0].start
    return max(plan.num_prefix_tokens, exact_end // PREFIX_CHUNK_TOKENS * PREFIX_CHUNK_TOKENS)


def exact_blocks(plan: LinkPlan, chain: Sequence[bytes]) -> list[LinkedBlock]:
    """The prefix chunks that a pass of the whole `plan` computes. `chain` holds those of the prompt, from its start."""
    first, last = (tokens // PREFIX_CHUNK_TOKENS for tokens in (plan.num_prefix_tokens, num_exact_tokens(plan)))
    return [
        LinkedBlock(block.chunk_id, block.position, block.num_tokens, block.kind, block.position - plan.positions[0])
        for block in prefix_blocks(chain[:last], first)
    ]


@dataclass(frozen=True, slots=True)
class OpenEnd:
    """What stands behind the last chunk of a linked context: tokens from `position` on, too few for another.

    `placements` are the fragments between that chunk, `predecessor`, and them.
    """

    ids: IdSpace
    profile: str
    predecessor: bytes | None
    placements: tuple[Placement, ...]
    position: int
    first_row: int
    token_ids: tuple[int, ...]

    def blocks(self, more_ids: Sequence[int]) -> list[LinkedBlock]:
        """The chunks that `more_ids`, computed behind the context, complete. Costs what they do, not the context."""
        token_ids = [*self.token_ids, *more_ids]
        predecessor, placements = self.predecessor, self.placements
        blocks: list[LinkedBlock] = []
        for start in range(0, len(token_ids) - PREFIX_CHUNK_TOKENS + 1, PREFIX_CHUNK_TOKENS):
            block_ids = token_ids[start : start + PREFIX_CHUNK_TOKENS]
            predecessor = self.ids.linked(predecessor, placements, self.profile, block_ids)
            placements = ()
            blocks.append(
                LinkedBlock(
                    predecessor, self.position + start, PREFIX_CHUNK_TOKENS, ChunkKind.LINKED, self.first_row + start
                )
            )
        return blocks


@dataclass(frozen=True, slots=True)
class LinkedChain:
    """The chunks of a linked context, first to last, and what is left behind them."""

    blocks: tuple[LinkedBlock, ...]
    end: OpenEnd


def linked_chain(
    prompt: Prompt, plan: LinkPlan, ids: IdSpace, profile: str, num_link_tokens: int, chain: Sequence[bytes]
) -> LinkedChain | None:
    """The chunks of a context; None where nothing is linked, and all of it is exact.

    `plan` is the whole plan, no rows left out; `chain` the prefix chunk ids of the prompt's tokens.
    """
    assert plan.num_held_rows == 0, "the ids cover the whole context"
    if not plan.fragments:
        return None
    base = num_exact_tokens(plan)
    predecessor = chain[base // PREFIX_CHUNK_TOKENS - 1] if base else None
    placed = list(_placements(prompt, plan, num_link_tokens))
    num_placed = 0
    blocks: list[LinkedBlock] = []
    for first_row, position, num_tokens in _cut(plan, base):
        first, num_placed = num_placed, bisect_right(placed, position, lo=num_placed, key=lambda item: item[0])
        before = [placement for _, placement in placed[first:num_placed]]
        token_ids = plan.token_ids[first_row : first_row + num_tokens]
        predecessor = ids.linked(predecessor, before, profile, token_ids)
        blocks.append(LinkedBlock(predecessor, position, num_tokens, ChunkKind.LINKED, first_row))
    last_row, last_position, _ = list(plan.pieces())[-1]
    if blocks and blocks[-1].position >= last_position:
        last_row, last_position = blocks[-1].first_row + blocks[-1].num_tokens, blocks[-1].end
    pending = tuple(placement for _, placement in placed[num_placed:])
    end = OpenEnd(ids, profile, predecessor, pending, last_position, last_row, plan.token_ids[last_row:])
    return LinkedChain(tuple(blocks), end)


def register_linked(
    resident: ResidentChunks, context: Context, plan: LinkPlan, blocks: Sequence[LinkedBlock]
) -> list[tuple[bytes, Run]]:
    """Registers the blocks whose rows a pass computed; see `EngineCore.register_linked`. Those held before it are left
    out.
    """
    live = context.live
    assert live is not None, "a link pass leaves the run of its rows"
    found: list[tuple[bytes, Run]] = []
    for block in blocks:
        row = block.first_row - plan.num_held_rows
        if row < 0:
            continue
        run = Run(live.extent, live.start + row, block.num_tokens, block.position)
        if resident.register(block.chunk_id, block.kind, run):
            found.append((block.chunk_id, run))
    return found


def _placements(prompt: Prompt, plan: LinkPlan, num_link_tokens: int) -> Iterator[tuple[int, Placement]]:
    """Every fragment as (position behind it, what ids say of it), in order."""
    for fragment in plan.fragments:
        chunk_id = prompt.parts[fragment.part_index].chunk_id
        assert chunk_id is not None, "fragments are of chunks"
        yield (
            fragment.offset + fragment.end,
            Placement(chunk_id, fragment.offset, fragment.start, fragment.end, num_link_tokens),
        )


def _cut(plan: LinkPlan, base: int) -> Iterator[tuple[int, int, int]]:
    """(first row, position, length) of each block of R behind `base`."""
    pieces = list(plan.pieces())
    for number, (row, position, length) in enumerate(pieces):
        skipped = min(length, max(0, base - position))
        row, position, length = row + skipped, position + skipped, length - skipped
        is_followed = number + 1 < len(pieces)
        whole = length if is_followed else length // PREFIX_CHUNK_TOKENS * PREFIX_CHUNK_TOKENS
        for start in range(0, whole, PREFIX_CHUNK_TOKENS):
            yield row + start, position + start, min(PREFIX_CHUNK_TOKENS, whole - start)
