"""Where labels go so that none covers another, a point or a bar."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

STEP = 4.0
"""Distance of tried places, in pixels."""
GAP = 4.0
"""Between a label and its own point."""

Place = tuple[float, float]
Line = tuple[Place, Place]


@dataclass(frozen=True, slots=True)
class Box:
    """A rectangle in pixels, y downwards."""

    left: float
    top: float
    right: float
    bottom: float

    def meets(self, other: Box) -> bool:
        """Whether the two share any area."""
        return (
            self.left < other.right and other.left < self.right and self.top < other.bottom and other.top < self.bottom
        )

    def distance(self, x: float, y: float) -> float:
        """From a point to the nearest place of the box; 0 inside it."""
        dx = max(self.left - x, 0.0, x - self.right)
        dy = max(self.top - y, 0.0, y - self.bottom)
        return float((dx * dx + dy * dy) ** 0.5)

    def crossed_by(self, start: Place, end: Place) -> bool:
        """Whether the straight line between two points passes through the box (Liang-Barsky clipping)."""
        low, high = 0.0, 1.0
        for begin, step, least, most in (
            (start[0], end[0] - start[0], self.left, self.right),
            (start[1], end[1] - start[1], self.top, self.bottom),
        ):
            if step == 0:
                if not least < begin < most:
                    return False
                continue
            first, second = sorted(((least - begin) / step, (most - begin) / step))
            low, high = max(low, first), min(high, second)
        return low < high


@dataclass(frozen=True, slots=True)
class Anchor:
    """A point that wants a label of this size."""

    x: float
    y: float
    width: float
    height: float


def place_labels(
    anchors: Sequence[Anchor], area: Box, obstacles: Sequence[Box], lines: Sequence[Line] = ()
) -> list[Box]:
    """A box inside `area` for each anchor's label: the nearest to its point that meets no obstacle and no other label.

    Greedy, in the order given. Where any other place is free, no label lies on one of `lines` and no leader from a
    point to its label crosses another label. A label with no free place at all (more labels than room) goes to the
    nearest place in the area.
    """
    placed: list[Box] = []
    for anchor in anchors:
        placed.append(_place(anchor, area, [*obstacles, *placed], lines, placed))
    return placed


def _place(anchor: Anchor, area: Box, taken: Sequence[Box], lines: Sequence[Line], labels: Sequence[Box]) -> Box:
    tried = sorted(_places(anchor, area), key=lambda box: _cost(box, anchor))
    first_free: Box | None = None
    for box in tried:
        if any(box.meets(other) for other in taken):
            continue
        first_free = first_free or box
        if any(box.crossed_by(*line) for line in lines):
            continue
        if not any(other.crossed_by(*leader(anchor, box)) for other in labels):
            return box
    return first_free or tried[0]


def leader(anchor: Anchor, box: Box) -> Line:
    """From the point to the nearest place of its label."""
    x = min(max(anchor.x, box.left), box.right)
    y = min(max(anchor.y, box.top), box.bottom)
    return (anchor.x, anchor.y), (x, y)


def _places(anchor: Anchor, area: Box) -> list[Box]:
    columns = int(max(0.0, area.right - area.left - anchor.width) // STEP) + 1
    rows = int(max(0.0, area.bottom - area.top - anchor.height) // STEP) + 1
    return [
        Box(left, top, left + anchor.width, top + anchor.height)
        for left in (area.left + column * STEP for column in range(columns))
        for top in (area.top + row * STEP for row in range(rows))
    ]


def _cost(box: Box, anchor: Anchor) -> tuple[float, float]:
    """Near first, but not on the point; among equals to the right of it."""
    distance = box.distance(anchor.x, anchor.y)
    return (distance if distance >= GAP else 1000.0 - distance), -box.left
