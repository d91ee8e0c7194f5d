"""An aarch64 Python and wheels in the cache, made once, for qemu-user; nothing is installed.

`sysroot.toml` lists both. Python and libc are Debian's, unpacked; wheels are pip's, unpacked.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import tomllib
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import msgspec

from mobile_export import console
from mobile_export.checkpoint import cache
from mobile_export.errors import ExportError
from mobile_export.latency import stubs

_TAGS = ("manylinux_2_28_aarch64", "manylinux_2_27_aarch64", "manylinux_2_17_aarch64")
_TRIPLE = "aarch64-linux-gnu"
_ONLINE = "connect once to Debian's mirror and a package index, then run it again"
_AFTER_C = "\n\nclass SymInt:\n"
_NO_DISTRIBUTED = """
for _name in ("_c10d_init", "_rpc_init", "_dist_autograd_init", "_faulty_agent_init"):
    vars(sys.modules["torch._C"]).pop(_name, None)
"""
_APT = """APT::Architecture "arm64";
APT::Architectures {{ "arm64"; }};
APT::Sandbox::User "root";
Dir::State::Lists "{0}/lists";
Dir::State::status "{0}/status";
Dir::Cache "{0}/cache";
"""


class Wheel(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One wheel for aarch64, to the byte."""

    version: str
    sha256: str
    leave_out: tuple[str, ...] = ()
    """How the names of members begin that are not unpacked."""
    replace: dict[str, str] = {}
    """Members that get another text."""
    stubs: tuple[str, ...] = ()
    """Libraries in `torch/lib` that are made here: see `stubs.py`."""


class Contents(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`sysroot.toml`."""

    python: str
    debian: tuple[str, ...]
    wheels: dict[str, Wheel]


def contents() -> Contents:
    """What is to be had."""
    table = tomllib.loads(Path(__file__).with_suffix(".toml").read_text("utf-8"))
    return msgspec.convert(table, Contents)


def debian() -> Path:
    """The root of Debian's arm64 packages. ExportError: no apt of Debian 12, or no network."""
    wanted = contents()
    digest = _digest([wanted.python, *wanted.debian])
    return _made(f"debian-{digest}", lambda folder: _unpack_debian(wanted.debian, folder))


def wheel(name: str) -> Path:
    """The folder that holds that package alone. ExportError: no network, or other bytes."""
    wanted = contents().wheels[name]
    digest = _digest([msgspec.json.encode(wanted).decode(), _NO_DISTRIBUTED if wanted.stubs else ""])

    def write(folder: Path) -> None:
        _unpack_wheel(name, wanted, folder)
        if wanted.stubs:
            _make_stubs(folder / "torch", wanted.stubs)

    return _made(f"{name}-{digest}", write)


def bytecode() -> Path:
    """Where the emulated Python keeps what it compiled."""
    return cache.root() / "qemu-arm64" / "bytecode"


def _digest(parts: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:12]


def _made(name: str, write: Any) -> Path:
    """That folder in the cache: whole, or not there."""
    path = cache.root() / "qemu-arm64" / name
    if path.is_dir():
        return path
    with console.step(f"arm64: {name.rpartition('-')[0]}"):
        return cache.build(path, Path.is_dir, write)


def _unpack_debian(packages: Sequence[str], folder: Path) -> None:
    for tool in ("apt-get", "dpkg-deb"):
        if not shutil.which(tool):
            raise ExportError(f"there is no `{tool}`, which fetches an arm64 Python", "run it on Debian 12")
    with tempfile.TemporaryDirectory() as temporary:
        state, debs = Path(temporary), Path(temporary) / "debs"
        for name in ("lists/partial", "cache/archives/partial", "debs"):
            (state / name).mkdir(parents=True)
        (state / "status").touch()
        (state / "apt.conf").write_text(_APT.format(state), "utf-8")
        env = {**os.environ, "APT_CONFIG": str(state / "apt.conf")}
        what = "cannot fetch Debian's arm64 packages"
        _run(["apt-get", "-qq", "update"], what, env=env)
        _run(["apt-get", "-qq", "download", *packages], what, env=env, cwd=debs)
        for deb in sorted(debs.glob("*.deb")):
            _run(["dpkg-deb", "--extract", str(deb), str(folder)], f"{deb.name} is damaged")


def _unpack_wheel(name: str, wanted: Wheel, folder: Path) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        needs = Path(temporary) / "needs.txt"
        needs.write_text(f"{name}=={wanted.version} --hash=sha256:{wanted.sha256}\n", "utf-8")
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--retries", "2"]
        command += ["--no-deps", "--only-binary", ":all:", "--no-cache-dir", "--disable-pip-version-check"]
        command += [part for tag in _TAGS for part in ("--platform", tag)]
        command += ["--python-version", contents().python, "--require-hashes"]
        command += ["--dest", temporary, "--requirement", str(needs)]
        _run(command, f"cannot fetch {name} {wanted.version} for aarch64")
        (file,) = Path(temporary).glob("*.whl")
        with zipfile.ZipFile(file) as archive:
            members = [one for one in archive.namelist() if not one.startswith(wanted.leave_out)]
            archive.extractall(folder, members)
    for member, text in wanted.replace.items():
        (folder / member).write_text(text, "utf-8")


def _make_stubs(torch: Path, names: Sequence[str]) -> None:
    """One library under all those names; and no torch.distributed, which needs one of them when imported."""
    root, lib = debian(), torch / "lib"
    folders = (root / "lib" / _TRIPLE, root / "usr" / "lib" / _TRIPLE)
    others = [path for folder in folders for path in folder.glob("*.so*") if path.is_file()]
    others.append(root / "usr" / "bin" / f"python{contents().python}")
    wanted = stubs.missing(sorted(lib.glob("*.so*")), others)
    first, *more = names
    (lib / first).write_bytes(stubs.library(wanted))
    for name in more:
        (lib / name).symlink_to(first)
    start = torch / "__init__.py"
    before, found, after = start.read_text("utf-8").partition(_AFTER_C)
    if not found:
        raise ExportError("this torch starts otherwise than the one pinned", "use the pinned version")
    start.write_text(before + _NO_DISTRIBUTED + found + after, "utf-8")


def _run(command: Sequence[str], what: str, **options: Any) -> None:
    """ExportError, with the last line that the command said, when it fails."""
    done = subprocess.run(command, capture_output=True, text=True, check=False, **options)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise ExportError(f"{what}: {last}", _ONLINE)
