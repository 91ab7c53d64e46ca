"""What the warps of a program have in common, for a machine for PTX: memory, and the barriers that copies come by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

BASE = 0x7F00_0000_0000
"""Where global memory begins."""
SHARED_BYTES = 227 << 10


@dataclass(frozen=True, slots=True)
class TensorMap:
    """What a tensor copy is told: rows of 16-bit numbers, and the box of 64 of their columns that it takes."""

    address: int
    num_rows: int
    num_columns: int
    box_rows: int


class DeviceMemory:
    """Global memory, taken piece by piece, with room that nobody owns between the pieces."""

    def __init__(self, num_bytes: int) -> None:
        self.held = np.zeros(num_bytes, np.uint8)
        self.maps: dict[int, TensorMap] = {}
        self._end = 0

    def describe(self, tensor_map: TensorMap) -> int:
        """What a kernel is given for it."""
        handle = len(self.maps) + 1
        self.maps[handle] = tensor_map
        return handle

    def put(self, tensor: Tensor) -> int:
        """Copies a tensor there; returns its address."""
        held = tensor.contiguous().view(torch.uint8).numpy().ravel()
        at = -(-self._end // 256) * 256
        self.held[at : at + held.size] = held
        self._end = at + held.size + 4096
        return BASE + at

    def get(self, address: int, like: Tensor) -> Tensor:
        """What is there now."""
        at = address - BASE
        held = self.held[at : at + like.numel() * like.element_size()].copy()
        return torch.from_numpy(held).view(like.dtype).reshape(like.shape)


@dataclass(slots=True)
class Arrival:
    """A barrier in shared memory that counts the bytes of tensor copies."""

    num_phases: int = 0
    expected: int = 0
    copies: list[tuple[NDArray[np.int64], NDArray[np.uint8]]] = field(default_factory=list)


@dataclass(slots=True)
class Block:
    """What a program's warps share."""

    memory: DeviceMemory
    parameters: Sequence[float | int]
    program: tuple[int, int]
    num_programs: tuple[int, int]
    shared: NDArray[np.uint8] = field(default_factory=lambda: np.zeros(SHARED_BYTES, np.uint8))
    arrivals: dict[int, Arrival] = field(default_factory=dict)
