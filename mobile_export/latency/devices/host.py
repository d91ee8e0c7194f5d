"""This machine."""

from __future__ import annotations

import platform
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mobile_export.latency import rounds
from mobile_export.latency.devices import Entry, Found, Options, Spec
from mobile_export.latency.protocol import DeviceInfo, Protocol, Samples
from mobile_export.latency.workers import Launch
from mobile_export.targets import SOLO_BLAS

WORKER = ("-m", "mobile_export.latency.worker")


class Host:
    """Workers are processes of the Python that runs this, or of another one."""

    def __init__(self, spec: Spec, options: Options) -> None:
        self.info = DeviceInfo(name=str(spec), kind=spec.kind)
        self._python, self._busy = options.python or sys.executable, options.busy

    def measure(self, entries: Sequence[Entry], plan: Protocol) -> Samples:
        """See `rounds.measure`."""
        launches = [(one.contender, one.launch or launch(one, self._python)) for one in entries]
        probe = Launch("probe", (self._python, *WORKER), {})
        return rounds.measure(launches, probe, plan, timed=True, busy=self._busy)


def launch(entry: Entry, python: str = sys.executable) -> Launch:
    """A worker for a bundle here."""
    assert entry.folder
    spec = bundle_spec(entry.folder, str(entry.folder))
    return Launch(entry.contender.name, (python, *WORKER), spec, SOLO_BLAS)


def bundle_spec(folder: Path, there: str) -> dict[str, Any]:
    """What a worker opens: the bundle in `folder` here, at `there` on its device."""
    return {"kind": "bundle", "path": there, "files": artefact_files(folder)}


def artefact_files(folder: Path) -> list[str]:
    """Names of the files that the runtime reads, `/` between parts."""
    from mobile_export.bundle import load

    files = load(folder).manifest.files
    return sorted(name for name, file in files.items() if file.role == "program")


@contextmanager
def open(spec: Spec, options: Options) -> Iterator[Host]:  # noqa: A001
    """This machine needs no opening."""
    yield Host(spec, options)


def found() -> list[Found]:
    """This machine."""
    from mobile_export.latency.machine import describe

    machine = describe()
    what = f"{machine.cpu}, {machine.cores} cores, {platform.system()} {platform.machine()}"
    return [Found("host", what, True)]
