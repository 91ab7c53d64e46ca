"""What a link job holds on a prefill node, whatever ends it. Its answers are in the decode node's tests."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any, cast

import pytest
from tiny_cluster import World, ids_of, is_idle, tokens

from spolia_prefill.link import Linker


@pytest.mark.parametrize("num_cancels", [1, 2, 3])
async def test_cancels_that_come_one_behind_the_other_keep_nothing(world: World, num_cancels: int) -> None:
    """The deadline's and the caller's may come in one turn of the loop."""
    node = await world.prefill()
    linker = Linker(node.engine, node.thread, cast(Any, None), 0.3, 256)
    token_ids = tokens(40)
    run = await node.thread.run(lambda: node.engine.compile(ids_of(node.engine).local(token_ids), token_ids))
    holding = asyncio.Event()

    async def job() -> None:
        async with linker._gathering() as gathered:
            gathered.held.append(run)
            gathered.tasks.append(asyncio.ensure_future(asyncio.sleep(60)))
            holding.set()
            await asyncio.sleep(60)

    task = asyncio.ensure_future(job())
    await holding.wait()
    for _ in range(num_cancels):
        task.cancel()
        await asyncio.sleep(0)
    with contextlib.suppress(asyncio.CancelledError):
        await task
    assert is_idle(node.engine.pool)
