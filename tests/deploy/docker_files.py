"""The Dockerfile and the compose files, read as far as tests hold them against the services."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "docker"
DOCKERFILE = DOCKER / "Dockerfile"
COMPOSE, COMPOSE_GPU = DOCKER / "compose.yaml", DOCKER / "compose.gpu.yaml"


@dataclass(frozen=True)
class Stage:
    """One stage of the Dockerfile, with what it has from the stages below it."""

    name: str
    env: dict[str, str] = field(default_factory=dict)
    user: str = ""
    ports: tuple[int, ...] = ()
    entrypoint: tuple[str, ...] = ()
    command: tuple[str, ...] = ()
    probe: tuple[str, ...] = ()
    probe_options: dict[str, str] = field(default_factory=dict)


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile's, in order, their lines joined."""
    text = re.sub(r"(?m)^\s*#.*\n", "", DOCKERFILE.read_text())
    lines = re.sub(r"\s*\\\n\s*", " ", text).splitlines()
    return [(word, rest.strip()) for word, _, rest in (line.partition(" ") for line in lines) if word]


def stages() -> dict[str, Stage]:
    """By name."""
    found: dict[str, Stage] = {}
    now = Stage("")
    for word, rest in instructions():
        if word == "FROM":
            below, _, name = rest.rpartition(" AS ")
            now = replace(found.get(below, Stage("")), name=name)
        elif word == "ENV":
            now = replace(now, env=now.env | dict(pair.split("=", 1) for pair in shlex.split(rest)))
        elif word == "USER":
            now = replace(now, user=rest)
        elif word == "EXPOSE":
            now = replace(now, ports=(*now.ports, *map(int, rest.split())))
        elif word == "ENTRYPOINT":
            now = replace(now, entrypoint=tuple(json.loads(rest)))
        elif word == "CMD":
            now = replace(now, command=tuple(json.loads(rest)))
        elif word == "HEALTHCHECK" and rest != "NONE":
            options, _, probe = rest.partition("CMD ")
            pairs = dict(option.removeprefix("--").split("=") for option in options.split())
            now = replace(now, probe=tuple(json.loads(probe)), probe_options=pairs)
        found[now.name] = now
    return found


def compose(path: Path = COMPOSE) -> dict[str, Any]:
    """The file with the defaults of what it leaves to the environment."""

    def filled(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: filled(item) for name, item in value.items()}
        if isinstance(value, list):
            return [filled(item) for item in value]
        return re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", value) if isinstance(value, str) else value

    read: dict[str, Any] = filled(yaml.safe_load(path.read_text()))
    return read


def stage_of(service: dict[str, Any]) -> Stage:
    """What a service's image is built from."""
    name = service["image"].removeprefix("spolia-").partition(":")[0]
    return stages()[name]


def seconds(text: str) -> float:
    """Of "75s"."""
    return float(text.removesuffix("s"))


def num_bytes(text: str) -> int:
    """Of "512m" or "16g"."""
    return int(text[:-1]) * {"k": 1 << 10, "m": 1 << 20, "g": 1 << 30}[text[-1]]


def load(name: str) -> Any:
    """A program of docker/, as a module."""
    spec = importlib.util.spec_from_file_location(name, DOCKER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module
