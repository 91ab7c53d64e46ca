"""The measured switch: cells decide, the nearest one below, and a table is measured once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from spolia_engine import sharing_table
from spolia_engine.sharing_table import AttentionShape, Cell, SharingTable, load_sharing, measure_sharing

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
def test_every_cell_is_measured(dtype: str) -> None:
    table = measure_sharing(AttentionShape(4, 2, 8, dtype))
    assert set(table.cells) == {(2, 16), (2, 64), (4, 16), (4, 64)}
    assert all(cell.shared_us > 0 and cell.private_us > 0 for cell in table.cells.values())


@pytest.mark.usefixtures("few")
def test_a_table_is_kept_by_device_and_shape(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = load_sharing(SHAPE, tmp_path / "made")
    monkeypatch.setattr(sharing_table, "measure_sharing", lambda *_: pytest.fail("measured again"))
    assert load_sharing(SHAPE, tmp_path / "made").cells == first.cells
    monkeypatch.undo()
    load_sharing(AttentionShape(4, 4, 8, "float32"), tmp_path / "made")
    assert len(list((tmp_path / "made").iterdir())) == 2


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
