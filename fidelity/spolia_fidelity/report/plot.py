"""Loss against recomputed tokens, as an SVG that reads in light and dark and by a screen reader."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from html import escape

from spolia_fidelity.estimate import Estimate
from spolia_fidelity.report.panel import HEIGHT, WIDTH, Panel, Point
from spolia_fidelity.report.words import nats, percent, points
from spolia_fidelity.result import ALL_TASKS, EvalResult, Figures

GUTTER = 24
HEAD = 56
FOOT = 36
MAX_COLUMNS = 3

STYLE = """
  svg { --paper: #ffffff } .bg { fill: var(--paper) }
  text { fill: #1f2328; font-family: system-ui, "Segoe UI", "DejaVu Sans", sans-serif }
  .title { font-size: 15px; font-weight: 600 } .panel { font-size: 13px; font-weight: 600 }
  .tick, .note { font-size: 11px; fill: #59636e }
  .label { font-size: 11px; paint-order: stroke; stroke: var(--paper); stroke-width: 3px }
  .axis { stroke: #59636e } .grid { stroke: #d1d9e0; stroke-width: .6 } .zero { stroke: #1f2328; stroke-width: 1.2 }
  .bound { stroke: #59636e; stroke-dasharray: 5 4 } .leader { stroke: #8c959f; stroke-width: .7 }
  .link { --ink: #0072b2 } .sinks { --ink: #00795a } .cacheblend { --ink: #c04f00 } .other { --ink: #7a4fa3 }
  .curve { fill: none; stroke: var(--ink); stroke-width: 1.2; opacity: .55 }
  .bar { fill: none; stroke: var(--ink); stroke-width: 1.4 } .dot { fill: var(--ink) }
  @media (prefers-color-scheme: dark) {
    svg { --paper: #0d1117 } text { fill: #f0f6fc } .tick, .note { fill: #9198a1 } .axis, .bound { stroke: #9198a1 }
    .grid { stroke: #2f353d } .zero { stroke: #f0f6fc } .leader { stroke: #656c76 }
    .link { --ink: #58b0f0 } .sinks { --ink: #3fd0a4 } .cacheblend { --ink: #ff9b57 } .other { --ink: #c9a2f0 }
  }
"""


@dataclass(frozen=True, slots=True)
class Limits:
    """The dashed lines: what the reader is willing to lose."""

    nll_increase_nats: float = 0.01
    loss_points: float = 1.0


def loss_plot(result: EvalResult, limits: Limits | None = None) -> str:
    """An SVG of small multiples: ΔNLL over all questions, each task's exact match, ΔNLL of tasks that have none.

    Full recompute is the zero line. Every other policy is a point at its share of recomputed chunk tokens, with its
    interval as a bar; policies that differ in k only are joined.
    """
    limits = limits or Limits()
    nats_limit, points_limit = limits.nll_increase_nats, limits.loss_points
    scored = [task for task in result.tasks if _has_loss(result, task)]
    panels = [_panel(result, "ΔNLL, all questions", "nats per token", nats_limit, ALL_TASKS, _nll)]
    panels += [
        _panel(result, f"{task}: exact match lost", "percentage points", points_limit, task, _loss) for task in scored
    ]
    if len(result.tasks) > 1:
        panels += [
            _panel(result, f"{task}: ΔNLL", "nats per token", nats_limit, task, _nll)
            for task in result.tasks
            if task not in scored
        ]
    columns = min(MAX_COLUMNS, len(panels))
    if len(panels) == 4:
        columns = 2
    rows = -(-len(panels) // columns)
    width = columns * WIDTH + (columns + 1) * GUTTER
    height = HEAD + rows * (HEIGHT + GUTTER) + FOOT
    drawn = "\n".join(
        panel.draw(GUTTER + (index % columns) * (WIDTH + GUTTER), HEAD + (index // columns) * (HEIGHT + GUTTER))
        for index, panel in enumerate(panels)
    )
    title = f"Loss against recomputed tokens: {result.run.model}"
    notes = (
        f"Points are policies, bars {100 * result.run.level:g} % intervals. Full recompute is the zero line.",
        "Dashed: the bound. Scales are linear up to the bound and logarithmic beyond.",
    )
    foot = "\n".join(
        f'<text class="note" x="{GUTTER}" y="{height - FOOT + 4 + 16 * line}">{escape(note)}</text>'
        for line, note in enumerate(notes)
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'role="img" aria-labelledby="title desc">\n'
        f'<title id="title">{escape(title)}</title>\n<desc id="desc">{escape(_description(result))}</desc>\n'
        f'<style>{STYLE}</style>\n<rect class="bg" width="{width}" height="{height}"/>\n'
        f'<text class="title" x="{GUTTER}" y="32">{escape(title)}</text>\n{drawn}\n{foot}\n</svg>\n'
    )


def family(name: str) -> str:
    """The class a policy is drawn in: naive is link with k = 0."""
    if "sinks:" in name:
        return "sinks"
    if name == "naive" or name.startswith("link:"):
        return "link"
    return "cacheblend" if name.startswith("cacheblend") else "other"


def _has_loss(result: EvalResult, task: str) -> bool:
    return any(_loss(policy.figures(task)) is not None for policy in result.policies)


def _nll(figures: Figures | None) -> Estimate | None:
    return figures.nll_increase if figures else None


def _loss(figures: Figures | None) -> Estimate | None:
    return figures.loss_points if figures else None


def _panel(
    result: EvalResult,
    title: str,
    unit: str,
    bound: float,
    task: str,
    pick: Callable[[Figures | None], Estimate | None],
) -> Panel:
    found = [
        Point(policy.name, family(policy.name), policy.recomputed_share, estimate)
        for policy in result.policies
        if policy.name != "full"
        for estimate in [pick(policy.figures(task))]
        if estimate is not None
    ]
    return Panel(title, unit, bound, tuple(found))


def _description(result: EvalResult) -> str:
    lines = []
    for policy in result.policies:
        losses = [
            f"{figures.task} {points(figures.loss_points)} points" for figures in policy.tasks if figures.loss_points
        ]
        lines.append(
            f"{policy.name}: {percent(policy.recomputed_share)} recomputed, ΔNLL {nats(policy.overall.nll_increase)} "
            f"nats per token" + (f"; lost: {', '.join(losses)}" if losses else "")
        )
    return ". ".join(lines) + "."
