"""Channels of a node, and three stores of which each holds its own."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
from store_fakes import FakeStores, fake_stores

from spolia_node.channels import ChannelPool


@pytest.fixture
async def channels() -> AsyncIterator[ChannelPool]:
    pool = ChannelPool(16 << 20)
    yield pool
    await pool.close()


@pytest.fixture
async def stores() -> AsyncIterator[FakeStores]:
    async with fake_stores(3) as running:
        yield running
