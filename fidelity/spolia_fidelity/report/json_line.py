"""The whole result as one JSON object."""

from __future__ import annotations

import json
from typing import Any

from spolia_fidelity.result import EvalResult
from spolia_fidelity.result_json import plain

FORMAT = 1
"""Rises when a field changes its meaning or goes."""


def record_of(result: EvalResult) -> dict[str, Any]:
    """Plain JSON values: the tree as it is, with each policy's recomputed share. Ends of no interval are null."""
    record: dict[str, Any] = {"kind": "spolia-eval", "format": FORMAT, **plain(result)}
    for policy, fields in zip(result.policies, record["policies"], strict=True):
        fields["recomputed_share"] = policy.recomputed_share
    return record


def json_line(result: EvalResult) -> str:
    """`record_of` on one line of ASCII, without its line end."""
    return json.dumps(record_of(result), allow_nan=False)
