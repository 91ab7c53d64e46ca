"""Builds the images and runs the demo, and what can go wrong, against compose on a Docker engine. `make docker-test`.

Ends with 0 where there is no engine, and says so. Needs some 3 GB for the images; the project it makes is its own, on
ports of its own, and is removed at the end, volumes included. `--keep` leaves it.
"""

from __future__ import annotations

import argparse
import os
import ssl
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from compose_project import CommandFailed, ComposeProject, engine_version

from spolia import Client, Document
from spolia.cli.demo_texts import Samples, load_samples
from spolia.errors import SpoliaError
from spolia.results import Result
from spolia_core.errors import Unavailable

ROOT = Path(__file__).parents[2]
START_LIMIT_S, CHANGE_LIMIT_S = 600.0, 180.0
CALL_LIMIT_S = 60.0
COUNTS = {"gateway": 1, "prefill": 2, "decode": 2, "kvstore": 1}


class Load:
    """Asks all the time, from some threads, and keeps what failed."""

    def __init__(self, client: Client, samples: Samples, num_threads: int = 3) -> None:
        self.num_answers = 0
        self.failures: list[str] = []
        self._client = client
        self._samples = samples
        self._stopped = threading.Event()
        self._lock = threading.Lock()
        self._threads = [threading.Thread(target=self._ask, args=(number,)) for number in range(num_threads)]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        for thread in self._threads:
            thread.join(CALL_LIMIT_S + 10)

    def _ask(self, seed: int) -> None:
        while not self._stopped.is_set():
            seed += 1
            question = self._samples.questions[seed % len(self._samples.questions)]
            try:
                ask(self._client, self._samples.documents, question.text)
            except SpoliaError as error:
                with self._lock:
                    self.failures.append(f"{type(error).__name__}: {error.message}")
            else:
                with self._lock:
                    self.num_answers += 1


def ask(client: Client, documents: Sequence[Document], question: str) -> Result:
    """One answer of the demo model."""
    return client.generate([*documents, question], mode="linked", max_tokens=12, stop=["\n"])


