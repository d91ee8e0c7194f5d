"""Linux on ARM, emulated by Debian's qemu-user: the runtimes' real kernels, for parity, never for speed.

The worker is the same one, in an aarch64 Python with aarch64 wheels (`sysroot.py`). A processor model
has the instructions that qemu gives it, and no others.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mobile_export
from mobile_export.bundle import load
from mobile_export.errors import ExportError, nearest
from mobile_export.latency import rounds, sysroot
from mobile_export.latency.devices import Entry, Found, Options, Spec
from mobile_export.latency.devices.host import WORKER, bundle_spec
from mobile_export.latency.protocol import DeviceInfo, Protocol, Samples
from mobile_export.latency.workers import Launch, RemoteRunner, Worker
from mobile_export.targets import SOLO_BLAS

QEMU = "qemu-aarch64"
NOT_SPEED = "emulated by qemu"
_INSTALL = "apt-get install qemu-user"
_ILLEGAL = -4
"""SIGILL, which qemu dies of itself when the emulated process does."""
_NO_CORE_FILE = ("sh", "-c", 'ulimit -c 0; exec "$@"', "sh")
_NOT_OURS = ("LD_PRELOAD", "LD_LIBRARY_PATH", "OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE")
"""Variables of this machine that mean nothing, or harm, there."""


@dataclass(frozen=True)
class CPU:
    """A processor that qemu emulates."""

    model: str
    """For qemu's `-cpu`."""
    implementer: int
    part: int
    variant: int
    revision: int
    """As its MIDR_EL1 has them, which qemu-user does not show to programs that read /proc/cpuinfo."""


CPUS = {
    "cortex-a76": CPU("cortex-a76", 0x41, 0xD0B, 4, 1),
    "cortex-a72": CPU("cortex-a72", 0x41, 0xD08, 0, 3),
    "max": CPU("max", 0x00, 0x051, 0, 0),
    "max-no-sme": CPU("max,sme=off", 0x00, 0x051, 0, 0),
}
"""By name. The first is the default: dot products, as phones have had since 2018; a Cortex-A72, the
Raspberry Pi 4B's, has none; `max` has all that this qemu knows."""

_NEEDS = {"onnx": ("onnxruntime",), "executorch": ("executorch", "torch", "typing_extensions")}
"""Wheels that run a target's artefact."""
_ALWAYS = ("numpy", "msgspec", "psutil")
_INSTEAD = {
    "onnx": "export it with accuracy_level = 0 in the recipe's [onnx]",
    "executorch": "export it with `mobile-export onnx`, or build ExecuTorch for that processor",
}
"""What to do about a target's kernels where a processor lacks an instruction."""


@dataclass(frozen=True)
class Emulator:
    """A processor under qemu, with a root folder of this run's own."""

    info: DeviceInfo
    name: str
    root: Path

    def measure(self, entries: Sequence[Entry], plan: Protocol) -> Samples:
        """Check the selftest, and time nothing: see `rounds.measure`."""
        launches = [(one.contender, self.launch(one.folder)) for one in entries if one.folder]
        probe = self.python("probe", WORKER)
        return rounds.measure(launches, probe, plan, timed=False, busy=True)

    def launch(self, folder: Path) -> Launch:
        """A worker for a bundle. ExportError: its runtime does not run here, or is not to be had."""
        target = load(folder).manifest.target
        if target not in _NEEDS:
            raise ExportError(f"a bundle of {target} does not run on qemu-arm64", "name another --device")
        return self.python(target, WORKER, bundle_spec(folder, str(folder.absolute())))

    def python(self, what: str, arguments: Sequence[str], spec: dict[str, Any] | None = None) -> Launch:
        """The emulated Python, with what runs artefacts of the target `what`, if it is one."""
        wheels = [str(sysroot.wheel(name)) for name in (*_ALWAYS, *_NEEDS.get(what, ()))]
        unset = [part for name in _NOT_OURS for part in ("-U", name)]
        qemu = (QEMU, "-L", str(self.root), "-cpu", CPUS[self.name].model, *unset)
        interpreter = str(self.root / "usr" / "bin" / f"python{sysroot.contents().python}")
        env = {
            "PYTHONHOME": str(self.root / "usr"),
            "PYTHONPATH": os.pathsep.join([str(self.root / "package"), *wheels]),
            "PYTHONPYCACHEPREFIX": str(sysroot.bytecode()),
            "PYTHONNOUSERSITE": "1",
            **SOLO_BLAS,
        }
        lacks = f"{self.name} lacks an instruction that the kernels of '{what}' use (SIGILL)"
        instead = _INSTEAD.get(what, "name another processor")
        command = (*_NO_CORE_FILE, *qemu, interpreter, *arguments)
        return Launch(what, command, spec or {}, env, gone={_ILLEGAL: ExportError(lacks, instead)})


