"""One step of the curriculum."""

from __future__ import annotations

from dataclasses import dataclass

from spolia_fidelity.tasks import PLAIN_STYLE, Style


@dataclass(frozen=True, slots=True)
class Stage:
    """Left when `pass_at` of the answers are right on average over recent steps, or after `max_steps`.

    With `pair_gap` >= 0 streams are key-value pairs of random tokens with up to that many fillers between key and
    value, `stream_tokens` long; otherwise parts in one of `styles` (drawn per step) with questions on them. A step
    takes as many streams as fit `step_tokens`, and about `step_tails` questions. Shares of the streams: in `spread`
    there are gaps in the positions; in `inline` some exchanges are part of the stream. The learning rate goes from
    `rate` to `last_rate` times the run's over `max_steps`.
    """

    name: str
    pass_at: float
    step_tokens: int = 4600
    step_tails: int = 128
    stream_tokens: int = 0
    pair_gap: int = -1
    min_parts: int = 1
    max_parts: int = 4
    styles: tuple[Style, ...] = (PLAIN_STYLE,)
    spread: float = 0.0
    inline: float = 0.3
    prose_rows: int = 0
    max_steps: int = 100_000
    rate: float = 1.0
    last_rate: float = 1.0
