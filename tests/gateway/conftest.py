"""A tiny model directory, made once; and keys for those who ask."""

from __future__ import annotations

from pathlib import Path

import pytest
from gateway_tokenizers import byte_level_tokenizer, write_model
from key_worlds import keys

__all__ = ["keys"]  # a fixture


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("tiny"), byte_level_tokenizer(), bos_token="<s>", eos_token="</s>")
