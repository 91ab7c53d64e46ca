"""One cluster for all fuzzers."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

for _folder in ("worker", "e2e"):
    sys.path.insert(0, str(Path(__file__).parents[1] / _folder))

from fuzz_world import FuzzWorld  # noqa: E402 - what it imports is found by the lines above
from fuzzed_calls import use_everything  # noqa: E402 - the same
from tiny_cluster import write_model  # noqa: E402 - the same

TEMPLATE = "{% for message in messages %}{{ message.role }}:{{ message.content }}{% endfor %}"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FuzzWorld]:
    model = write_model(tmp_path_factory.mktemp("tiny"))
    (model / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    with FuzzWorld(model, tmp_path_factory.mktemp("fuzzed")).running() as running:
        use_everything(running)
        yield running
