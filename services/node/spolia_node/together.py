"""Several things at once, of which the first failure is the failure of all."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterable


async def run_together(works: Iterable[Coroutine[None, None, None]]) -> None:
    """Runs all of them, and returns when all are done.

    The first error cancels the rest, and is raised as it is: a caller tells errors apart by their type, which a group
    of exceptions would hide.
    """
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        for done in asyncio.as_completed(tasks):
            await done
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
