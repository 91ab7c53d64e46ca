"""The sections of `make gpu` on shapes small enough for a CPU: their code runs, by the kernels' references and on the
host's clock, every figure they promise is there, and whoever is compared with is asked for the same attention.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from spolia_bench.frame import Sample
from spolia_bench.gpu import (
    attention,
    batches,
    device,
    engine_steps,
    flashinfer_cascade,
    flex,
    linked,
    rates,
    sampling,
    steps,
)
from spolia_bench.gpu.batches import DEVICE, Heads, Point
from spolia_bench.gpu.flex import OutOfTime, Patience
from spolia_bench.gpu.rates import Rates
from spolia_bench.gpu.steps import Shape
from spolia_bench.gpu.tables import LAYOUTS, tables, written
from spolia_engine.device_decoding import DeviceSettings

pytestmark = pytest.mark.skipif(DEVICE == "cuda", reason="`make gpu` runs the sections themselves there")
RATES = Rates(1e12, 1e14)
TINY = Shape("tiny", 2, 128, 96, Heads(2, 1, 64), 101)
AT = [("mha", Heads(2, 2, 64), Point(3, 64, 5)), ("gqa8", Heads(4, 2, 64), Point(3, 48, 0))]
COMPARED = ("flashinfer_ms", "flex_ms", "best_over_shared", "cudnn_span_only_ms", "flash2_span_only_ms")


def columns_of(name: str) -> set[str]:
    return {key for _, key in LAYOUTS[name].columns}


def test_rates_are_bytes_and_operations_by_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([Sample((2.0,)), Sample((4.0,))])
    monkeypatch.setattr(rates, "timed", lambda *_, **__: next(times))
    (row,) = rates.measured(numbers=1000, size=64)
    found = Rates.of(row)
    assert found.copy == pytest.approx(2 * 2000 / 2e-3)  # read and written
    assert found.matrix == pytest.approx(2 * 64**3 / 4e-3)
    assert row["copy_n"] == row["matrix_n"] == 1
    assert found.floor_ms(1e6, 0) == pytest.approx(1e9 / found.copy)


def test_whole_steps_have_every_figure_of_their_table() -> None:
    points = [Point(3, 64, 0)]
    rows = list(steps.compare(TINY, RATES, points))
    assert [row["point"] for row in rows] == ["3x64", "1x64"]
    assert columns_of("steps") - {"bandwidth_share"} <= rows[0].keys()
    assert {"model", "point", "shared_ms", "floor_ms", "bandwidth_share"} <= rows[1].keys()
    assert (rows[0]["shared_n"], rows[0]["permuted_n"], rows[0]["private_n"]) == (32, 32, 32)


def test_private_and_shared_steps_say_the_same() -> None:
    """What is timed is the same work: as many tokens as are timed, by each treatment."""
    point, said = Point(3, 64, 0), []
    bench = steps.Bench(TINY, [point])
    for spans, rows in ((batches.shared_spans(point), 3), (batches.private_spans(point), 1)):
        step, tokens = bench.step(point, spans, rows), []
        for _ in range(steps.NEW_TOKENS):
            step.run()
            tokens.append(step.drawn.token_ids.tolist())
        said.append(tokens)
    assert said[0] == said[1]
    assert step.num_steps_left == 0


def test_documents_in_an_order_of_each_row_s_own_are_all_read_once() -> None:
    point = Point(4, 64, 0)
    spans = batches.shared_spans(point, steps._orders(4))
    assert [(span.start, span.end) for span in spans] == [(8 * d, 8 * d + 8) for d in range(8)]
    for row in range(4):
        assert sorted(span.offsets[row] for span in spans) == list(range(0, 64, 8))
    assert len({span.offsets for span in spans}) == 8


def test_attention_has_every_figure_of_its_table_but_others() -> None:
    found = list(attention.compare(RATES, AT))
    assert [(row["heads"], row["point"]) for row in found] == [("mha", "3x64+5"), ("gqa8", "3x48+0")]
    for row in found:
        assert columns_of("attention") - {*COMPARED, "flash2_private_ms"} <= row.keys()
        assert row["max_difference"] < 2e-2
        assert (row["shared_n"], row["private_n"]) == (20, 5)
        assert "flash2_private_error" in row  # a kernel of CUDA devices


def test_named_points_are_sixteen_and_the_grid_is_all() -> None:
    assert len(attention.points(grid=False)) == 16
    assert len({str(point) for _, _, point in attention.points(grid=True)}) == 18
    assert {name for name, _, _ in attention.points(grid=False)} == {"mha", "gqa8"}


@pytest.mark.parametrize(("name", "heads", "point"), AT)
def test_torch_s_kernels_are_asked_for_attention_over_what_is_shared(
    name: str, heads: Heads, point: Point, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each row for itself, and all rows as one sequence: the same answers; shapes are those that the kernels take."""

    def by_torch(real: Any) -> Callable[..., Any]:
        def called(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *more: Any) -> Any:
            on_meta = (held.to("meta").as_strided(held.shape, held.stride()) for held in (query, key, value))
            assert real(*on_meta, *more)[0].shape == query.shape
            return torch.nn.functional.scaled_dot_product_attention(query.float(), key.float(), value.float())

        return called

    for which in ("_FLASH", "_CUDNN"):
        monkeypatch.setattr(attention, which, by_torch(getattr(attention, which)))
    layer = attention.Layer(point, heads)
    answers = {other: run() for other, run in attention._others(layer)}
    assert set(answers) == {"flash2_private", "flash2_span_only", "cudnn_span_only"}
    private = answers["flash2_private"].reshape(point.rows, heads.num_q_heads, heads.head_dim)
    for other in ("flash2_span_only", "cudnn_span_only"):
        torch.testing.assert_close(answers[other][0].transpose(0, 1), private, atol=1e-5, rtol=1e-5)


