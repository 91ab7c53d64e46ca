"""What a Dockerfile says of the images it builds, as far as running them goes: environment, command, user, files."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path


@dataclass(frozen=True)
class Image:
    """A stage of a Dockerfile, what it inherits from other stages included. `files`: path inside → path here."""

    env: dict[str, str] = field(default_factory=dict)
    entrypoint: tuple[str, ...] = ()
    command: tuple[str, ...] = ()
    user: str = "0:0"
    healthcheck: tuple[str, ...] = ()
    files: dict[str, Path] = field(default_factory=dict)


def read_images(dockerfile: Path, context: Path) -> dict[str, Image]:
    """Every stage by its name. Only instructions that matter to a running container are read."""
    images: dict[str, Image] = {}
    name, image = "", Image()
    for instruction, rest in _instructions(dockerfile):
        match instruction:
            case "FROM":
                base, _, name = rest.partition(" AS ")
                image = images.get(base.strip(), Image())
            case "ENV":
                pairs = dict(word.split("=", 1) for word in shlex.split(rest))
                image = replace(image, env=image.env | {key: _expanded(value, image) for key, value in pairs.items()})
            case "ENTRYPOINT":
                image = replace(image, entrypoint=tuple(json.loads(rest)), command=())
            case "CMD":
                image = replace(image, command=tuple(json.loads(rest)))
            case "USER":
                image = replace(image, user=rest)
            case "HEALTHCHECK":
                _, _, test = rest.partition("CMD ")
                image = replace(image, healthcheck=tuple(json.loads(test)) if test else ())
            case "COPY" if not rest.startswith("--") and len(rest.split()) == 2:
                source, target = rest.split()
                if target.startswith("/") and (context / source).is_file():
                    image = replace(image, files=image.files | {target: context / source})
        images[name.strip()] = image
    return images


def _instructions(dockerfile: Path) -> Iterator[tuple[str, str]]:
    text = re.sub(r"(?m)^\s*#.*\n", "", dockerfile.read_text())
    for line in re.sub(r"\\\n", " ", text).splitlines():
        instruction, _, rest = line.strip().partition(" ")
        if instruction:
            yield instruction.upper(), rest.strip()


def _expanded(value: str, image: Image) -> str:
    return re.sub(r"\$\{?(\w+)\}?", lambda found: image.env.get(found[1], ""), value)
