"""Constraints are refused by field, limit and value, before anybody compiles them."""

from __future__ import annotations

import json
from typing import Any

import pytest

from spolia_core.constraint import (
    MAX_CHOICE_BYTES,
    MAX_CHOICES,
    MAX_LARK_BYTES,
    MAX_REGEX_BYTES,
    MAX_SCHEMA_BYTES,
    MAX_SCHEMA_DEPTH,
    Constraint,
)
from spolia_core.errors import InvalidRequest
from spolia_core.sampling import SamplingParams

GOOD = [
    Constraint.json_schema({"type": "object", "properties": {"name": {"type": "string"}}}),
    Constraint.json_schema("{}"),
    Constraint.json_object(),
    Constraint.regex("[0-9]+"),
    Constraint.one_of(["yes", "no"]),
    Constraint.lark('start: "a"'),
]
BAD = [
    (Constraint.json_schema(""), "sampling.json_schema", "1 … 262144 bytes"),
    (Constraint.json_schema(" " * (MAX_SCHEMA_BYTES + 1)), "sampling.json_schema", "1 … 262144 bytes"),
    (Constraint.json_schema("{"), "sampling.json_schema", "JSON"),
    (Constraint.json_schema('{"const": NaN}'), "sampling.json_schema", "JSON"),
    (Constraint.json_schema("[]"), "sampling.json_schema", "a JSON object"),
    (Constraint.json_schema("true"), "sampling.json_schema", "a JSON object"),
    (Constraint.json_schema('{"not":' * 200_00 + "1" + "}" * 200_00), "sampling.json_schema", "≤ 64 levels deep"),
    (Constraint.regex(""), "sampling.regex", "1 … 8192 bytes"),
    (Constraint.regex("é" * (MAX_REGEX_BYTES // 2 + 1)), "sampling.regex", "1 … 8192 bytes"),
    (Constraint.lark("x" * (MAX_LARK_BYTES + 1)), "sampling.lark", "1 … 262144 bytes"),
    (Constraint.one_of([]), "sampling.choices", "1 … 1024 texts"),
    (Constraint.one_of(map(str, range(MAX_CHOICES + 1))), "sampling.choices", "1 … 1024 texts"),
    (Constraint.one_of(["a", ""]), "sampling.choices", "1 … 4096 bytes each"),
    (Constraint.one_of(["a" * (MAX_CHOICE_BYTES + 1)]), "sampling.choices", "1 … 4096 bytes each"),
    (Constraint.one_of([f"{i:4096}" for i in range(17)]), "sampling.choices", "≤ 65536 bytes together"),
    (Constraint.one_of(["a", "b", "a"]), "sampling.choices", "different from each other"),
]


@pytest.mark.parametrize("constraint", GOOD)
def test_good_constraints_pass(constraint: Constraint) -> None:
    SamplingParams(constraint=constraint).validate()


@pytest.mark.parametrize(("constraint", "field", "limit"), BAD, ids=range(len(BAD)))
def test_bad_constraints_name_field_and_limit(constraint: Constraint, field: str, limit: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        SamplingParams(constraint=constraint).validate()
    assert (caught.value.field, caught.value.limit) == (field, limit)
    assert len(caught.value.actual) <= 200


def test_depth_is_counted_in_levels() -> None:
    schema: dict[str, Any] = {}
    for _ in range(MAX_SCHEMA_DEPTH - 1):
        schema = {"items": schema}
    Constraint.json_schema(schema).validate()
    with pytest.raises(InvalidRequest, match="levels deep"):
        Constraint.json_schema({"items": schema}).validate()
    # Strings that look deep are not.
    Constraint.json_schema(json.dumps({"description": "[" * 1000})).validate()


def test_mappings_that_are_no_json_are_refused() -> None:
    itself: dict[str, Any] = {}
    itself["items"] = itself
    for schema in ({"const": {1, 2}}, {"const": float("inf")}, itself):
        with pytest.raises(InvalidRequest) as caught:
            Constraint.json_schema(schema)
        assert caught.value.field == "sampling.json_schema"


def test_an_answer_under_a_constraint_cannot_go_on_past_its_end() -> None:
    with pytest.raises(InvalidRequest) as caught:
        SamplingParams(ignore_eos=True, constraint=Constraint.json_object()).validate()
    assert caught.value.field == "sampling.ignore_eos"
