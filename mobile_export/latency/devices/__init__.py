"""Where bundles are measured. Each kind of device is a module here, found by its name (`-` as `_`).

Such a module has

- `open(spec, options) -> Device`: raises ExportError when the device is not to be had;
- `found() -> list[Found]`: what is there without being named, quickly and without an error;
- where parity runs on it, `runner(spec, folder) -> Runner`: a bundle's artefact there, a context manager.
"""

from __future__ import annotations

import importlib.util
import pkgutil
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import msgspec

from mobile_export.errors import ExportError, nearest

if TYPE_CHECKING:
    from mobile_export.latency import protocol
    from mobile_export.latency.workers import Launch
    from mobile_export.types import Runner

FORMS: dict[str, tuple[str, Literal["no", "must", "may"]]] = {
    "host": ("host", "no"),
    "ssh": ("ssh:USER@HOST[:PORT]", "must"),
    "adb": ("adb[:SERIAL]", "may"),
    "ios": ("ios[:UDID]", "may"),
    "qemu-arm64": ("qemu-arm64[:CPU]", "may"),
}
"""How each kind is written, and whether an address follows it."""


@dataclass(frozen=True)
class Spec:
    """A device as the user names it."""

    kind: str
    address: str = ""

    def __str__(self) -> str:
        return f"{self.kind}:{self.address}" if self.address else self.kind


@dataclass(frozen=True)
class Options:
    """What the command line adds to a device's name."""

    python: str = ""
    """A Python on the device that has the runtime already; else an environment is made there."""
    busy: bool = False
    """Measure although other work runs there."""


@dataclass(frozen=True)
class Entry:
    """One contender, and what a device needs to run it."""

    contender: protocol.Contender
    folder: Path | None = None
    """Its bundle. None: a peer, which runs by `launch` on the host alone."""
    launch: Launch | None = None


class Found(msgspec.Struct, frozen=True):
    """A device that is there."""

    name: str
    """For `--device`."""
    what: str
    """Maker and model, processor, system: as far as known without work."""
    ready: bool
    hint: str = ""
    """What to do when it is not ready."""


class Device(Protocol):
    """An opened device."""

    info: protocol.DeviceInfo

    def measure(self, entries: Sequence[Entry], plan: protocol.Protocol) -> protocol.Samples:
        """Run the plan. ExportError when the device is lost, fails, or says something else in a round."""
        ...


def parse(text: str) -> Spec:
    """`ssh:pi@board:22` -> Spec("ssh", "pi@board:22"). ExportError: no such form."""
    kind, colon, address = text.partition(":")
    if kind not in FORMS:
        raise ExportError(f"unknown device '{text}'", nearest(kind, FORMS))
    form, follows = FORMS[kind]
    wanted = {"no": not colon, "must": bool(address), "may": bool(address) or not colon}
    if not wanted[follows]:
        raise ExportError(f"'{text}' does not name a device", f"write {form}")
    return Spec(kind, address)


def module(kind: str) -> Any:
    """The module of a kind of device. ExportError: this version has none."""
    name = f"{__name__}.{kind.replace('-', '_')}"
    if importlib.util.find_spec(name) is None:
        raise ExportError(f"this version measures on no {kind} device", f"use one of {', '.join(present())}")
    return importlib.import_module(name)


def present() -> list[str]:
    """The kinds that this version has a module for."""
    names = {one.name for one in pkgutil.iter_modules(__path__)}
    return [kind for kind in FORMS if kind.replace("-", "_") in names]


def open_device(spec: Spec, options: Options) -> AbstractContextManager[Device]:
    """The device itself, for a `with` block, at whose end nothing of ours runs there."""
    opened: AbstractContextManager[Device] = module(spec.kind).open(spec, options)
    return opened


def runner(name: str, folder: Path) -> AbstractContextManager[Runner]:
    """The artefact of the bundle in `folder`, run on a device. ExportError: parity does not run there."""
    spec = parse(name)
    there = module(spec.kind)
    if not hasattr(there, "runner"):
        ours = [kind for kind in present() if hasattr(module(kind), "runner")]
        raise ExportError(
            f"parity does not run on {spec.kind}", f"use {', '.join(ours)}, or leave out --device"
        )
    made: AbstractContextManager[Runner] = there.runner(spec, folder)
    return made


def discover() -> list[Found]:
    """All devices that are there without being named."""
    return [one for kind in present() for one in module(kind).found()]
