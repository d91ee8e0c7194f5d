"""Bundles under qemu-user: the ARM kernels of the real runtimes, on processors that have what they have."""

import os
import shutil
import sys
from importlib import metadata

import pytest

from mobile_export.bundle import load
from mobile_export.checkpoint import cache
from mobile_export.errors import ExportError
from mobile_export.export import export
from mobile_export.latency import bench, stubs, sysroot
from mobile_export.latency.devices import Options, discover, module, open_device, parse, qemu_arm64, runner
from mobile_export.latency.protocol import Protocol, Regime
from mobile_export.latency.workers import Worker
from mobile_export.stages import inputs, parity
from mobile_export.targets import target

needs_qemu = pytest.mark.skipif(
    not (shutil.which(qemu_arm64.QEMU) and shutil.which("apt-get")),
    reason="needs qemu-user (apt-get install qemu-user) and Debian's apt-get, for an arm64 Python",
)
PLAN = Protocol(threads=(1,), regimes=(Regime(prompt=8, decode=4),), long_regime=Regime(prompt=0, decode=4))
TEXT = list(range(7, 31))
DOT = """
import ctypes, mmap
code = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
code.write(bytes.fromhex("0094824e" "c0035fd6"))  # sdot v0.4s, v0.16b, v2.16b; ret
ctypes.CFUNCTYPE(None)(ctypes.addressof(ctypes.c_char.from_buffer(code)))()
input()
print("{}", flush=True)
"""

LOADED = """
import ctypes, sys
lib = ctypes.CDLL(sys.argv[1])
assert all(hasattr(lib, name) for name in sys.argv[2:]) and not hasattr(lib, "cudaFree")
find = ctypes.CDLL(None).dlvsym
find.argtypes, find.restype = (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_char_p), ctypes.c_void_p
assert find(lib._handle, b"cudaMalloc", b"libcudart.so.13") and not find(lib._handle, b"cudaMalloc", b"other")
lib.cudaMalloc.restype = ctypes.c_void_p
assert ctypes.string_at(lib.cudaMalloc(), 64) == bytes(64)
assert (ctypes.c_char_p * 2).in_dll(lib, "_ZTI3Foo")[1] == b"3Foo"
input()
print("{}", flush=True)
"""
STUBBED = {b"cudaMalloc": b"libcudart.so.13", b"_ZTI3Foo": b"", b"_ZTV3Foo": b"", b"_ZN3Foo3barEv": b""}


@pytest.fixture
def arm64(users_cache):
    """The arm64 Python and wheels in the user's cache, kept from run to run."""
    kept = users_cache / "qemu-arm64"
    kept.mkdir(parents=True, exist_ok=True)
    link = cache.root() / kept.name
    link.symlink_to(kept)
    yield
    link.unlink()


@pytest.fixture(scope="session")
def onnx_bundle(spec, tmp_path_factory):
    """The small model's ONNX bundle, int8 in its products."""
    out = tmp_path_factory.mktemp("onnx") / "onnx"
    export("onnx", model=spec(), recipe="sandbox", context=64, out=out, measure=False)
    return load(out)


@needs_qemu
def test_parity_of_arms_own_int8_kernels(onnx_bundle, arm64):
    here = target("onnx").open(onnx_bundle.path("program")).logits(TEXT, 0)
    given = inputs(onnx_bundle, short=True, device="qemu-arm64")
    report = parity(given, ("artifact",))
    assert report.device == "qemu-arm64" and report.passed and len(report.stages) == 1
    with runner("qemu-arm64:cortex-a76", onnx_bundle.folder) as there:
        dot = there.logits(TEXT, 0)
    with runner("qemu-arm64:cortex-a72", onnx_bundle.folder) as there:
        plain = there.logits(TEXT, 0)
    assert here.shape == dot.shape == plain.shape
    # Without dot products ONNX Runtime's products take fp32 activations, and so err less than here.
    assert 0 < abs(plain - dot).max() < 1 and 0 < abs(here - dot).max() < 1


