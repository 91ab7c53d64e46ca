"""Figures as words: one way to write each unit, in every report."""

from __future__ import annotations

from spolia_fidelity.estimate import Estimate

NONE = "–"
ZERO = Estimate(0.0, 0.0, 0.0)
"""Exactly nothing, not something that rounds to it: written "0"."""


def percent(share: float) -> str:
    """A share as "97.3 %"."""
    return f"{100 * share:.1f} %"


def nats(estimate: Estimate) -> str:
    """A difference in nats, signed, with its interval."""
    return _with_interval(estimate, "{:+.4f}")


def divergence(estimate: Estimate) -> str:
    """A KL divergence in nats, with its interval."""
    return _with_interval(estimate, "{:.4f}")


def points(estimate: Estimate | None) -> str:
    """A loss in percentage points, signed, with its interval."""
    return NONE if estimate is None else _with_interval(estimate, "{:+.1f}")


def share(estimate: Estimate | None) -> str:
    """A share in per cent, with its interval."""
    return NONE if estimate is None else _with_interval(estimate.scaled(100.0), "{:.1f}") + " %"


def duration(seconds: float) -> str:
    """ "48 s" or "6 min 2 s"."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def count(number: int) -> str:
    """With thousands set apart."""
    return f"{number:,}"


def _with_interval(estimate: Estimate, form: str) -> str:
    if estimate == ZERO:
        return "0"
    value = _word(form, estimate.value)
    if not estimate.has_interval:
        return f"{value} [no interval]"
    end = form.replace("+", "")
    return f"{value} [{_word(end, estimate.low)}, {_word(end, estimate.high)}]"


def _word(form: str, value: float) -> str:
    """The number as `form` writes it, but for a negative zero."""
    word = form.format(value)
    return form.format(0.0) if word.startswith("-") and not word.strip("-0.") else word
