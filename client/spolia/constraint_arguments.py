"""The constraint that a caller's arguments ask for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from spolia.argument_checks import checked_bool, checked_items, checked_text, wrong_type
from spolia_core.constraint import Constraint
from spolia_core.errors import InvalidRequest


def constraint_asked(
    json_schema: str | Mapping[str, object] | None,
    json_object: bool,
    regex: str | None,
    choices: Sequence[str] | None,
    lark: str | None,
) -> Constraint | None:
    """The one constraint that is asked for, if any. Raises `InvalidRequest` for a wrong type, and for more than one."""
    asked: list[Constraint] = []
    if json_schema is not None:
        asked.append(Constraint.json_schema(_schema(json_schema)))
    if checked_bool(json_object, "sampling.json_object"):
        asked.append(Constraint.json_object())
    if regex is not None:
        asked.append(Constraint.regex(checked_text(regex, "sampling.regex")))
    if choices is not None:
        given = checked_items(choices, "sampling.choices", "a sequence of str")
        asked.append(Constraint.one_of([checked_text(text, "sampling.choices") for text in given]))
    if lark is not None:
        asked.append(Constraint.lark(checked_text(lark, "sampling.lark")))
    if len(asked) > 1:
        names = ", ".join(each.field for each in asked)
        raise InvalidRequest(
            f"an answer has one constraint, got {names}", field=asked[1].field, limit="one constraint", actual=names
        )
    return asked[0] if asked else None


def _schema(given: object) -> str | Mapping[str, object]:
    if isinstance(given, Mapping):
        return given
    if isinstance(given, str):
        return checked_text(given, "sampling.json_schema")
    raise wrong_type(given, "sampling.json_schema", "a mapping or str")
