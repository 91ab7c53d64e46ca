"""A warp of a machine for PTX: registers of 32 lanes each, and what every statement makes of them.

What is there is what compiled kernels of ours ask for; anything else is an error, and so are addresses outside memory
or not aligned. Where a copy to shared memory will write lie NaNs until it is waited for; products are there at once.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from ptx_memory_worlds import BASE, Arrival, Block

Lanes = NDArray[Any]
LANE = np.arange(32)
TYPES: dict[str, type[np.generic]] = {
    **{"b8": np.uint8, "b16": np.uint16, "u16": np.uint16, "b32": np.uint32, "u32": np.uint32, "s32": np.int32},
    **{"b64": np.uint64, "u64": np.uint64, "s64": np.int64, "f32": np.float32, "f16": np.float16, "bf16": np.uint16},
    "f64": np.float64,
}
WIDER: dict[str, type[np.generic]] = {"s32": np.int64, "u32": np.uint64}


@dataclass(frozen=True, slots=True)
class Statement:
    """`@guard op operands`."""

    guard: str
    """Of a predicate, with `!` where it must not hold; empty without one."""
    op: tuple[str, ...]
    operands: tuple[str, ...]


@dataclass(slots=True)
class Warp:
    """Registers, and the copies that it asked for."""

    block: Block
    index: int
    registers: dict[str, Lanes] = field(default_factory=dict)
    copies: list[list[tuple[int, NDArray[np.uint8]]]] = field(default_factory=lambda: [[]])
    """To shared memory, on their way, by group; the last group is open."""

    def guard(self, name: str) -> NDArray[np.bool_]:
        """The lanes that a predicate lets take part."""
        if not name:
            return np.ones(32, bool)
        held = self.registers[name.lstrip("!")]
        return ~held if name[0] == "!" else held

    def do(self, statement: Statement, where: NDArray[np.bool_]) -> None:
        """One statement, in the lanes `where`."""
        op, operands = statement.op, statement.operands
        name = op[0]
        if name in ("ld", "st"):
            (self._load if name == "ld" else self._store)(op, operands, where)
        elif name in MATRIX:
            assert where.all()
            MATRIX[name](self, op, operands)
        elif name == "cp" and op[2] == "bulk":
            self._tensor_copy(operands, where)
        elif name == "cp":
            self._copy(op, operands, where)
        elif name == "mbarrier":
            self._arrival(op, operands, where)
        elif name == "elect":
            elected = operands[0].split("|")[1]
            self._write(elected, LANE == 0, where)
        elif name not in ("bar", "fence"):  # of a warp; of one proxy to another, which are one here
            self._write(operands[0], self._value(op, operands), where)

    def read(self, operand: str, kind: str) -> Lanes:
        """A register or a number, as a vector of a type; other bits than the type has are cut off or zero."""
        dtype = TYPES[kind]
        if operand == "global_smem":
            return np.zeros(32, dtype)
        if operand == "%tid.x":
            return (LANE + 32 * self.index).astype(dtype)
        if operand.startswith(("%nctaid", "%ctaid")):
            of_all = self.block.num_programs if operand[1] == "n" else self.block.program
            return np.full(32, of_all["xy".index(operand[-1])], dtype)
        if "_param_" in operand:
            return np.full(32, self.block.parameters[int(operand.rpartition("_")[2])], dtype)
        if operand.startswith("%"):
            held = self.registers[operand]
        elif operand.startswith("0f"):
            held = np.full(32, int(operand[2:], 16), np.uint32)
        elif operand.startswith("0d"):
            held = np.full(32, int(operand[2:], 16), np.uint64)
        else:
            held = np.full(32, int(operand.rstrip("U"), 0) & 0xFFFF_FFFF_FFFF_FFFF, np.uint64)
        size = np.dtype(dtype).itemsize
        return held.astype(f"u{size}").view(dtype)

    def _write(self, name: str, value: Lanes, where: NDArray[np.bool_]) -> None:
        if name.startswith("{"):  # halves of a number
            value = value.view(f"u{value.itemsize}")
            for i, half in enumerate(_names(name)):
                if half == "_":  # nobody asks for it
                    continue
                self._write(half, value >> value.dtype.type(4 * value.itemsize * i), where)
            return
        size = {"%p": 0, "%rs": 2, "%r": 4, "%rd": 8, "tmp": 4}[name.rstrip("0123456789")]  # of half a float64
        if size:
            value = np.ascontiguousarray(value)
            value = value.view(f"u{value.itemsize}").astype(f"u{size}")
        held = self.registers.get(name, np.zeros(32, value.dtype))
        self.registers[name] = np.where(where, value, held)

    def _value(self, op: tuple[str, ...], operands: tuple[str, ...]) -> Lanes:
        name, kind = op[0], op[-1]
        if kind == "pred":
            if operands[1][0] != "%":
                return np.full(32, int(operands[1]) != 0)
            return PREDICATES[name](*(self.registers[each] for each in operands[1:]))
        if name == "setp":
            return COMPARED[op[1]](*(self._number(each, kind) for each in operands[1:]))
        if name == "selp":
            chosen = self.registers[operands[3]]
            return np.where(chosen, self.read(operands[1], kind), self.read(operands[2], kind))
        if name == "mov" and operands[1].startswith("{"):
            half, whole, num_bits = ("u32", np.uint64, 32) if kind == "b64" else ("u16", np.uint32, 16)
            low, high = (self.read(each, half).astype(whole) for each in _names(operands[1]))
            return low | high << whole(num_bits)
        if name == "cvt":
            return self._converted(op, operands)
        if name == "shfl":
            lanes = self.read(operands[2], "u32").astype(np.int64)
            of = {"bfly": LANE ^ lanes, "idx": lanes & 31, "up": np.where(lanes <= LANE, LANE - lanes, LANE)}[op[2]]
            return np.asarray(self.read(operands[1], kind)[of])
        if name == "redux":
            held = self.read(operands[1], kind)
            return np.full(32, {"max": np.max, "min": np.min, "add": np.sum}[op[2]](held), held.dtype)
        if name in ("shl", "shr"):
            held, by = self.read(operands[1], kind), self.read(operands[2], "u32")
            return np.asarray(held << by.astype(held.dtype) if name == "shl" else held >> by.astype(held.dtype))
        if name == "shf":
            low, high, by = (self.read(each, "u32").astype(np.uint64) for each in operands[1:])
            both, turned = high << np.uint64(32) | low, by & np.uint64(31)
            shifted = both << turned >> np.uint64(32) if op[1] == "l" else both >> turned
            return shifted.astype(np.uint32)
        if name == "bfe":
            first, size = int(operands[2], 0), int(operands[3], 0)
            bits = self.read(operands[1], "u32").astype(np.int64) >> first & ((1 << size) - 1)
            negative = (bits >> (size - 1) & 1) * (kind == "s32")
            return np.asarray(bits - (negative << size))
        if name == "prmt":
            one, other, chosen = (self.read(each, "u32") for each in operands[1:])
            each_byte = np.stack((one, other), 1).view(np.uint8)
            picked = np.stack([chosen >> np.uint32(4 * i) & np.uint32(15) for i in range(4)], 1)
            assert picked.max() < 8, "signs are not spread"
            return np.take_along_axis(each_byte, picked.astype(np.int64), 1).view(np.uint32).ravel()
        values = [self.read(each, kind) for each in operands[1:]]
        if op[1] == "wide":
            values[:2] = [each.astype(WIDER[kind]) for each in values[:2]]
            values[2:] = [self.read(each, kind.replace("32", "64")) for each in operands[3:]]
        return ARITHMETIC[name](*values)

    def _converted(self, op: tuple[str, ...], operands: tuple[str, ...]) -> Lanes:
        to, of = op[-2:]
        if to.endswith("x2"):
            high, low = (_narrow(self.read(each, of), to[:-2]).astype(np.uint32) for each in operands[1:])
            return low | high << np.uint32(16)
        held = self._number(operands[1], of)
        if len(op) == 4 and op[1] in WHOLE:
            held = WHOLE[op[1]](held)
            limits = np.iinfo(TYPES[to]) if to[0] in "su" else None
            return held if limits is None else np.clip(np.nan_to_num(held), limits.min, limits.max).astype(TYPES[to])
        return _narrow(held, to) if to in ("bf16", "f16") else held.astype(TYPES[to])

    def _number(self, operand: str, kind: str) -> Lanes:
        held = self.read(operand, kind)
        return (held.astype(np.uint32) << np.uint32(16)).view(np.float32) if kind == "bf16" else held

    def _addresses(self, operand: str) -> NDArray[np.int64]:
        base, _, offset = operand.strip("[] ").partition("+")
        return self.read(base.strip(), "u64").astype(np.int64) + int(offset.strip() or "0", 0)

    def _place(self, space: str) -> tuple[NDArray[np.uint8], int]:
        return (self.block.memory.held, BASE) if space == "global" else (self.block.shared, 0)

    def _spots(
        self, op: tuple[str, ...], address: str, count: int, where: NDArray[np.bool_]
    ) -> list[tuple[int, list[NDArray[np.uint8]]]]:
        """Of each lane that takes part the `count` pieces of memory it reads or writes."""
        held, base = self._place(op[1].split(":")[0])
        size = np.dtype(TYPES[op[-1]]).itemsize
        found = []
        for lane in np.nonzero(where)[0]:
            at = int(self._addresses(address)[lane]) - base
            assert 0 <= at <= held.size - count * size, f"lane {lane} at {at:x}"
            assert at % (count * size) == 0, f"lane {lane} at {at:x} is not aligned"
            found.append((int(lane), [held[at + i * size : at + (i + 1) * size] for i in range(count)]))
        return found

    def _load(self, op: tuple[str, ...], operands: tuple[str, ...], where: NDArray[np.bool_]) -> None:
        if op[1] == "param":
            value = self.block.parameters[int(operands[1].strip("[]").rpartition("_")[2])]
            kind = np.float32 if isinstance(value, float) else np.uint64
            self._write(operands[0], np.full(32, value, kind), where)
            return
        names = _names(operands[0])
        values = np.zeros((len(names), 32), TYPES[op[-1]])
        for lane, spots in self._spots(op, operands[1], len(names), where):
            values[:, lane] = [spot.view(TYPES[op[-1]])[0] for spot in spots]
        for name, value in zip(names, values, strict=True):
            self._write(name, value, where)

    def _store(self, op: tuple[str, ...], operands: tuple[str, ...], where: NDArray[np.bool_]) -> None:
        values = [self.read(name, op[-1]) for name in _names(operands[1])]
        for lane, spots in self._spots(op, operands[0], len(values), where):
            for spot, value in zip(spots, values, strict=True):
                spot[:] = value[lane : lane + 1].view(np.uint8)

    def _copy(self, op: tuple[str, ...], operands: tuple[str, ...], where: NDArray[np.bool_]) -> None:
        if op[2] == "commit_group":
            self.copies.append([])
        elif op[2] == "wait_group":
            while len(self.copies) - 1 > int(operands[0]):
                for at, held in self.copies.pop(0):
                    self.block.shared[at : at + held.size] = held
        else:
            to, of, size = self._addresses(operands[0]), self._addresses(operands[1]) - BASE, int(operands[2], 0)
            there = self.read(operands[3], "u32") if len(operands) > 3 else np.full(32, size)
            for lane in np.nonzero(where)[0]:
                num_bytes, source, target = int(there[lane]), int(of[lane]), int(to[lane])
                held = np.zeros(size, np.uint8)
                if num_bytes:
                    assert 0 <= source <= self.block.memory.held.size - num_bytes
                    assert source % size == target % size == 0, "a copy is not aligned"
                    held[:num_bytes] = self.block.memory.held[source : source + num_bytes]
                self.copies[-1].append((target, held))
                self.block.shared[target : target + size] = 0xFF

    def _tensor_copy(self, operands: tuple[str, ...], where: NDArray[np.bool_]) -> None:
        """A box of rows of 64 numbers, sixteenths of 128 bytes exchanged within each eight rows."""
        for lane in np.nonzero(where)[0]:
            handle, column, row = re.findall(r"%\w+", operands[1])
            tensor_map = self.block.memory.maps[int(self.read(handle, "u64")[lane])]
            first, column_at = int(self.read(row, "s32")[lane]), int(self.read(column, "s32")[lane])
            held = np.zeros((tensor_map.box_rows, 128), np.uint8)
            for i, line in enumerate(held):
                if 0 <= first + i < tensor_map.num_rows:
                    source = tensor_map.address - BASE + 2 * ((first + i) * tensor_map.num_columns + column_at)
                    line[:] = self.block.memory.held[source : source + 128]
            target = _swizzled(int(self._addresses(operands[0])[lane]) + np.arange(held.size))
            self.block.shared[target] = 0xFF
            self.block.arrivals[int(self._addresses(operands[2])[lane])].copies.append((target, held.ravel()))

    def _arrival(self, op: tuple[str, ...], operands: tuple[str, ...], where: NDArray[np.bool_]) -> None:
        for lane in np.nonzero(where)[0]:
            if op[1] == "init":
                assert operands[1] == "1", "one thread says what it expects"
                self.block.arrivals[int(self._addresses(operands[0])[lane])] = Arrival()
            elif "expect_tx" in op:
                self.block.arrivals[int(self._addresses(operands[1])[lane])].expected += int(operands[2], 0)

    def has_come(self, operands: tuple[str, ...]) -> bool:
        """Whether the phase of a barrier is over that a wait names: all bytes that it expects are there."""
        arrival = self.block.arrivals[int(self._addresses(operands[1])[0])]
        if arrival.num_phases % 2 != int(self.read(operands[2], "u32")[0]):
            return True
        if not arrival.expected or arrival.expected != sum(held.size for _, held in arrival.copies):
            return False
        for target, held in arrival.copies:
            self.block.shared[target] = held
        arrival.copies, arrival.expected, arrival.num_phases = [], 0, arrival.num_phases + 1
        return True

    def group_product(self, op: tuple[str, ...], operands: tuple[str, ...]) -> None:
        """`wgmma`: this warp's 16 of 64 rows by 16 × N numbers that a descriptor finds in shared memory."""
        if op[1] != "mma_async":  # fences, commits and waits: products are there at once
            return
        size, kind, lane = int(op[4][4:].split("k")[0]), op[-1], LANE
        described = int(self.read(operands[2], "u64")[0])
        start, leading, stride = (described >> low & 0x3FFF for low in (0, 16, 32))
        assert described >> 62 == 1, "rows of 128 bytes, exchanged"
        inner, outer = np.arange(16)[:, None], np.arange(size)[None, :]
        if operands[6] == "0":  # the inner dimension is the one that lies together
            at = 16 * start + outer % 8 * 128 + outer // 8 * 16 * stride + inner * 2
        else:
            at = 16 * start + outer % 64 * 2 + outer // 64 * 16 * leading + inner % 8 * 128 + inner // 8 * 16 * stride
        at = _swizzled(at)
        bits = self.block.shared[at].astype(np.uint32) | self.block.shared[at + 1].astype(np.uint32) << np.uint32(8)
        right = _halves(bits, kind)[0]
        left, out = self._left(operands[1], kind), np.zeros((16, size))
        rows, columns = lane // 4, 2 * (lane % 4)
        names = _names(operands[0])
        if operands[3] == "1" or (operands[3][0] == "%" and self.registers[operands[3]].all()):
            for i, name in enumerate(names):
                out[rows + i // 2 % 2 * 8, columns + i // 4 * 8 + i % 2] = self.read(name, "f32")
        out = (left @ right + out).astype(np.float32)
        for i, name in enumerate(names):
            self._write(name, out[rows + i // 2 % 2 * 8, columns + i // 4 * 8 + i % 2], np.ones(32, bool))

    def _left(self, operand: str, kind: str) -> Lanes:
        """The 16 × 16 numbers of a product's left side, from registers."""
        left = np.zeros((16, 16))
        for i, name in enumerate(_names(operand)):
            rows, columns = LANE // 4 + i % 2 * 8, LANE % 4 * 2 + i // 2 * 8
            left[rows, columns], left[rows, columns + 1] = _halves(self.read(name, "u32"), kind)
        return left

    def matrices(self, op: tuple[str, ...], operands: tuple[str, ...]) -> None:
        """`ldmatrix` and `stmatrix`: 8 × 8 pieces of 16-bit numbers, a row from each address, two numbers a lane."""
        loads = op[0] == "ldmatrix"
        names, address = (operands[0], operands[1]) if loads else (operands[1], operands[0])
        at = self._addresses(address)
        for i, name in enumerate(_names(names)):
            rows = [self.block.shared[int(each) : int(each) + 16].view(np.uint16) for each in at[8 * i : 8 * i + 8]]
            if loads:
                held = np.stack(rows).T if "trans" in op else np.stack(rows)
                self._write(name, np.ascontiguousarray(held).view(np.uint32).ravel(), np.ones(32, bool))
            else:
                assert "trans" not in op
                for row, pairs in zip(rows, self.read(name, "u32").reshape(8, 4), strict=True):
                    row[:] = pairs.copy().view(np.uint16)

    def product(self, op: tuple[str, ...], operands: tuple[str, ...]) -> None:
        """`mma` of 16 × 16 by 16 × 8 numbers of 16 bits."""
        assert op[3] == "m16n8k16"
        kind = op[-2]
        group, quad = LANE // 4, LANE % 4
        left, right, out = self._left(operands[1], kind), np.zeros((16, 8)), np.zeros((16, 8))
        for i, name in enumerate(_names(operands[2])):
            rows = 2 * quad + 8 * i
            right[rows, group], right[rows + 1, group] = _halves(self.read(name, "u32"), kind)
        for i, name in enumerate(_names(operands[3])):
            out[group + i // 2 * 8, 2 * quad + i % 2] = self.read(name, "f32")
        out = (left @ right + out).astype(np.float32)
        for i, name in enumerate(_names(operands[0])):
            self._write(name, out[group + i // 2 * 8, 2 * quad + i % 2], np.ones(32, bool))


def _names(operand: str) -> list[str]:
    return [each.strip() for each in operand.strip("{} ").split(",")]


def _narrow(held: Lanes, kind: str) -> Lanes:
    """Float32 in 16 bits, to the nearest, as unsigned numbers."""
    tensor = torch.from_numpy(np.ascontiguousarray(held, np.float32))
    narrow = tensor.to(torch.bfloat16 if kind == "bf16" else torch.float16)
    return np.asarray(narrow.view(torch.int16).numpy()).view(np.uint16)


def _halves(held: Lanes, kind: str) -> tuple[Lanes, Lanes]:
    """Two numbers of 16 bits that lie in 32, the lower first."""
    if kind == "bf16":
        return (held << np.uint32(16)).view(np.float32), (held & np.uint32(0xFFFF0000)).view(np.float32)
    pairs = np.ascontiguousarray(held).view(np.float16).reshape(*held.shape, 2)
    return pairs[..., 0], pairs[..., 1]


def _swizzled(at: NDArray[Any]) -> NDArray[Any]:
    """Where 16 bytes of a row of 128 lie in shared memory: in another column in each of eight rows."""
    return np.asarray(at ^ ((at >> 7 & 7) << 4))


def _fused(a: Lanes, b: Lanes, c: Lanes) -> Lanes:
    """a · b + c, rounded once where it is of floats."""
    return (a.astype(np.float64) * b + c).astype(a.dtype)


MATRIX: dict[str, Callable[..., None]] = {
    **{"ldmatrix": Warp.matrices, "stmatrix": Warp.matrices, "mma": Warp.product, "wgmma": Warp.group_product}
}
COMPARED: dict[str, Callable[..., Lanes]] = {
    **{"lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal},
    **{"eq": np.equal, "ne": lambda a, b: (a < b) | (a > b), "num": lambda a, b: (a == a) & (b == b)},
    # Also where one is no number.
    **{"ltu": lambda a, b: ~(a >= b), "leu": lambda a, b: ~(a > b), "neu": np.not_equal},
    **{"gtu": lambda a, b: ~(a <= b), "geu": lambda a, b: ~(a < b), "equ": lambda a, b: ~((a < b) | (a > b))},
}
WHOLE: dict[str, Callable[..., Lanes]] = {"rzi": np.trunc, "rni": np.rint, "rpi": np.ceil, "rmi": np.floor}
PREDICATES: dict[str, Callable[..., Lanes]] = {
    **{"and": np.logical_and, "or": np.logical_or, "not": np.logical_not, "mov": np.copy}
}
ARITHMETIC: dict[str, Callable[..., Lanes]] = {
    **{
        "mov": np.copy,
        "cvta": np.copy,
        "add": np.add,
        "sub": np.subtract,
        "mul": np.multiply,
        "div": np.divide,
        "neg": np.negative,
    },
    **{"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor, "not": np.bitwise_not, "abs": np.abs},
    **{"max": np.fmax, "min": np.fmin, "ex2": np.exp2, "lg2": np.log2},
    **{"fma": _fused, "mad": lambda a, b, c: a * b + c},
}