class Checks:
    """What must be true of a project that was started, in order. Each raises `AssertionError` that says what is not."""

    def __init__(self, project: ComposeProject, folder: Path, samples: Samples) -> None:
        self.project = project
        self.samples = samples
        self.ca_file = folder / "ca.crt"
        self.ca_file.write_text(project.tool("cat", "/certs/ca.crt"))
        self.api_key = project.tool("cat", "/certs/api.key").strip()

    def all(self) -> list[tuple[str, Callable[[], str]]]:
        """Each with what it shows."""
        return [
            ("answers the demo's questions, and reuses its documents in another order", self.demo),
            ("serves HTTP under TLS and asks for a key", self.http),
            ("spolia doctor finds nothing wrong", self.doctor),
            ("--scale decode=4 serves", self.scaled),
            ("every service but the gateway restarts under load, one container at a time", self.restarts),
            ("a killed decode node costs no answer", self.killed),
            ("a node frozen for 5 s comes back", self.freeze),
            ("Redis killed costs no answer", self.without_redis),
        ]

    @contextmanager
    def client(self) -> Iterator[Client]:
        """With the first key."""
        address = f"127.0.0.1:{self.project.port('gateway', 7300)}"
        with Client(address, api_key=self.api_key, ca_file=self.ca_file, timeout_s=CALL_LIMIT_S) as client:
            yield client

    def demo(self) -> str:
        """The demo's questions, twice, in two orders."""
        documents, questions = self.samples.documents, self.samples.questions
        with self.client() as client:
            client.warm(list(documents))
            right = 0
            for number, question in enumerate(questions[:6]):
                turned = documents[number % len(documents) :] + documents[: number % len(documents)]
                result = ask(client, turned, question.text)
                right += result.text.strip() == question.answer.strip()
                assert result.reuse.num_reused_tokens > result.num_prompt_tokens // 2, result.reuse
        assert right >= 4, f"{right} of 6 answers are right"
        return f"{right} of 6 answers right"

    def http(self) -> str:
        """With Python's own client, as anybody's."""
        url = f"https://127.0.0.1:{self.project.port('gateway', 8000)}"
        key = {"authorization": f"Bearer {self.api_key}"}
        answered = [
            self._status(f"{url}/health"),
            self._status(f"{url}/v1/models", key),
            self._status(f"{url}/v1/models"),
        ]
        assert answered == [200, 200, 401], answered
        return ""

    def _status(self, url: str, headers: dict[str, str] | None = None) -> int:
        context = ssl.create_default_context(cafile=str(self.ca_file))
        try:
            with urllib.request.urlopen(
                urllib.request.Request(url, headers=headers or {}), timeout=10, context=context
            ) as got:
                return int(got.status)
        except urllib.error.HTTPError as error:
            return error.code

    def doctor(self) -> str:
        """Reach, versions, clock, TLS, keys, closed doors, tenants apart."""
        said = self.project.run("tools", "doctor", timeout_s=CHANGE_LIMIT_S)
        assert "isolation (linked)" in said, said
        return ""

    def scaled(self) -> str:
        """Four decode nodes, each under a name and an address of its own."""
        self.project.compose(
            "up", "--no-build", "--wait", "--no-recreate", "--scale", "decode=4", timeout_s=CHANGE_LIMIT_S
        )
        took_s = self.wait_for({**COUNTS, "decode": 4})
        return f"known {took_s:.1f} s after they were healthy"

    def restarts(self) -> str:
        """In order of who needs whom least."""
        with self.client() as client, Load(client, self.samples) as load:
            for service in ("decode", "prefill", "kvstore", "redis"):
                for container in self.project.containers(service):
                    self.project.docker("restart", "--time", "75", container, timeout_s=CHANGE_LIMIT_S)
                    self.project.wait_healthy(container, CHANGE_LIMIT_S)
        return self.no_failure(load)

    def killed(self) -> str:
        """SIGKILL, and what took its place."""
        victim = self.project.containers("decode")[0]
        with self.client() as client, Load(client, self.samples) as load:
            time.sleep(1)
            self.project.docker("kill", victim)
            time.sleep(5)
            self.project.docker("start", victim)  # killed by hand, which is not what `restart` is for
            self.project.wait_healthy(victim, CHANGE_LIMIT_S)
        self.wait_for({**COUNTS, "decode": 4})
        return self.no_failure(load)

    def freeze(self) -> str:
        """Frozen, a container answers nothing and says nothing: what a cut cable looks like from outside."""
        victim = self.project.containers("decode")[1]
        with self.client() as client, Load(client, self.samples) as load:
            time.sleep(1)
            self.project.docker("pause", victim)
            time.sleep(5)
            self.project.docker("unpause", victim)
            time.sleep(5)
        self.wait_for({**COUNTS, "decode": 4})
        return self.no_failure(load)

    def without_redis(self) -> str:
        """Stores go on with what they know, and say everything again."""
        (redis,) = self.project.containers("redis")
        with self.client() as client, Load(client, self.samples) as load:
            self.project.docker("kill", redis)
            time.sleep(5)
            self.project.docker("start", redis)
            self.project.wait_healthy(redis, CHANGE_LIMIT_S)
        return self.no_failure(load)

    def no_failure(self, load: Load) -> str:
        """The load's count; fails with what failed."""
        assert not load.failures, f"{len(load.failures)} of {load.num_answers} failed: {load.failures[:3]}"
        assert load.num_answers > 0, "nothing was asked"
        return f"{load.num_answers} answers, 0 failed"

    def wait_for(self, counts: dict[str, int]) -> float:
        """Until the gateway knows so many nodes of each role; how long that took."""
        begun = time.monotonic()
        with self.client() as client:
            while True:
                try:
                    nodes = client.cluster().nodes
                except Unavailable:
                    nodes = ()
                found = {role: sum(node.role == role for node in nodes) for role in counts}
                if found == counts:
                    return time.monotonic() - begun
                assert time.monotonic() - begun < CHANGE_LIMIT_S, f"the gateway knows {found}"
                time.sleep(0.2)


def main(argv: Sequence[str]) -> int:
    """The exit code: 1 when a check failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--keep", action="store_true", help="leave the project running")
    parser.add_argument("--no-build", action="store_true", help="take the images that are there")
    options = parser.parse_args(argv)
    found = engine_version()
    if not found.version:
        print(f"no Docker engine with Compose here ({found.problem}): images and compose were not tried")
        return 0
    print(f"Docker engine {found.version}")
    project = ComposeProject(ROOT, f"spolia-check-{os.getpid()}", found.command)
    try:
        if not options.no_build:
            timed("images are built", lambda: project.compose("build", timeout_s=3600.0))
        timed(
            "all services are healthy", lambda: project.compose("up", "--no-build", "--wait", timeout_s=START_LIMIT_S)
        )
        with tempfile.TemporaryDirectory() as folder:
            checks = Checks(project, Path(folder), load_samples(ROOT / "models/demo")).all()
            failed = [name for name, check in checks if not timed(name, check)]
    except CommandFailed as error:
        print(f"{error}\n{project.logs()}")
        failed, checks = ["the project did not come up"], []
    finally:
        if not options.keep:
            project.remove()
    print(f"{len(checks) - len(failed) if checks else 0} passed, {len(failed)} failed")
    return 1 if failed else 0


def timed(name: str, act: Callable[[], object]) -> bool:
    """Whether a check held; prints how long it took and what it says. Raises what building or starting raises."""
    begun = time.monotonic()
    try:
        said, mark = act(), "ok"
    except (AssertionError, SpoliaError) as error:
        said, mark = f"{type(error).__name__}: {error}", "FAILED"
    extra = f": {said}" if isinstance(said, str) and said and len(said) < 500 else ""
    print(f"{mark:6} {time.monotonic() - begun:6.1f} s  {name}{extra}", flush=True)
    return mark == "ok"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
