"""The kernels of this processor, by name, and how one is run."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from spolia_kernels.native.machine_code import NoMachineCodeError, lanes_here, task
from spolia_kernels.native.number_table import LOG2_E, NUMBERS
from spolia_kernels.native.tasks import COMMON
from spolia_kernels.native.team import parallel

FORMS = (16, 8, 4)
"""Floats a vector may have; a processor that has wider ones has the narrower ones too."""


@dataclass(frozen=True, slots=True)
class Kernels:
    """Kernels with `lanes` floats a vector."""

    lanes: int
    run_parallel: Callable[[int, int, int, int], None]

    def lanes_for(self, *widths: int) -> int | None:
        """The widest vector that is filled by each of these; None where none is."""
        return next((form for form in FORMS if form <= self.lanes and not any(w % form for w in widths)), None)

    def run(
        self, kernel: str, lanes: int, num_items: int, room_floats: int, sm_scale: float, fields: Sequence[int]
    ) -> None:
        """Runs a kernel on torch's threads, each with so much room. `fields` are those behind `COMMON`.

        Raises NoMachineCodeError where the kernel, met for the first time, cannot be had.
        """
        num_threads = torch.get_num_threads()
        room = torch.empty(num_threads * room_floats)
        values = (0, 0, num_items, room.data_ptr(), room_floats, self.numbers(sm_scale), *fields)
        self.call(kernel, lanes, (ctypes.c_int64 * len(values))(*values), num_threads)

    def call(self, kernel: str, lanes: int, told: ctypes.Array[ctypes.c_int64], num_threads: int) -> None:
        """Runs a kernel that is told all of it, `COMMON` included. Raises as `run` does."""
        self.run_parallel(task(kernel, lanes), ctypes.addressof(told), num_threads, 0)

    def numbers(self, sm_scale: float) -> int:
        """The address of the numbers that kernels read, which stays."""
        return _numbers(sm_scale).data_ptr()


@dataclass(frozen=True, slots=True)
class WhyNot:
    """There are no kernels here, and this is why."""

    reason: str


@cache
def kernels() -> Kernels | WhyNot:
    """The kernels, the ones that any model needs being made at the first call: a third of a second, once on a machine.

    `SPOLIA_NATIVE_KERNELS=0` in the environment turns them off.
    """
    if os.environ.get("SPOLIA_NATIVE_KERNELS") == "0":
        return WhyNot("turned off by SPOLIA_NATIVE_KERNELS=0")
    try:
        found = Kernels(lanes_here(), parallel())
        task("attend_wide", found.lanes)
        return found
    except NoMachineCodeError as error:
        return WhyNot(str(error))


@cache
def _numbers(sm_scale: float) -> Tensor:
    return torch.tensor([*NUMBERS, sm_scale * LOG2_E], dtype=torch.float32)


assert COMMON == ("next_item", "next_thread", "num_items", "room", "room_floats", "numbers"), "as `run` tells them"
