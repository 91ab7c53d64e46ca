"""A compose file, as far as its services have to be run: what each starts, with what around it, and when."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml


@dataclass(frozen=True)
class Mount:
    """`source` is a path where it begins with "/", else a volume's name. `target` is where a container sees it."""

    source: str
    target: str
    read_only: bool = False


@dataclass(frozen=True)
class Service:
    """One service of a compose file. What the file leaves to the image is None."""

    name: str
    target: str
    """The Dockerfile's stage; empty for an image that is not built here."""
    image: str
    entrypoint: tuple[str, ...] | None
    command: tuple[str, ...] | None
    env: dict[str, str]
    user: str | None
    mounts: tuple[Mount, ...]
    depends_on: dict[str, str] = field(default_factory=dict)
    healthcheck: tuple[str, ...] | None = None
    replicas: int = 1
    stop_grace_s: float = 10.0
    read_only: bool = False


def read_compose(path: Path, environ: Mapping[str, str]) -> dict[str, Service]:
    """The services that a plain `docker compose up` starts, by name. `environ` is what the file may refer to.

    Raises `ValueError` for a variable that the file asks for and `environ` lacks.
    """
    content = yaml.safe_load(path.read_text())
    files = {
        name: str((path.parent / each["file"]).resolve())
        for kind in ("configs", "secrets")
        for name, each in content.get(kind, {}).items()
        if "file" in each
    }
    return {
        name: _service(name, _filled_in(given, environ), path.parent, files)
        for name, given in content["services"].items()
        if not given.get("profiles")
    }


def _service(name: str, given: Mapping[str, Any], folder: Path, files: Mapping[str, str]) -> Service:
    build = given.get("build", {})
    mounts = [_mount(each, folder) for each in given.get("volumes", ())]
    mounts += [_file_mount(each, files, "/") for each in given.get("configs", ())]
    mounts += [_file_mount(each, files, "/run/secrets/") for each in given.get("secrets", ())]
    return Service(
        name=name,
        target=build.get("target", "") if isinstance(build, Mapping) else "",
        image=given.get("image", ""),
        entrypoint=_words(given.get("entrypoint")),
        command=_words(given.get("command")),
        env=_environment(given.get("environment", {})),
        user=_numeric(given.get("user")),
        mounts=tuple(mounts),
        depends_on=_depends_on(given.get("depends_on", {})),
        healthcheck=_test(given.get("healthcheck", {})),
        replicas=int(given.get("scale") or given.get("deploy", {}).get("replicas") or 1),
        stop_grace_s=_seconds(given.get("stop_grace_period", "10s")),
        read_only=bool(given.get("read_only", False)),
    )


def _filled_in(value: Any, environ: Mapping[str, str]) -> Any:
    if isinstance(value, str):
        return re.sub(r"\$(?:\$|\{(\w+)(?:(:?[-?])([^}]*))?\}|(\w+))", lambda found: _variable(found, environ), value)
    if isinstance(value, Mapping):
        return {key: _filled_in(each, environ) for key, each in value.items()}
    if isinstance(value, list):
        return [_filled_in(each, environ) for each in value]
    return value


def _variable(found: re.Match[str], environ: Mapping[str, str]) -> str:
    if found[0] == "$$":
        return "$"
    name, otherwise = found[1] or found[4], found[2] or ""
    if environ.get(name) or (name in environ and not otherwise.startswith(":")):
        return environ[name]
    if otherwise.endswith("?"):
        raise ValueError(f"{name} must be set: {found[3]}")
    return found[3] or ""


def _numeric(user: str | None) -> str | None:
    """Names are those of an image's own users: None, for whoever owns the volumes here."""
    return user if user is not None and user.replace(":", "").isdecimal() else None


def _words(value: str | Sequence[str] | None) -> tuple[str, ...] | None:
    if value is None:
        return None
    return tuple(shlex.split(value)) if isinstance(value, str) else tuple(map(str, value))


def _environment(value: Mapping[str, Any] | Sequence[str]) -> dict[str, str]:
    if isinstance(value, Mapping):
        return {key: _env_text(each) for key, each in value.items()}
    return dict(each.split("=", 1) for each in value)


def _env_text(value: Any) -> str:
    if value is None:
        return ""
    return str(value).lower() if isinstance(value, bool) else str(value)


def _depends_on(value: Mapping[str, Any] | Sequence[str]) -> dict[str, str]:
    if isinstance(value, Mapping):
        return {name: each.get("condition", "service_started") for name, each in value.items()}
    return dict.fromkeys(value, "service_started")


def _test(value: Mapping[str, Any]) -> tuple[str, ...] | None:
    test = value.get("test")
    if value.get("disable") or test in ("NONE", ["NONE"]):
        return ()
    if test is None:
        return None
    if isinstance(test, str):
        return ("sh", "-c", test)
    return ("sh", "-c", test[1]) if test[0] == "CMD-SHELL" else tuple(test[1:])


def _mount(value: str | Mapping[str, Any], folder: Path) -> Mount:
    if isinstance(value, str):
        source, target, *options = value.split(":")
        return Mount(_source(source, folder), target, "ro" in options)
    subpath = value.get("volume", {}).get("subpath", "")
    source = _source(value["source"], folder)
    return Mount(f"{source}/{subpath}" if subpath else source, value["target"], bool(value.get("read_only", False)))


def _file_mount(value: str | Mapping[str, Any], files: Mapping[str, str], where: str) -> Mount:
    source = value if isinstance(value, str) else value["source"]
    target = source if isinstance(value, str) else value.get("target", source)
    return Mount(files[source], target if target.startswith("/") else f"{where}{target}", read_only=True)


def _source(source: str, folder: Path) -> str:
    return str((folder / source).resolve()) if source.startswith((".", "/", "~")) else source


def _seconds(text: str) -> float:
    units = {"h": 3600.0, "m": 60.0, "s": 1.0, "ms": 0.001}
    return sum(float(number) * units[unit] for number, unit in re.findall(r"([\d.]+)(ms|h|m|s)", str(text)))
