"""The order in which things are learned: looking up comes suddenly or not at all, and the order decides."""

from __future__ import annotations

from .batches import Stage
from .data import Style

_ONE = Style(min_facts=1, max_facts=1, short=0.0, filler=0.0)
_FEW = Style(min_facts=2, max_facts=3, short=0.0, filler=0.0)
_SHORT = Style(min_facts=2, max_facts=4, short=0.3)
_MIXED = Style(min_facts=2, max_facts=6, short=0.5, turned=0.1, wild=0.1)

STAGES: tuple[Stage, ...] = (
    Stage("pairs", rows=64, tokens=96, pass_at=0.9, pair_gap=0),
    Stage("one fact", rows=48, tokens=128, pass_at=0.8, min_documents=2, max_documents=3, style=_ONE),
    Stage("few facts", rows=32, tokens=192, pass_at=0.8, min_documents=2, max_documents=3, style=_FEW),
    Stage(
        "sentences",
        rows=24,
        tokens=256,
        pass_at=0.85,
        min_documents=2,
        max_documents=3,
        style=_SHORT,
        prose_rows=4,
    ),
    Stage(
        "documents",
        rows=16,
        tokens=416,
        pass_at=0.95,
        min_documents=2,
        style=Style(wild=0.05),
        blocks=0.4,
        spread=0.3,
        prose_rows=4,
        max_steps=450,
        last_rate=0.1,
    ),
    Stage(
        "many documents",
        rows=9,
        tokens=832,
        pass_at=2.0,
        min_documents=2,
        max_documents=8,
        style=_MIXED,
        blocks=0.5,
        spread=0.3,
        prose_rows=12,
        max_steps=1300,
        rate=0.5,
        last_rate=0.02,
    ),
)
