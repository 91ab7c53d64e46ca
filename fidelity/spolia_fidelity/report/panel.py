"""One panel of a plot: axes, curves, points with their bars, labels."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from html import escape
from itertools import pairwise

from spolia_fidelity.estimate import Estimate
from spolia_fidelity.report.labels import Anchor, Box, leader, place_labels
from spolia_fidelity.report.scale import LossScale, share_ticks

WIDTH = 400
HEIGHT = 280
INNER = Box(56, 34, WIDTH - 12, HEIGHT - 42)
"""Where data are drawn, in the panel's own pixels."""
FONT = 11
CHARACTER = 0.62 * FONT
"""Width of a character, on the wide side of the fonts named in the style."""
RADIUS = 4.0
LEADER_FROM = 10.0
"""A label this far from its point gets a line to it."""


@dataclass(frozen=True, slots=True)
class Point:
    """A policy: how much it recomputes, what it loses."""

    name: str
    family: str
    share: float
    loss: Estimate


@dataclass(frozen=True, slots=True)
class Panel:
    """What is drawn in one panel. `bound` is in the losses' unit."""

    title: str
    unit: str
    bound: float
    points: tuple[Point, ...]

    def draw(self, x: float, y: float) -> str:
        """SVG of the panel, its upper left corner at (x, y)."""
        inside = "\n".join((*self._axes(), *self._curves(), *self._marks(), *self._labels()))
        heading = f'<text class="panel" x="{INNER.left:g}" y="18">{escape(self.title)}</text>'
        return f'<g transform="translate({x:g} {y:g})">\n{heading}\n{inside}\n</g>'

    def place(self, point: Point) -> tuple[float, float]:
        """Pixels of a point inside the panel."""
        return self._x(point.share), self._scale().y(point.loss.value)

    def label_boxes(self) -> list[Box]:
        """Where the points' labels stand, in the points' order."""
        places = [self.place(point) for point in self.points]
        obstacles = [Box(x - RADIUS - 1, y - RADIUS - 1, x + RADIUS + 1, y + RADIUS + 1) for x, y in places]
        for point, (x, _) in zip(self.points, places, strict=True):
            low, high = self._ends(point)
            obstacles.append(Box(x - 3, high - 1, x + 3, low + 1))
        zero, bound = self._scale().y(0.0), self._scale().y(self.bound)
        obstacles += [Box(INNER.left, line - 1, INNER.right, line + 1) for line in (zero, bound)]
        lines = [line for group in self._joined() for line in pairwise(map(self.place, group))]
        return place_labels(self.anchors(), INNER, obstacles, lines)

    def anchors(self) -> list[Anchor]:
        """The points with the sizes of their labels."""
        return [Anchor(*self.place(point), len(point.name) * CHARACTER + 2, FONT + 2) for point in self.points]

    def _scale(self) -> LossScale:
        ends = [end for point in self.points for end in (point.loss.value, point.loss.low, point.loss.high)]
        return LossScale.over(ends, self.bound, INNER.top, INNER.bottom)

    def _shares(self) -> list[float]:
        return share_ticks(max((point.share for point in self.points), default=0.1))

    def _x(self, share: float) -> float:
        # A little room on the left, so that a bar at 0 does not lie on the axis.
        return INNER.left + 10 + share / self._shares()[-1] * (INNER.right - INNER.left - 20)

    def _ends(self, point: Point) -> tuple[float, float]:
        """Pixels of the interval's ends, the lower loss first; the point itself where there is no interval."""
        scale = self._scale()
        if not point.loss.has_interval:
            return scale.y(point.loss.value), scale.y(point.loss.value)
        return scale.y(point.loss.low), scale.y(point.loss.high)

    def _axes(self) -> Iterator[str]:
        scale = self._scale()
        for tick in scale.ticks():
            y = scale.y(tick)
            kind = "zero" if tick == 0 else "bound" if tick == self.bound else "grid"
            yield f'<line class="{kind}" x1="{INNER.left:g}" x2="{INNER.right:g}" y1="{y:.1f}" y2="{y:.1f}"/>'
            yield f'<text class="tick" x="{INNER.left - 6:g}" y="{y + 4:.1f}" text-anchor="end">{_number(tick)}</text>'
        for share in self._shares():
            x = self._x(share)
            yield f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{INNER.bottom:g}" y2="{INNER.bottom + 4:g}"/>'
            text = f"{100 * share:g} %"
            yield f'<text class="tick" x="{x:.1f}" y="{INNER.bottom + 16:g}" text-anchor="middle">{text}</text>'
        yield (
            f'<line class="axis" x1="{INNER.left:g}" x2="{INNER.right:g}" y1="{INNER.bottom:g}" y2="{INNER.bottom:g}"/>'
        )
        middle = (INNER.left + INNER.right) / 2
        yield (
            f'<text class="tick" x="{middle:g}" y="{INNER.bottom + 32:g}" text-anchor="middle">'
            "chunk tokens recomputed</text>"
        )
        yield f'<text class="tick" x="{INNER.right:g}" y="18" text-anchor="end">{escape(self.unit)}</text>'

    def _joined(self) -> list[list[Point]]:
        """Policies that differ in k only, by share: naive and link, and each number of sinks with its own."""
        groups: dict[str, list[Point]] = {}
        for point in sorted(self.points, key=lambda point: point.share):
            if point.family in ("link", "sinks"):
                groups.setdefault(point.name.partition("+")[0] if point.family == "sinks" else "", []).append(point)
        return [group for group in groups.values() if len(group) > 1]

    def _curves(self) -> Iterator[str]:
        for group in self._joined():
            path = " ".join(f"{x:.1f},{y:.1f}" for x, y in map(self.place, group))
            yield f'<polyline class="curve {group[0].family}" points="{path}"/>'

    def _marks(self) -> Iterator[str]:
        for point in self.points:
            x, y = self.place(point)
            low, high = self._ends(point)
            if point.loss.has_interval:
                yield (
                    f'<path class="bar {point.family}" d="M{x:.1f} {low:.1f}V{high:.1f}'
                    f'M{x - 3:.1f} {low:.1f}h6M{x - 3:.1f} {high:.1f}h6"/>'
                )
            yield f'<circle class="dot {point.family}" cx="{x:.1f}" cy="{y:.1f}" r="{RADIUS:g}"/>'

    def _labels(self) -> Iterator[str]:
        for point, anchor, box in zip(self.points, self.anchors(), self.label_boxes(), strict=True):
            if box.distance(anchor.x, anchor.y) > LEADER_FROM:
                (x1, y1), (x2, y2) = leader(anchor, box)
                yield f'<line class="leader" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'
            yield f'<text class="label" x="{box.left + 1:.1f}" y="{box.bottom - 3:.1f}">{escape(point.name)}</text>'


def _number(tick: float) -> str:
    return f"{tick:+g}" if tick else "0"
