"""A tiny model, and one thread for everybody."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from harness_worlds import sharp_model

from spolia_engine.adapter import ModelAdapter
from spolia_fidelity.encoder import TextEncoder


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Tiny tensors: a second thread costs more than it computes, most of all on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sharp_model(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="session")
def adapter(model: Path) -> ModelAdapter:
    return ModelAdapter.load(model)


@pytest.fixture(scope="session")
def encoder(model: Path) -> TextEncoder:
    return TextEncoder.from_model(model)
