"""A plot shows every policy where it belongs, and no label covers another."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from report_worlds import POLICIES, TASKS, around, result, without_intervals

from spolia_fidelity.estimate import Estimate
from spolia_fidelity.report.labels import Anchor, Box, place_labels
from spolia_fidelity.report.panel import INNER, Panel, Point
from spolia_fidelity.report.plot import Limits, family, loss_plot
from spolia_fidelity.report.scale import LossScale, share_ticks

SVG = "{http://www.w3.org/2000/svg}"


def drawn(svg: str, tag: str, kind: str) -> list[ET.Element]:
    return [item for item in ET.fromstring(svg).iter(SVG + tag) if kind in item.get("class", "").split()]


def test_every_policy_but_full_recompute_is_a_labelled_point_in_every_panel() -> None:
    svg = loss_plot(result())
    assert len(drawn(svg, "text", "panel")) == 1 + len(TASKS)
    assert len(drawn(svg, "circle", "dot")) == (1 + len(TASKS)) * (len(POLICIES) - 1)
    labels = [item.text for item in drawn(svg, "text", "label")]
    assert sorted(set(labels), key=str) == sorted(set(POLICIES) - {"full"})
    assert all(labels.count(name) == 1 + len(TASKS) for name in set(labels))


def test_tasks_without_exact_match_show_their_likelihood_instead() -> None:
    headings = [item.text for item in drawn(loss_plot(result(tasks=["fact"], texts=["wiki"])), "text", "panel")]
    assert headings == ["ΔNLL, all questions", "fact: exact match lost", "wiki: ΔNLL"]
    assert len(drawn(loss_plot(result(tasks=[], texts=["wiki"])), "text", "panel")) == 1


def test_a_screen_reader_gets_the_title_and_every_figure() -> None:
    root = ET.fromstring(loss_plot(result()))
    assert root.get("role") == "img"
    assert root.get("aria-labelledby") == "title desc"
    description = root.findtext(f"{SVG}desc") or ""
    assert "models/demo" in (root.findtext(f"{SVG}title") or "")
    for name in POLICIES:
        assert f"{name}: " in description


def test_the_same_svg_serves_light_and_dark() -> None:
    svg = loss_plot(result())
    assert "prefers-color-scheme: dark" in svg
    assert not re.search(r'(fill|stroke)="#', svg)  # colours come from the style alone


def test_text_from_outside_cannot_break_out_of_the_svg() -> None:
    svg = loss_plot(result({"full": (1.0, 0.0), "<b>&": (0.1, 3.0)}, tasks=["<script>"]))
    assert "<script>: exact match lost" in [item.text for item in drawn(svg, "text", "panel")]
    assert "<b>&" in [item.text for item in drawn(svg, "text", "label")]


def test_a_figure_without_interval_is_a_point_without_a_bar() -> None:
    svg = loss_plot(without_intervals(result()))
    assert not drawn(svg, "path", "bar")
    assert drawn(svg, "circle", "dot")
    assert "nan" not in svg.lower().replace("nano", "")


def test_the_dashed_line_is_the_bound_the_reader_states() -> None:
    ticks = [item.text for item in drawn(loss_plot(result(), Limits(0.02, 2.0)), "text", "tick")]
    assert "+0.02" in ticks
    assert "+2" in ticks


@pytest.mark.parametrize("half", [0.0, 0.4])
def test_bars_reach_from_the_low_to_the_high_end(half: float) -> None:
    panel = Panel("t", "u", 1.0, (Point("naive", "link", 0.0, around(5.0, half)),))
    scale = LossScale.over([5.0 - half, 5.0 + half], 1.0, INNER.top, INNER.bottom)
    (bar,) = drawn(f'<svg xmlns="http://www.w3.org/2000/svg">{panel.draw(0, 0)}</svg>', "path", "bar")
    low, high = re.findall(r"M[\d.]+ ([\d.]+)V([\d.]+)", bar.get("d", ""))[0]
    assert float(low) == pytest.approx(scale.y(5.0 - half), abs=0.06)
    assert float(high) == pytest.approx(scale.y(5.0 + half), abs=0.06)


NAMES = ("naive", "link:4", "link:8", "link:16", "link:32", "sinks:4", "sinks:4+link:16", "cacheblend:0.16", "prefix")
losses = st.builds(lambda value, half: around(value, abs(half)), st.floats(-2, 60), st.floats(0, 5))


@settings(max_examples=15, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 0.4), losses), min_size=1, max_size=len(NAMES)))
def test_labels_cover_neither_each_other_nor_a_point_nor_the_panels_edge(found: list[tuple[float, Estimate]]) -> None:
    points = tuple(Point(n, family(n), share, loss) for n, (share, loss) in zip(NAMES, found, strict=False))
    panel = Panel("t", "points", 1.0, points)
    boxes = panel.label_boxes()
    assert not any(a.meets(b) for a, b in combinations(boxes, 2))
    for box in boxes:
        assert INNER.left <= box.left
        assert box.right <= INNER.right
        assert INNER.top <= box.top
        assert box.bottom <= INNER.bottom
        assert all(box.distance(*panel.place(point)) >= 4.0 for point in points)


def test_a_label_with_no_room_left_is_drawn_all_the_same() -> None:
    area = Box(0, 0, 50, 20)
    boxes = place_labels([Anchor(10, 10, 40, 12)] * 3, area, [])
    assert len(boxes) == 3


def test_policies_are_told_apart_by_what_they_do() -> None:
    assert {family(name) for name in ("naive", "link:4", "link:16")} == {"link"}
    assert {family(name) for name in ("sinks:4", "sinks:4+link:8")} == {"sinks"}
    assert (family("cacheblend:0.16"), family("prefix")) == ("cacheblend", "other")


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-1e4, 1e4), min_size=1, max_size=8), st.sampled_from([0.01, 1.0, 2.5]))
def test_a_scale_keeps_order_holds_every_value_and_ends_at_ticks(values: list[float], bound: float) -> None:
    scale = LossScale.over(values, bound, 10.0, 110.0)
    pixels = [scale.y(value) for value in sorted(values)]
    assert pixels == sorted(pixels, reverse=True)
    assert all(10.0 - 1e-6 <= pixel <= 110.0 + 1e-6 for pixel in pixels)
    ticks = scale.ticks()
    assert ticks == sorted(ticks)
    assert (ticks[0], ticks[-1]) == (pytest.approx(scale.smallest), pytest.approx(scale.largest))
    assert {0.0, bound} <= set(ticks)


def test_a_scale_is_linear_up_to_the_bound_and_logarithmic_beyond() -> None:
    scale = LossScale.over([30.0], 1.0, 0.0, 100.0)
    assert scale.y(0.0) - scale.y(0.5) == pytest.approx(scale.y(0.5) - scale.y(1.0))
    assert scale.y(1.0) - scale.y(3.0) == pytest.approx(scale.y(10.0) - scale.y(30.0))


@pytest.mark.parametrize(("largest", "last"), [(0.0, 0.01), (0.05, 0.05), (0.16, 0.2), (0.25, 0.25), (1.0, 1.0)])
def test_share_ticks_reach_the_largest_share_and_not_far_beyond(largest: float, last: float) -> None:
    ticks = share_ticks(largest)
    assert ticks[0] == 0.0
    assert ticks[-1] == pytest.approx(last)
    assert 2 <= len(ticks) <= 8
