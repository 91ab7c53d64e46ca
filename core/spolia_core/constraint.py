"""What an answer must match. Checked here as far as that takes no grammar library and no tokenizer."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import NoReturn

from spolia_core.errors import InvalidRequest
from spolia_core.field_checks import check_field

MAX_SCHEMA_BYTES = 1 << 18
MAX_SCHEMA_DEPTH = 64
"""Objects and arrays inside each other; the grammar library takes twice as many, a stack at least that."""
MAX_REGEX_BYTES = 1 << 13
MAX_LARK_BYTES = 1 << 18
MAX_CHOICES = 1024
MAX_CHOICE_BYTES = 4096
MAX_CHOICES_BYTES = 1 << 16


class ConstraintKind(Enum):
    """How a constraint is stated; the values name the fields of the contract."""

    JSON_SCHEMA = "json_schema"
    JSON_OBJECT = "json_object"
    REGEX = "regex"
    CHOICES = "choices"
    LARK = "lark"

    @property
    def field(self) -> str:
        """The contract's name for it."""
        return f"sampling.{self.value}"


_MAX_BYTES = {
    ConstraintKind.JSON_SCHEMA: MAX_SCHEMA_BYTES,
    ConstraintKind.REGEX: MAX_REGEX_BYTES,
    ConstraintKind.LARK: MAX_LARK_BYTES,
}


@dataclass(frozen=True, slots=True)
class Constraint:
    """What an answer must match, as a whole. `text` is the schema, expression or grammar; `choices` has the choices."""

    kind: ConstraintKind
    text: str = ""
    choices: tuple[str, ...] = ()

    @classmethod
    def json_schema(cls, schema: str | Mapping[str, object]) -> Constraint:
        """A JSON value that `schema` accepts. Raises `InvalidRequest` for a mapping that is no JSON."""
        return cls(ConstraintKind.JSON_SCHEMA, schema if isinstance(schema, str) else _dumped(schema))

    @classmethod
    def json_object(cls) -> Constraint:
        """Any JSON object."""
        return cls(ConstraintKind.JSON_OBJECT)

    @classmethod
    def regex(cls, expression: str) -> Constraint:
        """Text that `expression` matches whole."""
        return cls(ConstraintKind.REGEX, expression)

    @classmethod
    def one_of(cls, choices: Iterable[str]) -> Constraint:
        """One of `choices`."""
        return cls(ConstraintKind.CHOICES, choices=tuple(choices))

    @classmethod
    def lark(cls, grammar: str) -> Constraint:
        """Text of a grammar in llguidance's dialect of Lark."""
        return cls(ConstraintKind.LARK, grammar)

    @property
    def field(self) -> str:
        """The contract's name for it."""
        return self.kind.field

    def validate(self) -> None:
        """Raises `InvalidRequest` naming the field, its limit and its value.

        Passes what only the grammar library can tell: expressions, grammars and keywords of a schema.
        """
        if self.kind is ConstraintKind.CHOICES:
            _check_choices(self.choices, self.field)
        elif self.kind in _MAX_BYTES:
            most = _MAX_BYTES[self.kind]
            size = len(self.text.encode())
            check_field(1 <= size <= most, self.field, f"1 … {most} bytes", f"{size} bytes")
        if self.kind is ConstraintKind.JSON_SCHEMA:
            _check_schema(self.text, self.field)


def _dumped(schema: Mapping[str, object]) -> str:
    try:
        return json.dumps(schema, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        field = f"sampling.{ConstraintKind.JSON_SCHEMA.value}"
        raise InvalidRequest(f"{field} is no JSON: {error}", field=field, limit="JSON") from None


def _check_choices(choices: Sequence[str], field: str) -> None:
    check_field(1 <= len(choices) <= MAX_CHOICES, field, f"1 … {MAX_CHOICES} texts", len(choices))
    sizes = [len(choice.encode()) for choice in choices]
    for size in sizes:
        check_field(1 <= size <= MAX_CHOICE_BYTES, field, f"1 … {MAX_CHOICE_BYTES} bytes each", f"{size} bytes")
    total = sum(sizes)
    check_field(total <= MAX_CHOICES_BYTES, field, f"≤ {MAX_CHOICES_BYTES} bytes together", f"{total} bytes")
    check_field(len(set(choices)) == len(choices), field, "different from each other", "a text twice")


def _check_schema(text: str, field: str) -> None:
    try:
        schema = json.loads(text, parse_constant=_no_json)
    except ValueError as error:
        raise InvalidRequest(f"{field} is no JSON: {error}", field=field, limit="JSON") from None
    except RecursionError:
        schema, depth = {}, MAX_SCHEMA_DEPTH + 1
    else:
        depth = _depth(schema)
    check_field(depth <= MAX_SCHEMA_DEPTH, field, f"≤ {MAX_SCHEMA_DEPTH} levels deep", "more")
    check_field(isinstance(schema, dict), field, "a JSON object", text)


def _no_json(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no number of JSON")


def _depth(value: object) -> int:
    """Levels of objects and arrays in a JSON value, counted no further than a little past the limit."""
    depth, level = 0, [value]
    while level and depth <= MAX_SCHEMA_DEPTH:
        inner = [each for each in level if isinstance(each, dict | list)]
        depth += bool(inner)
        level = [child for each in inner for child in (each.values() if isinstance(each, dict) else each)]
    return depth
