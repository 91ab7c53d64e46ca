"""Where a kernel's machine code comes from, and where it lies."""

from __future__ import annotations

import ctypes
import hashlib
import mmap
import os
import platform
import stat
import subprocess
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

_FOLDER = Path(__file__).parent
_ASSEMBLE_S = 60.0
"""Most that assembling may take; all that a model needs takes a second."""
_IN_A_BARE_PACKAGE = """
import sys, types
package = types.ModuleType("spolia_kernels")
package.__path__ = [sys.argv.pop(1)]
sys.modules["spolia_kernels"] = package
from spolia_kernels.native.assemble import main
main()
"""
"""Imports what assembles without what the package itself imports, which is torch: 1.3 s."""


class NoMachineCodeError(Exception):
    """A kernel cannot be had here; the message says why. torch's kernels do the same."""


def lanes_here() -> int:
    """Floats in a vector register of this processor. Raises NoMachineCodeError where kernels have no form for it."""
    if sys.platform != "linux":
        raise NoMachineCodeError(f"kernels run on threads of Linux's OpenMP, this is {sys.platform}")
    if platform.machine() == "aarch64":
        return 4
    flags = _processor().split()
    if "avx512f" in flags and "avx512vl" in flags:
        return 16
    if "avx2" in flags and "fma" in flags:
        return 8
    raise NoMachineCodeError(f"a processor without AVX2 and FMA ({platform.machine()})")


_TASKS: dict[tuple[str, int], int] = {}
_MAKING = threading.Lock()


def task(kernel: str, lanes: int) -> int:
    """The address of a kernel's function, which stays. Raises NoMachineCodeError."""
    return _TASKS.get((kernel, lanes)) or tasks([kernel], lanes)[0]


def tasks(kernels: Sequence[str], lanes: int) -> list[int]:
    """Addresses of several: what has to be assembled is, in one process."""
    with _MAKING:
        missing = [kernel for kernel in kernels if (kernel, lanes) not in _TASKS]
        for kernel, code in _codes(missing, lanes).items():
            _TASKS[kernel, lanes] = _mapped(kernel, code)
    return [_TASKS[kernel, lanes] for kernel in kernels]


def _mapped(kernel: str, code: bytes) -> int:
    """Written as a file that only this process sees and mapped for reading: no memory is both written and executed."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long)
    try:
        file = os.memfd_create(f"spolia-{kernel}", os.MFD_CLOEXEC)
        try:
            os.write(file, code)
            address = libc.mmap(None, len(code), mmap.PROT_READ | mmap.PROT_EXEC, mmap.MAP_PRIVATE, file, 0)
        finally:
            os.close(file)
    except OSError as error:
        raise NoMachineCodeError(f"memory for it cannot be had: {error}") from error
    if address is None or address == ctypes.c_void_p(-1).value:
        raise NoMachineCodeError(f"memory may not be executed: {os.strerror(ctypes.get_errno())}")
    return int(address)


def cache_folder() -> Path:
    """Where code is kept from one start to the next."""
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(home).expanduser() / "spolia" / "native"


def _codes(kernels: Sequence[str], lanes: int) -> dict[str, bytes]:
    """What was kept, else what is assembled now and kept. A folder that cannot be written costs a second a start."""
    names = {kernel: f"{kernel}-{_digest(kernel, lanes)}" for kernel in kernels}
    codes = {kernel: code for kernel, name in names.items() if (code := _kept(name)) is not None}
    missing = [kernel for kernel in kernels if kernel not in codes]
    if missing:
        made = _assembled(missing, lanes)
        for kernel, code in made.items():
            _keep(names[kernel], code)
        codes |= made
    return codes


def _kept(name: str) -> bytes | None:
    folder = cache_folder()
    with suppress(OSError):
        if _is_ours(folder) and _is_ours(folder / name):
            record = (folder / name).read_bytes()
            digest, code = record[:32], record[32:]
            return code if hashlib.sha256(code).digest() == digest else None
    return None


def _keep(name: str, code: bytes) -> None:
    folder = cache_folder()
    with suppress(OSError):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        building = folder / f"{name}.{os.getpid()}"
        building.touch(mode=0o600)
        building.write_bytes(hashlib.sha256(code).digest() + code)
        building.replace(folder / name)


def _is_ours(path: Path) -> bool:
    """Whether nobody else can have written it: what lies there is executed. Raises OSError where it is not there."""
    found = path.lstat()
    is_plain = stat.S_ISREG(found.st_mode) or stat.S_ISDIR(found.st_mode)
    return is_plain and found.st_uid == os.geteuid() and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def _assembled(kernels: Sequence[str], lanes: int) -> dict[str, bytes]:
    what = ", ".join(kernels)
    command = [sys.executable, "-c", _IN_A_BARE_PACKAGE, str(_FOLDER.parent), str(lanes), *kernels]
    try:
        done = subprocess.run(command, capture_output=True, timeout=_ASSEMBLE_S, check=False, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NoMachineCodeError(f"assembling {what} failed: {error}") from error
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip().splitlines()
        raise NoMachineCodeError(f"assembling {what} failed: {said[-1] if said else f'exit {done.returncode}'}")
    codes: dict[str, bytes] = {}
    rest = done.stdout
    for kernel in kernels:
        size = int.from_bytes(rest[:8], "little")
        codes[kernel], rest = rest[8 : 8 + size], rest[8 + size :]
        if not 0 < size == len(codes[kernel]):
            raise NoMachineCodeError(f"assembling {what} failed: the code is cut short")
    return codes


@cache
def _digest(kernel: str, lanes: int) -> str:
    """Of all that decides what the code is."""
    try:
        words = [kernel, str(lanes), version("llvmlite"), _processor()]
    except PackageNotFoundError as error:
        raise NoMachineCodeError("llvmlite is not installed") from error
    digest = hashlib.sha256("\n".join(words).encode())
    for source in sorted(_FOLDER.glob("*.py")):
        digest.update(source.read_bytes())
    return digest.hexdigest()[:32]


@cache
def _processor() -> str:
    """Model and flags as the kernel tells them."""
    wanted = ("model name", "flags", "Features", "CPU part", "CPU implementer")
    lines: list[str] = []
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if not line and lines:
                break
            if line.startswith(wanted):
                lines.append(line.partition(":")[2].strip())
    return " ".join(lines)