class Cascade:
    """FlashInfer's wrapper by its documentation: levels of pages, `plan`, then `run`."""

    made: Cascade

    def __init__(self, num_levels: int, workspace: torch.Tensor, layout: str) -> None:
        assert (num_levels, layout) == (2, "NHD")
        Cascade.made = self

    def plan(
        self, ends: Any, page_ends: Any, pages: Any, last_lens: Any, q: int, kv: int, dim: int, page: int, **kw: Any
    ) -> None:
        self.levels = list(zip(ends, page_ends, pages, last_lens, strict=True))
        self.page, self.group = page, q // kv
        assert kw == {"q_data_type": torch.bfloat16}
        assert all(held.dtype == torch.int32 for level in self.levels for held in level)

    def keys_of(self, row: int) -> list[tuple[int, int]]:
        """(page, tokens of it) that a row reads."""
        found = []
        for ends, page_ends, pages, last_lens in self.levels:
            reader = int(torch.searchsorted(ends, row, right=True)) - 1
            mine = pages[int(page_ends[reader]) : int(page_ends[reader + 1])].tolist()
            found += [(page, self.page) for page in mine[:-1]] + [(mine[-1], int(last_lens[reader]))]
        return found

    def run(self, query: torch.Tensor, kv: torch.Tensor) -> list[int]:
        return [sum(count for _, count in self.keys_of(row)) for row in range(query.shape[0])]


def test_the_cascade_reads_what_is_shared_and_every_row_s_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flashinfer", SimpleNamespace(MultiLevelCascadeAttentionWrapper=Cascade))
    for suffix in (0, 15, 16, 37):
        run = flashinfer_cascade.cascade(Point(3, 64, suffix), Heads(4, 2, 64))
        assert run() == [64 + suffix + 1] * 3
        read = [set(Cascade.made.keys_of(row)) for row in range(3)]
        own = [read[row] - read[(row + 1) % 3] for row in range(3)]
        assert all(own)
        assert not own[0] & own[1] & own[2]
    found = list(flashinfer_cascade.compare(AT))
    assert [row["flashinfer_in_graph"] for row in found] == [False, False, True, True]
    assert all(row["flashinfer_n"] == 10 for row in found)


def test_without_flashinfer_its_column_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flashinfer", None)
    found = list(flashinfer_cascade.compare(AT))
    assert [row["flashinfer_error"].split(":")[0] for row in found] == ["ModuleNotFoundError"] * 2