@contextmanager
def open(spec: Spec, options: Options) -> Iterator[Emulator]:  # noqa: A001
    """ExportError: no such processor, no qemu-user, or no network when the cache has no arm64 Python."""
    name = spec.address or next(iter(CPUS))
    if name not in CPUS:
        raise ExportError(f"qemu-arm64 knows no processor '{name}'", nearest(name, CPUS))
    version = _version()
    if not version:
        raise ExportError(f"there is no `{QEMU}` on this machine", _INSTALL)
    if options.python:
        raise ExportError("qemu-arm64 has a Python of its own", "leave out --device-python")
    with tempfile.TemporaryDirectory(prefix="mobile-export-qemu-") as folder:
        root = Path(folder)
        for entry in sysroot.debian().iterdir():
            (root / entry.name).symlink_to(entry)
        (root / "package").mkdir()
        (root / "package" / "mobile_export").symlink_to(Path(mobile_export.__file__).parent)
        _describe(name, version, root)
        info = DeviceInfo(name=f"{spec.kind}:{name}", kind=spec.kind, not_speed=NOT_SPEED)
        yield Emulator(info, name, root)


@contextmanager
def runner(spec: Spec, folder: Path) -> Iterator[RemoteRunner]:
    """A bundle's artefact there, opened, its calls over the worker's pipes."""
    with open(spec, Options()) as emulator, Worker(emulator.launch(folder)) as worker:
        yield RemoteRunner(worker, worker.open(threads=1))


def found() -> list[Found]:
    """The emulator."""
    version = _version()
    what = f"{NOT_SPEED} {version}, for parity: {', '.join(CPUS)}" if version else "an emulator, for parity"
    return [Found("qemu-arm64", what, bool(version), "" if version else _INSTALL)]


def _version() -> str:
    """Of qemu-user, e.g. `7.2.22`; empty: there is none."""
    if not shutil.which(QEMU):
        return ""
    said = subprocess.run([QEMU, "--version"], capture_output=True, text=True, check=False).stdout
    number = re.search(r"version (\S+)", said)
    return number[1] if number else "of unknown version"


def _describe(name: str, version: str, root: Path) -> None:
    """/proc/cpuinfo and each core's MIDR_EL1 as an ARM kernel shows them; qemu 7.2 shows this machine's,
    which crashes the runtimes' detection of processors."""
    cpu = CPUS[name]
    lines = (
        f"model name\t: {name}, {NOT_SPEED} {version}",
        f"CPU implementer\t: {cpu.implementer:#04x}",
        "CPU architecture: 8",
        f"CPU variant\t: {cpu.variant:#x}",
        f"CPU part\t: {cpu.part:#05x}",
        f"CPU revision\t: {cpu.revision}",
    )
    cores = range(os.cpu_count() or 1)
    text = "".join("\n".join([f"processor\t: {core}", *lines, "", ""]) for core in cores)
    (root / "proc").mkdir()
    (root / "proc" / "cpuinfo").write_text(text, "utf-8")
    midr = cpu.implementer << 24 | cpu.variant << 20 | 0xF << 16 | cpu.part << 4 | cpu.revision
    for core in cores:
        folder = root / "sys/devices/system/cpu" / f"cpu{core}" / "regs/identification"
        folder.mkdir(parents=True)
        (folder / "midr_el1").write_text(f"{midr:#018x}\n", "utf-8")
