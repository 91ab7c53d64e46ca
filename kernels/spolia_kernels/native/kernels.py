"""The kernels of this processor, by name, and how one is run."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from spolia_kernels.native.machine_code import NoMachineCodeError, lanes_here, task, tasks
from spolia_kernels.native.number_table import LOG2_E, NUMBERS
from spolia_kernels.native.tasks import COMMON
from spolia_kernels.native.team import parallel

FORMS = (16, 8, 4)
"""Floats a vector may have; a processor that has wider ones has the narrower ones too."""
ROW_KERNELS = ("rms_norm", "silu_mul", "rotate")
"""What is done to rows by themselves. Any model may need any form."""


@dataclass(frozen=True, slots=True)
class Kernels:
    """Kernels with `lanes` floats a vector."""

    lanes: int
    run_parallel: Callable[[int, int, int, int], None]

    def lanes_for(self, *widths: int) -> int | None:
        """The widest vector that is filled by each of these; None where none is."""
        return next((form for form in FORMS if form <= self.lanes and not any(w % form for w in widths)), None)

    def has(self, *kernels: str, lanes: int) -> bool:
        """Whether these can be had as well; they are made now where they are not there yet."""
        return _can_be_had(kernels, lanes)

    def run(
        self, kernel: str, lanes: int, num_items: int, room_floats: int, sm_scale: float, fields: Sequence[int]
    ) -> None:
        """Runs a kernel, one that `has` knows, on torch's threads, each with so much room. `fields` are those behind
        `COMMON`.
        """
        num_threads = torch.get_num_threads()
        room = torch.empty(num_threads * room_floats)
        values = (0, 0, num_items, room.data_ptr(), room_floats, self.numbers(sm_scale), *fields)
        self.call(kernel, lanes, (ctypes.c_int64 * len(values))(*values), num_threads)

    def run_alone(self, kernel: str, fields: Sequence[int]) -> None:
        """Runs a kernel of one item on this thread, with no room. For what ends within microseconds: the interpreter is
        held meanwhile, since giving it away and getting it back takes longer.
        """
        values = (0, 0, 1, 0, 0, self.numbers(1.0), *fields)
        told = (ctypes.c_int64 * len(values))(*values)
        _function(task(kernel, self.lanes))(ctypes.addressof(told))

    def call(self, kernel: str, lanes: int, told: ctypes.Array[ctypes.c_int64], num_threads: int) -> None:
        """Runs a kernel that is told all of it, `COMMON` included."""
        self.run_parallel(task(kernel, lanes), ctypes.addressof(told), num_threads, 0)

    def numbers(self, sm_scale: float) -> int:
        """The address of the numbers that kernels read, which stays."""
        return _numbers(sm_scale).data_ptr()


@dataclass(frozen=True, slots=True)
class WhyNot:
    """There are no kernels here, and this is why."""

    reason: str


def kernels() -> Kernels | WhyNot:
    """The kernels, the ones that any model needs being made at the first call: half a second, once on a machine.

    `SPOLIA_NATIVE_KERNELS=0` in the environment turns them off.
    """
    return _turned_off or _kernels()


@contextmanager
def torch_kernels_only() -> Iterator[None]:
    """Everything that begins inside, in any thread, does without machine code: what that saves can be measured."""
    global _turned_off
    before = _turned_off
    _turned_off = WhyNot("turned off for a while")
    try:
        yield
    finally:
        _turned_off = before


_turned_off: WhyNot | None = None


@cache
def _kernels() -> Kernels | WhyNot:
    if os.environ.get("SPOLIA_NATIVE_KERNELS") == "0":
        return WhyNot("turned off by SPOLIA_NATIVE_KERNELS=0")
    try:
        found = Kernels(lanes_here(), parallel())
        tasks(["attend_wide", "attend_narrow", *_row_kernels(found.lanes)], found.lanes)
        return found
    except NoMachineCodeError as error:
        return WhyNot(str(error))


def prepare(head_dim: int, v_dim: int) -> Kernels | WhyNot:
    """The kernels, all being made that a model with heads of these widths needs: a second, once on a machine."""
    found = kernels()
    if isinstance(found, WhyNot):
        return found
    lanes = found.lanes_for(head_dim, v_dim)
    if lanes is None:
        return found
    try:
        tasks([few_kernel(head_dim, v_dim), *step_kernels(head_dim, v_dim, found.lanes)], lanes)
    except NoMachineCodeError as error:
        return WhyNot(str(error))
    return found


def few_kernel(head_dim: int, v_dim: int) -> str:
    """The name of the kernel that attends few rows."""
    return f"attend_few-{head_dim}-{v_dim}"


def step_kernels(head_dim: int, v_dim: int, block_lanes: int) -> tuple[str, str, str]:
    """Names of the kernels of a step: for ranges of few blocks' rows, of many, and for the merge."""
    narrow, wide = (f"step-{head_dim}-{v_dim}-{block_lanes}-{is_wide}" for is_wide in (0, 1))
    return narrow, wide, f"merge-{v_dim}"


def row_kernel(name: str, lanes: int) -> str:
    """The name of a kernel that takes rows by themselves, with so many floats a vector."""
    return f"{name}-{lanes}"


def _row_kernels(most_lanes: int) -> list[str]:
    return [row_kernel(name, form) for name in ROW_KERNELS for form in FORMS if form <= most_lanes]


@cache
def _function(address: int) -> Callable[[int], None]:
    return ctypes.PYFUNCTYPE(None, ctypes.c_void_p)(address)


@cache
def _can_be_had(names: tuple[str, ...], lanes: int) -> bool:
    try:
        tasks(names, lanes)
    except NoMachineCodeError:
        return False
    return True


@cache
def _numbers(sm_scale: float) -> Tensor:
    return torch.tensor([*NUMBERS, sm_scale * LOG2_E], dtype=torch.float32)


assert COMMON == ("next_item", "next_thread", "num_items", "room", "room_floats", "numbers"), "as `run` tells them"
