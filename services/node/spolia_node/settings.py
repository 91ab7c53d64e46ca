"""Settings: fields of a configuration class that know their sentence, their type and their limits."""

from __future__ import annotations

import dataclasses
import math
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")

Check = Callable[[Any], str | None]
"""Takes a value; None when it is good, else what it must be, for example "at least 1"."""

_TRUE, _FALSE = ("1", "true", "yes", "on"), ("0", "false", "no", "off")


def setting(default: T, help: str, *, check: Callable[[T], str | None] | None = None, secret: bool = False) -> T:
    """A field of a configuration class: its default, a sentence saying when to change it, and its limits.

    `check` returns what the value must be ("at least 1") when it is not. A secret's value is left out of `repr`, help
    and messages. Types: str, int, float, bool, Path, tuple[str, ...], and any of them `| None`.
    """
    metadata = {"help": help, "check": check, "secret": secret}
    return dataclasses.field(default=default, metadata=metadata, repr=not secret)


def at_least(low: float) -> Check:
    """A number no smaller than `low`."""
    return lambda value: None if value is None or value >= low else f"at least {low}"


def between(low: float, high: float) -> Check:
    """A number in [low, high]."""
    return lambda value: None if value is None or low <= value <= high else f"between {low} and {high}"


def one_of(*choices: str) -> Check:
    """One of some words."""
    return lambda value: None if value is None or value in choices else f"one of {', '.join(choices)}"


@dataclasses.dataclass(frozen=True, slots=True)
class Setting:
    """One field, opened: what `load_config` and `--help` need of it."""

    name: str
    kind: Any
    optional: bool
    default: object
    help: str
    check: Check | None
    secret: bool

    @property
    def flag(self) -> str:
        """Its flag on the command line."""
        return "--" + self.name.replace("_", "-")

    @property
    def env(self) -> str:
        """Its environment variable."""
        return "SPOLIA_" + self.name.upper()

    def from_text(self, text: str) -> object:
        """The value a flag or the environment gives. Raises `ValueError` that says what the value must be."""
        if self.optional and text.strip().lower() in ("", "none"):
            return None
        return _checked(self, _READERS[self.kind](text))

    def from_toml(self, value: object) -> object:
        """The value a TOML file gives: of the setting's own type, or text. Raises `ValueError` as `from_text` does."""
        if self.kind == _WORDS and isinstance(value, list) and all(isinstance(item, str) for item in value):
            return _checked(self, tuple(value))
        if isinstance(value, str):
            return self.from_text(value)
        if self.kind is float and type(value) is int:
            value = float(value)
        if type(value) is not self.kind:
            raise ValueError(f"must be {_KIND_NAMES[self.kind]}")
        return _checked(self, value)

    def problem(self, value: object) -> str | None:
        """What is wrong with a value of the right type: "must be at least 1". None when nothing is."""
        if isinstance(value, float) and not math.isfinite(value):
            return "must be a finite number"
        must_be = self.check(value) if self.check is not None else None
        return f"must be {must_be}" if must_be else None

    def shown(self, value: object) -> str:
        """The value as help and messages show it; of a secret only whether there is one."""
        if value is None:
            return "none"
        if self.secret and value:
            return "(secret)"
        if isinstance(value, tuple):
            return ",".join(value) or '""'
        return {True: "true", False: "false"}[value] if isinstance(value, bool) else str(value) or '""'


def settings_of(cls: type[Any]) -> list[Setting]:
    """The settings of a configuration class, its bases' first. Raises `TypeError` for a type that cannot be read."""
    hints = get_type_hints(cls)
    return [_opened(field, hints[field.name]) for field in dataclasses.fields(cls)]


def _opened(field: dataclasses.Field[Any], hint: Any) -> Setting:
    kind, optional = hint, False
    if get_origin(hint) in (Union, types.UnionType) and type(None) in get_args(hint):
        (kind,), optional = [arg for arg in get_args(hint) if arg is not type(None)], True
    if kind not in _READERS:
        raise TypeError(f"setting {field.name} has type {hint}, which no text can be read as")
    meta = field.metadata
    return Setting(
        field.name, kind, optional, field.default, meta.get("help", ""), meta.get("check"), meta.get("secret", False)
    )


def _checked(setting: Setting, value: object) -> object:
    problem = setting.problem(value)
    if problem:
        raise ValueError(problem)
    return value


def _whole(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ValueError("must be a whole number") from None


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError("must be a number") from None


def _truth(text: str) -> bool:
    word = text.strip().lower()
    if word not in _TRUE + _FALSE:
        raise ValueError("must be true or false")
    return word in _TRUE


def _words(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(",") if word.strip())


_WORDS: Any = tuple[str, ...]
_READERS: dict[Any, Callable[[str], object]] = {
    str: str,
    int: _whole,
    float: _number,
    bool: _truth,
    Path: lambda text: Path(text).expanduser(),
    _WORDS: _words,
}
_KIND_NAMES: dict[Any, str] = {
    str: "text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    Path: "a path",
    _WORDS: "a list of texts",
}
