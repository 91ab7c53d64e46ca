"""A name that has several addresses is several gateways: a client's calls are spread over those that answer."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator

import fake_gateway
import grpc
import pytest
from fake_gateway import PATIENCE_S, FakeGateway

from spolia import AsyncClient, Client
from spolia.errors import Unavailable

NUM_CALLS = 8
Pair = tuple[FakeGateway, FakeGateway]


@pytest.fixture
def servers() -> Iterator[dict[str, grpc.Server]]:
    """By address, for tests to stop."""
    running: dict[str, grpc.Server] = {}
    yield running
    for server in running.values():
        server.stop(grace=None).wait(PATIENCE_S)


@pytest.fixture
def pair(servers: dict[str, grpc.Server]) -> Pair:
    pair = FakeGateway(), FakeGateway()
    for gateway in pair:
        server = fake_gateway.start(gateway)
        servers[gateway.address] = server
    return pair


def name_of(pair: Pair) -> str:
    """What gRPC takes for a name that DNS has two addresses of."""
    return "ipv4:" + ",".join(gateway.address for gateway in pair)


def counts(pair: Pair) -> tuple[int, int]:
    first, second = pair
    return len(first.requests), len(second.requests)


def both_asked(client: Client, pair: Pair) -> None:
    """A second connection takes a moment longer than the first."""
    deadline = time.monotonic() + PATIENCE_S
    while not all(counts(pair)):
        assert time.monotonic() < deadline, counts(pair)
        client.generate("Say hello")


def test_calls_go_to_every_gateway_in_turn(pair: Pair) -> None:
    with Client(name_of(pair), allow_plaintext=True) as client:
        both_asked(client, pair)
        before = counts(pair)
        for _ in range(NUM_CALLS):
            client.generate("Say hello")
    assert [now - then for now, then in zip(counts(pair), before, strict=True)] == [NUM_CALLS // 2, NUM_CALLS // 2]


def test_calls_of_a_loop_too(pair: Pair) -> None:
    async def run() -> None:
        async with AsyncClient(name_of(pair), allow_plaintext=True) as client:
            deadline = time.monotonic() + PATIENCE_S
            while not all(counts(pair)):
                assert time.monotonic() < deadline, counts(pair)
                await client.generate("Say hello")

    asyncio.run(run())


def test_a_gateway_that_went_is_left_out(pair: Pair, servers: dict[str, grpc.Server]) -> None:
    with Client(name_of(pair), allow_plaintext=True) as client:
        both_asked(client, pair)
        first, second = pair
        servers.pop(first.address).stop(grace=None).wait(PATIENCE_S)
        answered = 0
        for _ in range(NUM_CALLS):
            try:
                client.generate("Say hello")
                answered += 1
            except Unavailable:  # the call that finds out
                pass
        assert answered >= NUM_CALLS - 1
        assert second.requests
