"""The `spolia` command run in this process, against a gateway whose answers are written down beforehand."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from fake_gateway import FakeGateway

from spolia.cli.main import main


@dataclass(frozen=True)
class Done:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """The one object on standard output."""
        assert self.out.count("\n") == 1
        return json.loads(self.out)


Spolia = Callable[..., Done]


@pytest.fixture
def spolia(gateway: FakeGateway, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Spolia:
    """Runs a command in this process, with the fake gateway as its own."""
    monkeypatch.setenv("SPOLIA_ADDRESS", gateway.address)
    monkeypatch.setenv("COLUMNS", "200")

    def run(*argv: str) -> Done:
        with pytest.raises(SystemExit) as ended:
            main(argv)
        captured = capsys.readouterr()
        code = ended.value.code
        return Done(code if isinstance(code, int) else 0, captured.out, captured.err)

    return run


@pytest.fixture
def page(tmp_path: Path) -> Path:
    path = tmp_path / "page.md"
    path.write_text("A page.")
    return path
