"""Kernels as Triton compiles them for Hopper, on any machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from ptx_worlds import Program

SCRIPT = """
import importlib, json, sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

ints = "items num_items rows offsets positions tail_pages tail_starts num_rows part_starts parts".split()
kinds = dict.fromkeys(ints, "*i32") | dict.fromkeys("part_out part_lse cos sin".split(), "*fp32")
kinds |= dict.fromkeys("num_slots stride_row max_pages".split(), "i32") | {"sm_scale": "fp32"}
for asked in json.loads(sys.argv[1]):
    module, name = asked["kernel"].split(":")
    kernel = getattr(importlib.import_module(module), name)
    signature = {name: (kinds | asked["kinds"]).get(name, asked["tensors"]) for name in kernel.arg_names}
    signature |= dict.fromkeys(asked["sizes"], "constexpr")
    is_aligned = {name: kind[0] == "*" or name in ("num_slots", "stride_row") for name, kind in signature.items()}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(kernel.arg_names) if is_aligned[name]}
    source = ASTSource(kernel, signature, asked["sizes"], aligned)
    built = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=asked["options"])
    given = [name for name in kernel.arg_names if name not in asked["sizes"]]
    print(json.dumps({"ptx": built.asm["ptx"], "arguments": given}))
"""


@dataclass(frozen=True)
class Asked:
    """A kernel, by `module:name`, and how it is to be compiled."""

    kernel: str
    tensors: str
    """The type of whatever holds queries, keys and values, or logits."""
    sizes: Mapping[str, Any]
    options: Mapping[str, int]
    kinds: Mapping[str, str] = field(default_factory=dict)
    """Types of arguments that are not those of the paged kernels."""


@dataclass(frozen=True, slots=True)
class Compiled:
    """A kernel's program and the names of its arguments, in their order."""

    program: Program
    arguments: list[str]


def compiled(asked: Sequence[Asked]) -> list[Compiled]:
    """In a process of their own, for the one that tests interprets."""
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-c", SCRIPT, json.dumps([asdict(each) for each in asked])]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    found = [json.loads(line) for line in done.stdout.splitlines()]
    return [Compiled(Program(each["ptx"]), each["arguments"]) for each in found]
