"""The measured switch: cells decide, the nearest one below, and a table is measured once."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_worlds import engine_of, letters
from torch import Tensor

from spolia_engine import cuda_graph, paged_ways, sharing_table
from spolia_engine.device_decoding import DeviceSettings
from spolia_engine.device_work import WorkCutter
from spolia_engine.engine import Engine
from spolia_engine.paged_ways import PagedWays
from spolia_engine.sharing_table import AttentionShape, Cell, SharingTable, load_sharing, measure_sharing
from spolia_kernels import Partial, paged
from spolia_kernels.paged import PagedKv, PagedWork

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPE = AttentionShape(4, 2, 8, "float32")
PAYS, COSTS = Cell(1.0, 2.0), Cell(2.0, 1.0)


def test_the_cell_below_decides_and_the_first_for_what_is_smaller() -> None:
    table = SharingTable({(2, 64): COSTS, (2, 512): PAYS, (8, 64): PAYS, (8, 512): PAYS})
    asked = {(2, 63): False, (2, 64): False, (7, 511): False, (7, 512): True, (8, 1): True, (100, 10_000): True}
    assert {key: table(*key) for key in asked} == asked


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharing_table, "ROWS", (2, 4))
    monkeypatch.setattr(sharing_table, "TOKENS", (16, 64))


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("page_size", [None, 16], ids=["extents", "slots"])
def test_every_cell_is_measured(dtype: str, page_size: int | None) -> None:
    table = measure_sharing(AttentionShape(4, 2, 64, dtype, page_size), DEVICE)
    assert set(table.cells) == {(2, 16), (2, 64), (4, 16), (4, 64)}
    assert all(cell.shared_us > 0 and cell.private_us > 0 for cell in table.cells.values())


@pytest.mark.usefixtures("few")
def test_what_is_timed_for_slots_is_what_a_step_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The step's kernels, over the work that the step's own cutter makes of the two plans."""
    asked: list[tuple[int, int]] = []  # rows of a step, readings of its first item
    attend_spans = paged_ways.attend_spans

    def recording(query: Tensor, kv: PagedKv, work: PagedWork, *rest: Any, **options: Any) -> Partial:
        asked.append((query.shape[0], int(work.items[0, 2])))
        return attend_spans(query, kv, work, *rest, **options)

    monkeypatch.setattr(paged_ways, "attend_spans", recording)
    for name in ("attend", "attend_private"):
        monkeypatch.setattr(sharing_table, name, lambda *_, **__: pytest.fail("no step over slots runs this"))
    measure_sharing(AttentionShape(4, 2, 64, "float32", 16), DEVICE)
    assert set(asked) == {(2, 2), (2, 1), (4, 4), (4, 1)}


@pytest.mark.parametrize("by_kernels", [False, True], ids=["reference", "interpreter"])
def test_rows_see_the_same_shared_or_not(by_kernels: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if by_kernels:
        pytest.importorskip("triton", reason="Triton has wheels for Linux only")
        monkeypatch.setattr(paged, "uses_triton", lambda tensor: True)
    cutter = WorkCutter(2, 2, torch.device("cpu"))
    ways = PagedWays(cutter, head_dim=64, page_size=16, dtype=torch.float32, num_layers=1, max_rows=5, max_tokens=100)
    together, alone = (ways.attention(5, 100, shared=shared)() for shared in (True, False))
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)


def test_an_engine_over_slots_asks_for_a_table_of_its_own() -> None:
    host = engine_of()
    device = Engine(host.adapter, letters, num_blocks=8, block_size=16, device=DeviceSettings(row_buckets=(1,)))
    assert host.attention_shape.page_size is None
    assert device.attention_shape == replace(host.attention_shape, page_size=16)


def test_a_launch_keeps_the_memory_that_its_graph_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    class Graph:
        def __init__(self, work: object) -> None:
            self._work = weakref.ref(work)

        def replay(self) -> None:
            assert self._work() is not None, "the graph reads what another has by now"

    monkeypatch.setattr(cuda_graph, "captured", Graph)
    launch = cuda_graph.launching(lambda: None)
    gc.collect()
    launch()


@pytest.mark.usefixtures("few")
def test_a_table_is_kept_by_device_and_shape(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = load_sharing(SHAPE, tmp_path / "made")
    with monkeypatch.context() as patched:
        patched.setattr(sharing_table, "measure_sharing", lambda *_: pytest.fail("measured again"))
        assert load_sharing(SHAPE, tmp_path / "made").cells == first.cells
    load_sharing(AttentionShape(4, 4, 8, "float32"), tmp_path / "made")
    load_sharing(AttentionShape(4, 4, 8, "float32", 16), tmp_path / "made")
    load_sharing(AttentionShape(4, 4, 8, "float32", 32), tmp_path / "made")
    assert len(list((tmp_path / "made").iterdir())) == 4


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize("text", ["", "{}", '{"cells": []}', '{"cells": [[1]]}', '{"cells": 3}'])
def test_a_broken_file_is_written_anew(tmp_path: Path, text: str) -> None:
    load_sharing(SHAPE, tmp_path)
    (file,) = tmp_path.iterdir()
    file.write_text(text)
    table = load_sharing(SHAPE, tmp_path)
    assert len(table.cells) == 4
    assert file.read_text() != text


@pytest.mark.usefixtures("few")
def test_a_folder_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert len(load_sharing(SHAPE, tmp_path / "file" / "under").cells) == 4


@pytest.mark.usefixtures("few")
def test_threads_are_part_of_the_key(tmp_path: Path) -> None:
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            load_sharing(SHAPE, tmp_path)
    finally:
        torch.set_num_threads(before)
    assert len(list(tmp_path.iterdir())) == 2
