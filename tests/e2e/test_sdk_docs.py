"""The examples of docs/sdk.md, pasted as they stand, and what they print."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from e2e_world import ledgers_are_empty, wait_until

from spolia import Busy, Client, InternalError, SpoliaError, Unavailable
from spolia.local_cluster import LocalCluster

pytestmark = pytest.mark.slow

DOCUMENT = (Path(__file__).parents[2] / "docs" / "sdk.md").read_text(encoding="utf-8")
ADDRESS = "127.0.0.1:7300"
EXAMPLE = re.compile(
    r"^## (?P<title>[^\n]*)$|^```python\n(?P<code>.*?)^```$(?:\n\n^```text\n(?P<printed>.*?)^```$)?", re.M | re.S
)


@dataclass(frozen=True, slots=True)
class Example:
    """A program of the document. `printed` is None where it depends on a model's guesses."""

    title: str
    code: str
    printed: str | None


def examples() -> list[Example]:
    found, title = [], ""
    for match in EXAMPLE.finditer(DOCUMENT):
        if match["title"] is not None:
            title = match["title"]
        else:
            found.append(Example(title, match["code"], match["printed"]))
    return found


def test_every_block_of_the_document_is_an_example_on_the_default_address() -> None:
    found = examples()
    assert len(found) == DOCUMENT.count("```python") >= 7
    assert sum(example.printed is not None for example in found) == DOCUMENT.count("```text")
    assert all(f'Client("{ADDRESS}")' in example.code for example in found)


@pytest.mark.parametrize("example", examples(), ids=lambda example: example.title.replace(" ", "-"))
def test_an_example_prints_what_stands_below_it(example: Example, cluster: LocalCluster) -> None:
    """The address is the one thing changed. No example shares a document with another, or with a test of this cluster:
    none meets what another left."""
    code = example.code.replace(ADDRESS, cluster.address)
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert ran.returncode == 0, ran.stderr
    assert ran.stderr == ""
    if example.printed is None:
        assert re.match(r"would (read|answer) \S", ran.stdout)
    else:
        assert ran.stdout == example.printed


def test_what_an_example_began_and_left_holds_nothing(cluster: LocalCluster) -> None:
    with Client(cluster.address) as client:
        wait_until("no request is under way", lambda: client.cluster().requests == ())
        wait_until("every ledger is empty", lambda: ledgers_are_empty(client))


class Scripted:
    """A client that fails as it is told, one error a call, and then answers."""

    def __init__(self, *errors: SpoliaError) -> None:
        self._errors = list(errors)
        self.limits_s: list[float] = []

    def generate(self, parts: str, *, timeout_s: float) -> str:
        self.limits_s.append(timeout_s)
        if self._errors:
            raise self._errors.pop(0)
        return parts


@pytest.fixture
def patiently() -> Any:
    """The function that the document offers for retries."""
    (code,) = [example.code for example in examples() if "def patiently" in example.code]
    names: dict[str, Any] = {}
    exec(code[: code.index("\nwith Client")], names)  # the document's own text
    return names["patiently"]


@pytest.fixture
def slept_s(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    waits: list[float] = []
    monkeypatch.setattr(time, "sleep", waits.append)
    return waits


def test_the_retry_waits_as_it_was_told_and_spends_one_limit(patiently: Any, slept_s: list[float]) -> None:
    client = Scripted(Busy("full", retry_after_ms=2000), Unavailable("gone"), Unavailable("gone"))
    assert patiently(client, "Hi", limit_s=30) == "Hi"
    told, first, second = slept_s
    assert 2.0 <= told <= 3.0
    assert 0.2 <= first <= 0.3
    assert 0.4 <= second <= 0.6
    assert client.limits_s == sorted(client.limits_s, reverse=True)
    assert client.limits_s[0] <= 30


@pytest.mark.parametrize("error", [InternalError("broken"), Busy("full", retry_after_ms=5000)])
def test_what_no_retry_can_help_is_raised_at_once(error: SpoliaError, patiently: Any, slept_s: list[float]) -> None:
    with pytest.raises(type(error)):
        patiently(Scripted(error), "Hi", limit_s=4)
    assert slept_s == []
