"""Where machine code comes from: assembled in another process, kept, looked at before it is run."""

from __future__ import annotations

import hashlib

import pytest
from open_files import open_files

from spolia_kernels.native import machine_code
from spolia_kernels.native.machine_code import NoMachineCodeError

KERNEL, LANES = "attend_narrow", 4


def code():
    return machine_code._codes([KERNEL], LANES)[KERNEL]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "spolia" / "native"


@pytest.fixture
def assembled(monkeypatch):
    """Counts what is assembled; nothing is."""
    found = []

    def assembling(kernels, lanes):
        found.append((*kernels, lanes))
        return {kernel: b"code of " + kernel.encode() for kernel in kernels}

    monkeypatch.setattr(machine_code, "_assembled", assembling)
    return found


def test_code_is_assembled_once_and_kept(folder, assembled):
    first = code()
    assert code() == first == b"code of attend_narrow"
    assert assembled == [(KERNEL, LANES)]
    (file,) = folder.iterdir()
    assert file.stat().st_mode & 0o077 == 0


def test_what_several_kernels_lack_is_assembled_at_once(folder, assembled):
    code()
    others = ["attend_wide", "merge-8"]
    assert machine_code._codes([KERNEL, *others], LANES).keys() == {KERNEL, *others}
    assert assembled == [(KERNEL, LANES), (*others, LANES)]
    assert len(list(folder.iterdir())) == 3


def test_code_that_is_cut_short_is_not_run(monkeypatch):
    whole = machine_code._assembled(["merge-8", KERNEL], LANES)
    assert whole[KERNEL] != whole["merge-8"]
    monkeypatch.setattr(machine_code, "_IN_A_BARE_PACKAGE", "print('x' * 40, end='')")
    with pytest.raises(NoMachineCodeError, match="cut short"):
        machine_code._assembled([KERNEL], LANES)


@pytest.mark.parametrize("spoil", [lambda b: b[:-1], lambda b: b[:40] + b"x" + b[41:], lambda b: b""])
def test_a_kept_file_that_was_changed_is_not_run(folder, assembled, spoil):
    code()
    (file,) = folder.iterdir()
    file.write_bytes(spoil(file.read_bytes()))
    assert code() == b"code of attend_narrow"
    assert len(assembled) == 2


def test_what_others_could_have_written_is_not_run(folder, assembled):
    code()
    (file,) = folder.iterdir()
    other = b"of somebody else"
    file.write_bytes(hashlib.sha256(other).digest() + other)
    assert code() == other, "our own file is trusted"
    file.chmod(0o666)
    assert code() == b"code of attend_narrow"
    file.write_bytes(hashlib.sha256(other).digest() + other)
    folder.chmod(0o777)
    assert code() == b"code of attend_narrow"


def test_a_link_in_the_folder_is_not_followed(folder, assembled, tmp_path):
    code()
    (file,) = folder.iterdir()
    elsewhere = tmp_path / "elsewhere"
    file.rename(elsewhere)
    file.symlink_to(elsewhere)
    code()
    assert len(assembled) == 2


def test_a_folder_that_cannot_be_written_costs_assembling_only(monkeypatch, assembled):
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nowhere")
    assert code() == b"code of attend_narrow"


def test_another_processor_or_library_means_other_code(monkeypatch):
    here = machine_code._digest.__wrapped__(KERNEL, LANES)
    monkeypatch.setattr(machine_code, "_processor", lambda: "another one")
    there = machine_code._digest.__wrapped__(KERNEL, LANES)
    monkeypatch.setattr(machine_code, "version", lambda name: "99")
    assert len({here, there, machine_code._digest.__wrapped__(KERNEL, LANES)}) == 3


def test_without_llvm_it_says_what_is_missing(monkeypatch):
    def missing(name):
        raise machine_code.PackageNotFoundError(name)

    monkeypatch.setattr(machine_code, "version", missing)
    with pytest.raises(NoMachineCodeError, match="llvmlite is not installed"):
        machine_code._digest.__wrapped__(KERNEL, LANES)


def test_what_went_wrong_in_assembling_is_told():
    with pytest.raises(
        NoMachineCodeError, match="assembling no_such_kernel failed: ValueError: no kernel no_such_kernel"
    ):
        machine_code._assembled(["no_such_kernel"], LANES)


def test_assembling_that_takes_too_long_is_ended(monkeypatch):
    monkeypatch.setattr(machine_code, "_ASSEMBLE_S", 0.01)
    with pytest.raises(NoMachineCodeError, match="timed out"):
        machine_code._assembled([KERNEL], LANES)


@pytest.mark.parametrize(("flags", "lanes"), [("fpu avx2 fma avx512f avx512vl", 16), ("fpu avx2 fma", 8)])
def test_the_widest_vectors_of_a_processor_are_used(monkeypatch, flags, lanes):
    monkeypatch.setattr(machine_code.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(machine_code, "_processor", lambda: flags)
    assert machine_code.lanes_here() == lanes


def test_a_processor_or_system_without_a_form_is_named(monkeypatch):
    monkeypatch.setattr(machine_code.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(machine_code, "_processor", lambda: "fpu sse2")
    with pytest.raises(NoMachineCodeError, match="without AVX2"):
        machine_code.lanes_here()
    monkeypatch.setattr(machine_code.sys, "platform", "darwin")
    with pytest.raises(NoMachineCodeError, match="darwin"):
        machine_code.lanes_here()


def test_code_that_reads_data_of_its_own_is_not_written(monkeypatch):
    llvmlite = pytest.importorskip("llvmlite.ir", reason="llvmlite is there on Linux only")
    from spolia_kernels.native import assemble

    def with_a_constant(kernel, lanes):
        module = llvmlite.Module("attend")
        kind = llvmlite.FunctionType(llvmlite.VoidType(), [llvmlite.IntType(64).as_pointer()])
        function = llvmlite.Function(module, kind, "task")
        build = llvmlite.IRBuilder(function.append_basic_block())
        floats = build.bitcast(function.args[0], llvmlite.FloatType().as_pointer())
        build.store(build.fmul(build.load(floats), llvmlite.FloatType()(0.7)), floats)
        build.ret_void()
        return module

    monkeypatch.setattr(assemble, "kernel_module", with_a_constant)
    with pytest.raises(assemble.NotBareError, match="rodata"):
        assemble.machine_code("with_a_constant", LANES)


def test_where_memory_may_not_be_executed_it_says_so(monkeypatch):
    def refused(name, flags):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(machine_code.os, "memfd_create", refused)
    with pytest.raises(NoMachineCodeError, match="memory for it cannot be had"):
        machine_code._mapped(KERNEL, b"code")


def test_nothing_is_left_of_the_file_that_is_mapped():
    address = machine_code.task(KERNEL, LANES)
    assert address > 0
    assert not [name for name in open_files() if f"spolia-{KERNEL}" in name]