@needs_qemu
def test_a_pte_in_the_wheel_of_arm(sandbox_bundle, arm64):
    here = target("executorch").open(sandbox_bundle.path("program")).logits(TEXT, 0)
    with runner("qemu-arm64", sandbox_bundle.folder) as there:
        # XNNPACK's products are exact sums of int8: other instructions, the same sums.
        assert abs(there.logits(TEXT, 0) - here).max() < 1e-4


@needs_qemu
def test_a_bench_checks_there_and_times_nothing(onnx_bundle, arm64):
    report = bench.bench([onnx_bundle.folder], device="qemu-arm64:max", plan=PLAN)
    assert report.device.name == "qemu-arm64:max" and report.device.not_speed == "emulated by qemu"
    assert report.machine.cpu.startswith("max, emulated by qemu") and "aarch64" in report.machine.system
    assert report.checks[0].matched > 0 and not (report.turns or report.loads or report.first_tokens)


@needs_qemu
def test_an_instruction_that_the_processor_lacks(arm64, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def run(processor):
        with (
            open_device(parse(processor), Options()) as emulator,
            Worker(emulator.python("onnx", ("-c", DOT))) as worker,
        ):
            return worker.ask("anything")

    assert run("qemu-arm64:cortex-a76") == {}
    with pytest.raises(ExportError) as error:
        run("qemu-arm64:cortex-a72")
    assert str(error.value) == (
        "cortex-a72 lacks an instruction that the kernels of 'onnx' use (SIGILL); "
        "export it with accuracy_level = 0 in the recipe's [onnx]"
    )
    assert not list(tmp_path.iterdir()), "qemu leaves no core file"


@needs_qemu
def test_arms_loader_takes_the_stand_in_for_libraries_that_nothing_calls(arm64, tmp_path):
    path = tmp_path / "stubs.so"
    path.write_bytes(stubs.library(STUBBED))
    with open_device(parse("qemu-arm64"), Options()) as emulator:
        names = (name.decode() for name in STUBBED)
        with Worker(emulator.python("probe", ("-c", LOADED, str(path), *names))) as worker:
            assert worker.ask("anything") == {}


def test_a_processor_that_qemu_arm64_does_not_know():
    with pytest.raises(ExportError, match="knows no processor 'cortex-a7'; did you mean 'cortex-a7[26]'"):
        open_device(parse("qemu-arm64:cortex-a7"), Options()).__enter__()


def test_without_qemu(monkeypatch, onnx_bundle):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ExportError, match="no `qemu-aarch64` on this machine; apt-get install qemu-user"):
        parity(inputs(onnx_bundle, short=True, device="qemu-arm64"))
    (found,) = module("qemu-arm64").found()
    assert (found.ready, found.hint) == (False, "apt-get install qemu-user") and found in discover()


@pytest.mark.parametrize("tool", ["apt-get", "python"])
def test_without_a_network(tool, monkeypatch, tmp_path):
    monkeypatch.setenv("MOBILE_EXPORT_CACHE", str(tmp_path))
    fake = tmp_path / "bin" / tool
    fake.parent.mkdir()
    fake.write_text("#!/bin/sh\necho 'W: first' >&2; echo 'E: no route to the mirror' >&2; exit 100\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{fake.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(sys, "executable", str(fake))
    with pytest.raises(ExportError, match="cannot fetch .*: E: no route to the mirror; connect once"):
        sysroot.debian() if tool == "apt-get" else sysroot.wheel("numpy")
    assert not list((tmp_path / "qemu-arm64").iterdir())


def test_a_bundle_of_another_system(tmp_path):
    with pytest.raises(ExportError, match="parity does not run on host; use qemu-arm64"):
        runner("host", tmp_path)


def test_wheels_are_the_versions_that_run_here():
    wheels = sysroot.contents().wheels
    assert {name: metadata.version(name).partition("+")[0] for name in wheels} == {
        name: wheel.version for name, wheel in wheels.items()
    }
