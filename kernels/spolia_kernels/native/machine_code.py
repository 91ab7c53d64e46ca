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
from contextlib import suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

_FOLDER = Path(__file__).parent
_ASSEMBLE_S = 60.0
"""Most that assembling may take; it takes a third of a second."""
_MAX_CODE_BYTES = 1 << 20
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


@cache
def task(kernel: str, lanes: int) -> int:
    """The address of a kernel's function, which stays. Raises NoMachineCodeError."""
    code = _kept(kernel, lanes)
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long)
    file = os.memfd_create(f"spolia-{kernel}", os.MFD_CLOEXEC)
    try:
        os.write(file, code)
        # Written as a file and mapped for reading: no memory is ever both written and executed.
        address = libc.mmap(None, len(code), mmap.PROT_READ | mmap.PROT_EXEC, mmap.MAP_PRIVATE, file, 0)
    finally:
        os.close(file)
    if address is None or address == ctypes.c_void_p(-1).value:
        raise NoMachineCodeError(f"memory may not be executed: {os.strerror(ctypes.get_errno())}")
    return int(address)


def cache_folder() -> Path:
    """Where code is kept from one start to the next."""
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(home).expanduser() / "spolia" / "native"


def _kept(kernel: str, lanes: int) -> bytes:
    """Kept code, else code assembled now and kept. A folder that cannot be written costs a third of a second."""
    folder, name = cache_folder(), f"{kernel}-{_digest(kernel, lanes)}"
    with suppress(OSError):
        if _is_ours(folder) and _is_ours(folder / name):
            record = (folder / name).read_bytes()
            digest, code = record[:32], record[32:]
            if hashlib.sha256(code).digest() == digest:
                return code
    code = _assembled(kernel, lanes)
    with suppress(OSError):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        building = folder / f"{name}.{os.getpid()}"
        building.touch(mode=0o600)
        building.write_bytes(hashlib.sha256(code).digest() + code)
        building.replace(folder / name)
    return code


def _is_ours(path: Path) -> bool:
    """Whether nobody else can have written it: what lies there is executed. Raises OSError where it is not there."""
    found = path.lstat()
    is_plain = stat.S_ISREG(found.st_mode) or stat.S_ISDIR(found.st_mode)
    return is_plain and found.st_uid == os.geteuid() and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def _assembled(kernel: str, lanes: int) -> bytes:
    command = [sys.executable, "-c", _IN_A_BARE_PACKAGE, str(_FOLDER.parent), kernel, str(lanes)]
    try:
        done = subprocess.run(command, capture_output=True, timeout=_ASSEMBLE_S, check=False, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NoMachineCodeError(f"assembling {kernel} failed: {error}") from error
    if done.returncode or not 0 < len(done.stdout) <= _MAX_CODE_BYTES:
        said = done.stderr.decode(errors="replace").strip().splitlines()
        raise NoMachineCodeError(f"assembling {kernel} failed: {said[-1] if said else f'exit {done.returncode}'}")
    return done.stdout


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
