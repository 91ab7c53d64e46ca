"""Waiting for claims that lie with several stores."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence

from spolia.v1.kvstore_pb2 import ClaimResult, ClaimState
from spolia_node.deadline import Deadline

AskClaims = Callable[[Sequence[bytes], int], Awaitable[list[ClaimResult]]]
"""Asks for claims on ids, waiting at most so many milliseconds, each where it belongs."""


async def claim_at_several(ask: AskClaims, groups: Sequence[Sequence[bytes]], wait_ms: int) -> dict[bytes, ClaimResult]:
    """Claims ids that lie in `groups`, one for each store. Result by id.

    Each store can say when a claim of its own ends, none when another's does: so all are asked first, and where there
    is nothing to begin with, those with something held are waited for until the first of them answers. What was cut
    short is asked again, since it may have been granted in the same moment.
    """
    waiting = Deadline.after(wait_ms / 1000)
    results = await _results(ask, [chunk_id for group in groups for chunk_id in group])
    held = [group for group in groups if any(results[i].state == ClaimState.CLAIM_STATE_HELD for i in group)]
    if not held or wait_ms == 0 or any(r.state == ClaimState.CLAIM_STATE_GRANTED for r in results.values()):
        return results
    await _first_change(ask, held, round(waiting.remaining() * 1000))
    return results | await _results(ask, [chunk_id for group in held for chunk_id in group])


async def _results(ask: AskClaims, ids: Sequence[bytes]) -> dict[bytes, ClaimResult]:
    return dict(zip(ids, await ask(ids, 0), strict=True))


async def _first_change(ask: AskClaims, groups: Sequence[Sequence[bytes]], wait_ms: int) -> None:
    """Returns when the first group's store answers; raises what it raises."""
    tasks = [asyncio.ensure_future(ask(group, wait_ms)) for group in groups]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