def test_a_cascade_that_no_graph_takes_keeps_the_time_of_its_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(run: object) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    monkeypatch.setitem(sys.modules, "flashinfer", SimpleNamespace(MultiLevelCascadeAttentionWrapper=Cascade))
    monkeypatch.setattr(flashinfer_cascade, "graphed", refuses)
    found = list(flashinfer_cascade.compare(AT))
    assert len(found) == 3
    assert found[2]["flashinfer_graph_error"] == "operation not permitted when stream is capturing"
    assert "flashinfer_ms" not in found[2]


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("group", [1, 4])
def test_flex_attention_is_asked_for_what_rows_that_share_a_span_see(group: int) -> None:
    from torch.nn.attention.flex_attention import flex_attention

    point, heads = Point(5, 40, 3), Heads(4, 4 // group, 16)
    asked: dict[str, torch.Tensor] = {}

    def recording(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **options: object) -> torch.Tensor:
        asked.update(query=query, key=key, value=value)
        found: torch.Tensor = flex_attention(query, key, value, **options)
        return found

    out = flex.flex(point, heads, recording)()
    keys = torch.arange(40 + 5 * 4)
    for row in range(5):
        seen = (keys < 40) | ((keys - 40) // 4 == row)
        key, value = (asked[n][:, :, seen].repeat_interleave(group, 1).float() for n in ("key", "value"))
        expected = torch.nn.functional.scaled_dot_product_attention(
            asked["query"][:, :, row : row + 1].float(), key, value
        )
        torch.testing.assert_close(out[:, :, row : row + 1].float(), expected, atol=2e-2, rtol=2e-2)


def test_patience_ends() -> None:
    patience = Patience(0.0001)
    with patience.spent():
        sum(range(100_000))
    with pytest.raises(OutOfTime), patience.spent():
        raise AssertionError("not reached")


def test_a_linked_context_is_timed_by_the_engine_itself() -> None:
    rows = list(linked.compare(TINY, RATES, documents=3, tokens=64))
    assert [row["rows"] for row in rows] == [1 + 3 * 16 + 16]
    assert rows[0]["floor_ms"] > 0
    assert columns_of("linked") <= rows[0].keys()
    assert rows[0]["linked_n"] == rows[0]["recompute_n"] == 7
    times = {"linked_ms": 2.0, "recompute_ms": 4.0, "floor_ms": 1.0}
    shown = {**rows[0], **times, "recompute_over_linked": 2.0, "linked_over_floor": 2.0}
    assert table_of("linked", [shown])[2] == "| tiny | 3 × 64 | 65 | 2.0 | 4.0 | 1.0 | 2.00 | 2.00 |"


def test_flex_attention_is_compiled_for_every_point(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch stops compiling a function at its ninth shape, and only warns: then its slow path would be timed."""
    asked: list[tuple[int, ...]] = []

    def backend(module: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., Any]:
        asked.append(tuple(inputs[0].shape))
        return module.forward

    real = flex.compiled
    monkeypatch.setattr(flex, "compiled", lambda: real(backend))
    at = [("mha", Heads(2, 2, 16), Point(2, 32, own)) for own in range(10)]
    found = list(flex.compare(at))
    assert [row.get("flex_error") for row in found] == [None] * 10
    assert all(row["flex_n"] == 10 for row in found)
    assert len(asked) == 10


@pytest.mark.parametrize(
    ("rows", "group", "expected"), [(32, 8, {"BLOCK_M": 128}), (32, 1, None), (16, 8, None), (256, 8, None)]
)
def test_few_rows_of_many_heads_are_cut_to_what_flex_attention_has_kernels_for(
    rows: int, group: int, expected: dict[str, int] | None
) -> None:
    asked: list[Any] = []
    flex.flex(Point(rows, 64, 0), Heads(group, 1, 16), lambda *_, **options: asked.append(options["kernel_options"]))()
    assert asked == [expected]


def test_the_engine_s_steps_have_every_figure_of_their_table() -> None:
    settings = DeviceSettings(row_buckets=(1, 2), min_parts=16)
    rows = list(engine_steps.compare(TINY, rows=(1, 2, 3), shared=64, settings=settings))
    assert [row["point"] for row in rows] == ["1x64", "2x64", "3x64"]
    of_a_device, of_the_start = {"taken_mib", "row_kib"}, {"start_s", "foreseen_mib"}
    assert columns_of("engine") - of_a_device <= rows[0].keys()
    assert columns_of("engine") - of_a_device - of_the_start <= rows[1].keys()
    assert [row["eager_steps"] for row in rows] == [0, 0, 18]  # no bucket holds three
    assert {row["step_n"] for row in rows} == {row["graph_n"] for row in rows} == {16}


def test_draws_have_every_figure_of_their_table() -> None:
    rows = list(sampling.compare(RATES, vocabs=(50,), rows=(1, 3)))
    assert [(row["vocab"], row["spread"], row["rows"]) for row in rows] == [
        (50, spread, count) for spread in ("flat", "sure") for count in (1, 3)
    ]
    assert all(columns_of("sampling") <= row.keys() for row in rows)
    assert table_of("sampling", [{**rows[1], **dict.fromkeys(TIMES, 0.25), "floor_ms": 0.1}])[2] == (
        "| 50 | flat | 3 | 250 | 250 | 250 | 250 | 100 |"
    )


TIMES = [f"{name}_ms" for name in sampling.WAYS]


def test_the_best_of_others_is_told_once_all_were_tried() -> None:
    row: dict[str, Any] = {"heads": "mha", "point": "32x1024+0", "shared_ms": 0.01, "flashinfer_ms": 0.09}
    assert table_of("attention", [row])[2].split(" | ")[7] == ""
    row |= {"flex_error": "OutOfTime", "flash2_private_ms": 0.015}
    assert table_of("attention", [row])[2] == "| mha | 32 × 1024 + 0 | 10 |  | 90 |  | 15 | 1.50 |  |  |  |"


def test_rows_of_one_shape_of_heads_stand_together() -> None:
    rows = [{"heads": heads, "point": point} for point in ("1x2+0", "3x4+0") for heads in ("mha", "gqa8")]
    assert [line.split(" |")[0] for line in table_of("attention", rows)[2:]] == ["| mha", "| mha", "| gqa8", "| gqa8"]


def test_a_page_without_a_place_for_a_table_is_refused() -> None:
    with pytest.raises(ValueError, match="no place for the table 'linked'"):
        written("a page", result_of("linked", [{"model": "m", "point": "1x2"}]))


def test_a_device_is_reported_with_what_runs_on_it(monkeypatch: pytest.MonkeyPatch) -> None:
    found = SimpleNamespace(
        name="X", major=9, minor=0, multi_processor_count=132, total_memory=141 << 30, L2_cache_size=60 << 20
    )
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: found)
    report = device.device_report()
    assert (report["capability"], report["multiprocessors"], report["memory_gib"]) == ("9.0", 132, 141.0)
    assert report["l2_mib"] == 60.0
    assert report["flashinfer"] is None or report["flashinfer"]


def table_of(name: str, rows: list[dict[str, Any]]) -> list[str]:
    """Its lines, without that of its origin."""
    return list(tables(result_of(name, rows)))[2:-1]


def result_of(name: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    where = {"torch": "1", "transformers": "2", "commit": "0"}
    rated = {"copy_tb_per_s": 1.0, "matrix_tflop_per_s": 100.0}
    return {"device": "X", "environment": where, "rates": rated, name: rows}


def test_the_page_has_a_place_for_every_table_and_empty_ones_say_that_nobody_measured() -> None:
    """What a run writes there stays when another writes more."""
    page = (Path(__file__).parents[2] / "docs" / "gpu.md").read_text()
    for name, layout in LAYOUTS.items():
        before, _, rest = page.partition(f"<!-- table: {name} -->\n")
        origin, _, header, _, *rows = rest.partition("\n\n<!-- end -->")[0].split("\n")
        assert header == "| " + " | ".join(title for title, _ in layout.columns) + " |", name
        figures = [row.split(" | ")[3:] for row in rows]
        assert (origin == "Not measured yet.") == (not any(cell.strip(" |") for row in figures for cell in row)), name
        page = written(page, result_of(name, [{layout.columns[0][1]: "new", "point": "1x2"}]))
        assert page.startswith(before)
        assert page.count("| new |") == list(LAYOUTS).index(name) + 1
