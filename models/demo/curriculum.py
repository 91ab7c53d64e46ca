"""The order in which things are learned: looking up comes suddenly or not at all, and the order decides."""

from __future__ import annotations

from spolia_fidelity.tasks import Style

from .stage import Stage

_ONE = Style(min_facts=1, max_facts=1, part_words=0, short=0.0, cuts=0.0, bridges=0.0)
_FEW = Style(min_facts=2, max_facts=3, part_words=0, short=0.0, cuts=0.0, bridges=0.0)
_SHORT = Style(min_facts=2, max_facts=4, part_words=0, short=0.3, cuts=0.0, bridges=0.0)
_CUT = Style(min_facts=2, max_facts=5, part_words=50, cuts=0.7, same_kind=0.5)
_LONG = Style(cuts=0.6, same_kind=0.5)
_BRIDGED = Style(cuts=0.4, bridges=0.9, same_kind=0.1)
_RARE = Style(min_facts=2, max_facts=6, part_words=60, short=0.5, turned=0.15, wild=0.15)

STAGES: tuple[Stage, ...] = (
    Stage("pairs", pass_at=0.9, step_tokens=6144, stream_tokens=96, pair_gap=0),
    Stage("one fact", pass_at=0.8, min_parts=2, max_parts=3, styles=(_ONE,)),
    Stage("few facts", pass_at=0.8, min_parts=2, max_parts=3, styles=(_FEW,)),
    Stage("sentences", pass_at=0.85, min_parts=2, max_parts=3, styles=(_SHORT,), prose_rows=4),
    Stage(
        "documents",
        pass_at=0.95,
        min_parts=2,
        styles=(_SHORT, _CUT),
        spread=0.3,
        prose_rows=4,
        max_steps=450,
        last_rate=0.1,
    ),
    Stage("parts", pass_at=2.0, min_parts=2, max_parts=6, styles=(_SHORT, _CUT), prose_rows=8, max_steps=400, rate=0.5),
    Stage(
        "long parts",
        pass_at=2.0,
        min_parts=2,
        max_parts=9,
        styles=(_CUT, _LONG, _LONG, _BRIDGED, _RARE),
        spread=0.3,
        prose_rows=6,
        max_steps=1100,
        rate=0.5,
        last_rate=0.03,
    ),
    Stage(
        "many parts",
        pass_at=2.0,
        min_parts=8,
        max_parts=18,
        styles=(_LONG, _LONG, _BRIDGED),
        spread=0.2,
        prose_rows=6,
        max_steps=200,
        rate=0.06,
        last_rate=0.005,
    ),
    Stage(
        "all lengths",
        pass_at=2.0,
        step_tails=160,
        min_parts=5,
        max_parts=16,
        styles=(_LONG, _LONG, _BRIDGED),
        spread=0.2,
        prose_rows=6,
        max_steps=430,
        rate=0.2,
        last_rate=0.004,
    ),
)
