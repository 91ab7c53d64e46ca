"""Prints what extras of pyproject.toml depend on, for pip. Images install that first: code changes more often.

python requirements.py gateway cli > requirements.txt
"""

from __future__ import annotations

import re
import sys
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

_OWN_EXTRAS = re.compile(r"\s*(?P<name>[\w.-]+)\s*\[(?P<extras>[^\]]*)\]\s*")


def requirements_of(project: dict[str, Any], extras: Sequence[str]) -> list[str]:
    """Requirements of a project's own and of some extras, each once, in order; extras of extras included.

    Raises `KeyError` for an extra that there is not.
    """
    found = [*project["dependencies"], *(item for extra in extras for item in _of_extra(project, extra))]
    return list(dict.fromkeys(found))


def _of_extra(project: dict[str, Any], extra: str) -> Iterator[str]:
    for requirement in project["optional-dependencies"][extra]:
        own = _OWN_EXTRAS.fullmatch(requirement)
        if own is None or own["name"] != project["name"]:
            yield requirement
            continue
        for name in own["extras"].split(","):
            yield from _of_extra(project, name.strip())


if __name__ == "__main__":
    pyproject = Path(__file__).with_name("pyproject.toml")
    print("\n".join(requirements_of(tomllib.loads(pyproject.read_text())["project"], sys.argv[1:])))
