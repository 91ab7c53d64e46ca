"""What every test of the engine runs under."""

from __future__ import annotations

from collections.abc import Iterator

import engine_worlds
import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny tensors: a second thread costs more than it computes, most of all on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=engine_worlds.PLACES)
def place(request: pytest.FixtureRequest) -> Iterator[None]:
    """Where the engines of a test keep KV and decode. `usefixtures("place")` runs a module in every place."""
    before, engine_worlds.PLACE.name = engine_worlds.PLACE.name, request.param
    yield
    engine_worlds.PLACE.name = before
