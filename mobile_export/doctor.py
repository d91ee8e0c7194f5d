"""Is this machine ready to export? Each check says what to do when it is not."""

from __future__ import annotations

import platform
import shutil
import sys
import tomllib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Literal

import msgspec

from mobile_export import console
from mobile_export.checkpoint import cache
from mobile_export.errors import ExportError

Status = Literal["ok", "warn", "fail"]
_GB = 1_000_000_000
_EXPORT_MEMORY = 9 * _GB
"""The most that an export of the default model may take."""
_CACHE_DISK = 5 * _GB
"""GGUF, fp32 weights and the programs of one model."""
_BUNDLE_DISK = 1 * _GB
_TOOLS = {
    "adb": ("any", "measuring on an Android phone", "install Android's platform-tools"),
    "xcrun": ("Darwin", "building for iOS", "install Xcode"),
    "qemu-aarch64": ("Linux", "running ARM binaries on this machine", "install the package qemu-user"),
}
_FEATURES = ("avx2", "fma", "avx512f", "avx512_vnni", "avx_vnni", "asimddp", "i8mm", "sme")


class Check(msgspec.Struct, frozen=True):
    """One thing looked at."""

    name: str
    status: Status
    found: str
    hint: str = ""
    """What to do, when the status is not `ok`."""


def doctor() -> list[Check]:
    """Look at Python, packages, processor, memory, disk, cache, the default model and optional tools."""
    return [
        _python(),
        *_packages(),
        _processor(),
        _memory(),
        _disk("disk of the cache", cache.root(), _CACHE_DISK, "set MOBILE_EXPORT_CACHE to a larger disk"),
        _disk("disk here", Path.cwd(), _BUNDLE_DISK, "choose an --out on a larger disk"),
        _cache(),
        _model(),
        *_tools(),
    ]


def worst(checks: list[Check]) -> Status:
    """The gravest status."""
    order: tuple[Status, ...] = ("fail", "warn", "ok")
    return next(status for status in order if status == "ok" or any(one.status == status for one in checks))


def render(checks: list[Check]) -> None:
    """Print the checks, and the hints of those that are not ok."""
    console.table("", ["check", "", "found"], [[one.name, one.status, one.found] for one in checks])
    for one in checks:
        if one.hint:
            console.say(f"{one.name}: {one.hint}")


def _python() -> Check:
    found = platform.python_version()
    if sys.version_info[:2] == (3, 11):
        return Check("python", "ok", found)
    return Check("python", "fail", found, "use Python 3.11: the pinned packages are tested with it alone")


def _packages() -> Iterator[Check]:
    """One line for all that are as pinned, and one for each that is not."""
    from packaging.requirements import Requirement

    pinned = [Requirement(line) for line in _pins()]
    pinned = [one for one in pinned if one.marker is None or one.marker.evaluate({"extra": ""})]
    good = 0
    for one in pinned:
        try:
            found = metadata.version(one.name)
        except metadata.PackageNotFoundError:
            found = "missing"
        if found != "missing" and one.specifier.contains(found, prereleases=True):
            good += 1
        else:
            hint = f"install {one.name}{one.specifier}"
            yield Check(f"package {one.name}", "fail", f"{found}, not {one.specifier}", hint)
    yield Check("packages", "ok", f"{good} of {len(pinned)} as pinned")


def _pins() -> list[str]:
    """Our requirements: as installed, or from pyproject.toml when run from a checkout."""
    try:
        return metadata.requires("mobile-export") or []
    except metadata.PackageNotFoundError:
        project = Path(__file__).parent.parent / "pyproject.toml"
        return list(tomllib.loads(project.read_text("utf-8"))["project"]["dependencies"])


def _processor() -> Check:
    import psutil  # type: ignore[import-untyped]

    cores = psutil.cpu_count(logical=False) or psutil.cpu_count() or 1
    features = [name for name in _FEATURES if name in _cpu_flags()]
    machine = platform.machine()
    found = f"{cores} cores, {machine} {' '.join(features)}".strip()
    if machine in ("x86_64", "AMD64") and "avx2" not in features:
        return Check("processor", "warn", found, "without AVX2 an export takes several times as long")
    return Check("processor", "ok", found)


def _cpu_flags() -> set[str]:
    """Feature names as the Linux kernel gives them; empty where it does not."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        return set()
    for line in lines:
        key, _, value = line.partition(":")
        if key.strip() in ("flags", "Features"):
            return set(value.split())
    return set()


def _memory() -> Check:
    import psutil

    memory = psutil.virtual_memory()
    found = f"{console.human_bytes(memory.available)} of {console.human_bytes(memory.total)} available"
    if memory.available < _EXPORT_MEMORY:
        hint = (
            f"an export of the default model takes up to {console.human_bytes(_EXPORT_MEMORY)}: close others"
        )
        return Check("memory", "warn", found, hint)
    return Check("memory", "ok", found)


def _disk(name: str, path: Path, needed: int, hint: str) -> Check:
    while not path.exists():
        path = path.parent
    free = shutil.disk_usage(path).free
    found = f"{console.human_bytes(free)} free"
    if free < needed:
        return Check(name, "warn", found, f"{console.human_bytes(needed)} are wanted: {hint}")
    return Check(name, "ok", found)


def _cache() -> Check:
    sizes = {}
    root = cache.root()
    for folder in sorted(root.iterdir()) if root.is_dir() else ():
        if size := sum(file.lstat().st_size for file in folder.rglob("*") if file.is_file()):
            sizes[folder.name] = console.human_bytes(size)
    return Check("cache", "ok", ", ".join(f"{name} {size}" for name, size in sizes.items()) or "empty")


def _model() -> Check:
    """The default model, by its weights' sha256 when it is there."""
    from mobile_export.checkpoint import catalog, folder, gguf

    name = catalog.default_name()
    model = next(one for one in catalog.load().model if one.name == name)
    title = f"model {name}"
    if not isinstance(model, catalog.Wheels):
        return Check(title, "ok", "from the hub")
    path = cache.checkpoints() / f"gguf-{model.sha256[:16]}-v{gguf.VERSION}"
    if not path.is_dir():
        size = console.human_bytes(model.size)
        return Check(title, "warn", "not in the cache", f"the first export fetches {size}: be online for it")
    try:
        folder.validate(path)
        whole = folder.intact(path)
    except ExportError:
        whole = False
    if whole:
        return Check(title, "ok", "in the cache, intact")
    return Check(title, "warn", "in the cache, damaged", "the next export makes it again from its GGUF")


def _tools() -> Iterator[Check]:
    for tool, (system, purpose, hint) in _TOOLS.items():
        if system not in ("any", platform.system()):
            continue
        if shutil.which(tool):
            yield Check(tool, "ok", "found")
        else:
            yield Check(tool, "warn", "not found", f"for {purpose} only: {hint}")
