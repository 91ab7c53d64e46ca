"""The load beside what is done to the topology, and what it met."""

from __future__ import annotations

import json
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deploy_container import REPOSITORY, Container
from deploy_load_process import UNTYPED

LOAD = Path(__file__).parent / "deploy_load_process.py"
ENDS_WITHIN_S = 90.0


@dataclass(frozen=True)
class Event:
    """Something that was done to the topology, and how long it lasted."""

    name: str
    began: float
    ended: float


class Load:
    """The process `deploy_load_process.py` in a container of the project's network."""

    def __init__(self, client: Container) -> None:
        """Asks every prompt alone first; returns when that is done."""
        credentials, model = "/volumes/certs-operator", str(REPOSITORY / "models" / "demo")
        command = ("python", str(LOAD), "gateway:7300", "https://gateway:8000", credentials, model)
        self._log = client.log.with_suffix(".load.log").open("w+")
        self._process = subprocess.Popen(
            client.command_line(*command),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )
        self.events: list[Event] = []
        self.records: list[dict[str, Any]] = []
        if self._read_line().strip() != "asked":
            said = self._said()
            self.close()
            raise AssertionError(f"the load did not start: {said}")

    @contextmanager
    def running(self, num_long: int = 1) -> Iterator[None]:
        """The load runs while the block does, and finishes what is under way; `records` and `events` are of it.

        `num_long` of its clients read streams of some seconds, one after the other.
        """
        self.records, self.events = [], []
        self._say(f"begin {num_long}")
        try:
            yield
        finally:
            self._say("end")
            line = self._read_line()
            assert line, f"the load did not end: {self._said()}"
            self.records = json.loads(line)
            print(self.summary())  # pytest shows it with -rP, and of a test that fails

    def close(self) -> None:
        """Ends the process, whatever it does."""
        self._process.kill()
        self._process.wait()
        self._log.close()

    @contextmanager
    def event(self, name: str) -> Iterator[None]:
        """Around what is done to the topology while the load runs."""
        began = time.monotonic()
        yield
        self.events.append(Event(name, began, time.monotonic()))

    def check(self) -> None:
        """Every request was answered, as it was when nobody else was there."""
        failed = [f"{each['kind']}: {each['error']}" for each in self.records if each["error"]]
        wrong = [each["kind"] for each in self.records if each["is_equal"] is False]
        compared = sum(each["is_equal"] is not None for each in self.records)
        assert not failed, f"{len(failed)} of {len(self.records)} failed during {self.summary()}: {failed[:5]}"
        assert not wrong, f"{len(wrong)} of {compared} answers differ from those of an idle cluster: {wrong}"
        assert compared > 0
        assert {each["kind"] for each in self.records} == {"exact", "linked", "long", "http"}

    def check_in_time(self) -> None:
        """Every request ended, with an answer or a typed error, within its deadline."""
        assert self.records
        late = [each for each in self.records if each["ended"] - each["began"] > each["deadline_s"] + 1.0]
        assert not late, late
        assert not [each["error"] for each in self.records if each["error"].startswith(UNTYPED)]
        assert not [each for each in self.records if each["is_equal"] is False]

    def summary(self) -> str:
        """A line for each event: requests under way in it, failures, the longest wait and gap."""
        return "\n".join(_line(event, self.records) for event in self.events)

    def _say(self, word: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{word}\n")
        self._process.stdin.flush()

    def _read_line(self) -> str:
        """The next line; empty where there is none in time, or the process has ended."""
        assert self._process.stdout is not None
        watch = threading.Timer(ENDS_WITHIN_S, self._process.kill)
        watch.start()
        try:
            return self._process.stdout.readline()
        finally:
            watch.cancel()

    def _said(self) -> str:
        self._log.seek(0)
        return self._log.read()[-3000:]


def _line(event: Event, records: Sequence[dict[str, Any]]) -> str:
    during = [each for each in records if each["began"] < event.ended and each["ended"] > event.began]
    errors = [each["error"].partition(":")[0] for each in during if each["error"]]
    gaps = [each["longest_gap_s"] for each in during if event.began <= each["gap_at"] <= event.ended]
    waits = [each["first_s"] for each in during if each["first_s"] and each["began"] >= event.began - 1]
    return (
        f"{event.name:28} {event.ended - event.began:5.1f} s  {len(during):4} requests  "
        f"{len(errors)} failed {' '.join(sorted(set(errors)))}  longest gap {max(gaps, default=0.0):.2f} s  "
        f"longest wait for a first token {max(waits, default=0.0):.2f} s"
    )
