"""A compose project under a name of its own, through the commands a person has."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

COMMAND_LIMIT_S = 120.0
PORTS = ("HTTP_PORT", "GRPC_PORT", "GRAFANA_PORT")


class CommandFailed(Exception):
    """A command of Docker ended with an error, or did not end in time."""


@dataclass(frozen=True, slots=True)
class Engine:
    """What was found: the engine's version and how Compose is called, or why there is none."""

    version: str = ""
    command: tuple[str, ...] = ()
    problem: str = ""


def engine_version() -> Engine:
    """The engine that answers here, if one does and Compose is there."""
    if shutil.which("docker") is None:
        return Engine(problem="there is no docker command")
    asked = _run(["docker", "version", "--format", "{{.Server.Version}}"], 20.0)
    if asked.returncode:
        return Engine(problem=asked.stderr.strip() or "the engine does not answer")
    for command in (("docker", "compose"), ("docker-compose",)):
        if shutil.which(command[0]) and not _run([*command, "version"], 20.0).returncode:
            return Engine(asked.stdout.strip(), command)
    return Engine(problem="there is no docker compose command")


class ComposeProject:
    """One project of `docker/compose.yaml`. Its published ports are chosen by the engine."""

    def __init__(self, root: Path, name: str, command: Sequence[str]) -> None:
        self.name = name
        self._root = root
        self._compose = [*command, "-p", name, "-f", str(root / "docker/compose.yaml")]

    def compose(self, *arguments: str, timeout_s: float = COMMAND_LIMIT_S) -> str:
        """What `docker compose …` wrote. Raises `CommandFailed`."""
        return _output([*self._compose, *arguments], timeout_s)

    def docker(self, *arguments: str, timeout_s: float = COMMAND_LIMIT_S) -> str:
        """What `docker …` wrote. Raises `CommandFailed`."""
        return _output(["docker", *arguments], timeout_s)

    def run(self, service: str, *arguments: str, timeout_s: float = COMMAND_LIMIT_S) -> str:
        """Runs a service once, with these arguments; what it wrote."""
        return self.compose("run", "--rm", "--no-TTY", service, *arguments, timeout_s=timeout_s)

    def tool(self, program: str, *arguments: str) -> str:
        """Runs a program of the operator's container; what it wrote."""
        return self.compose("run", "--rm", "--no-TTY", "--entrypoint", program, "tools", *arguments)

    def containers(self, service: str) -> list[str]:
        """Ids of a service's containers, in order."""
        return self.compose("ps", "--quiet", service).split()

    def port(self, service: str, inside: int) -> int:
        """Where a port of a service is published on this machine."""
        return int(self.compose("port", service, str(inside)).strip().rpartition(":")[2])

    def wait_healthy(self, container: str, limit_s: float) -> None:
        """Raises `CommandFailed` when the container is not healthy in time."""
        deadline_s = time.monotonic() + limit_s
        while self.docker("inspect", "--format", "{{.State.Health.Status}}", container).strip() != "healthy":
            if time.monotonic() > deadline_s:
                raise CommandFailed(f"{container} is not healthy after {limit_s:g} s\n{self.docker('logs', container)}")
            time.sleep(0.5)

    def logs(self) -> str:
        """The end of every service's log."""
        return self.compose("logs", "--tail", "20")

    def remove(self) -> None:
        """Ends everything and removes its volumes; says what could not be."""
        try:
            self.compose("--profile", "*", "down", "--volumes", "--remove-orphans", timeout_s=300.0)
        except CommandFailed as error:
            print(f"{self.name} could not be removed: {error}")


def _output(command: Sequence[str], timeout_s: float) -> str:
    done = _run(command, timeout_s)
    if done.returncode:
        raise CommandFailed(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    return done.stdout


def _run(command: Sequence[str], timeout_s: float) -> subprocess.CompletedProcess[str]:
    environ = os.environ | dict.fromkeys(PORTS, "0")
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, env=environ, check=False)
    except subprocess.TimeoutExpired as error:
        raise CommandFailed(f"{' '.join(command)} did not end within {timeout_s:g} s") from error
