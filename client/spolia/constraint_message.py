"""A constraint to its fields of `SamplingParams` and back, for clients and nodes alike."""

from __future__ import annotations

from spolia.v1 import common_pb2
from spolia_core.constraint import Constraint, ConstraintKind


def set_constraint(message: common_pb2.SamplingParams, constraint: Constraint | None) -> None:
    """Writes `constraint` into `message`; None writes nothing."""
    if constraint is None:
        return
    match constraint.kind:
        case ConstraintKind.JSON_OBJECT:
            message.json_object.SetInParent()
        case ConstraintKind.CHOICES:
            message.choices.texts[:] = constraint.choices
        case kind:
            setattr(message, kind.value, constraint.text)


def constraint_of(message: common_pb2.SamplingParams) -> Constraint | None:
    """The constraint of `message`, not checked yet; None where it has none."""
    match message.WhichOneof("constraint"):
        case None:
            return None
        case "json_object":
            return Constraint.json_object()
        case "choices":
            return Constraint.one_of(message.choices.texts)
        case name:
            return Constraint(ConstraintKind(name), getattr(message, name))
