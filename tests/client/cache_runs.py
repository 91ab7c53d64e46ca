"""`spolia cache` run in this process, against stores made of dicts."""

from __future__ import annotations

import pytest
from cli_runs import Done, Spolia
from fake_store import FakeStore

Stores = tuple[FakeStore, FakeStore]
NOWHERE = "127.0.0.1:1"


@pytest.fixture
def cache(spolia: Spolia, stores: Stores, monkeypatch: pytest.MonkeyPatch) -> Spolia:
    """Runs `spolia cache …`, with both stores as its own."""
    monkeypatch.setenv("SPOLIA_STORE", " ".join(store.address for store in stores))
    return lambda *argv: spolia("cache", *argv)


@pytest.fixture
def half(spolia: Spolia, stores: Stores, monkeypatch: pytest.MonkeyPatch) -> Spolia:
    """Runs `spolia cache …` with the first store, and one that nobody answers for."""
    monkeypatch.setenv("SPOLIA_STORE", f"{NOWHERE} {stores[0].address}")
    return lambda *argv: spolia("cache", *argv)


def rows(done: Done) -> list[str]:
    """The lines of a table, without its head."""
    assert done.code == 0, done.err
    return done.out.splitlines()[1:]
