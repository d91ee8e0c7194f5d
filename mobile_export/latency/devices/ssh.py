"""A Linux machine behind ssh, e.g. a Raspberry Pi: the same worker there, over ssh's pipes.

Files are copied by their sha256 into `~/.cache/mobile-export/device/files` (XDG_CACHE_HOME holds),
those already there are not copied again, and environments stay in `venvs` beside them. All else of
a run, our modules too, lies in a folder that the device removes when the connection ends, however
it ends.
"""

from __future__ import annotations

import hashlib
import io
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path

import mobile_export
from mobile_export import console
from mobile_export.bundle import load, verify
from mobile_export.files import sha256_file
from mobile_export.latency import rounds
from mobile_export.latency.devices import Entry, Found, Options, Spec
from mobile_export.latency.devices.host import WORKER, bundle_spec
from mobile_export.latency.protocol import DeviceInfo, Protocol, Samples
from mobile_export.latency.remote import Remote, parse
from mobile_export.latency.workers import Launch
from mobile_export.targets import SOLO_BLAS

NEEDS = {
    "executorch": ("executorch", "torch", "flatbuffers", "ruamel.yaml", "tabulate"),
    "onnx": ("onnxruntime",),
    "coreml": ("coremltools", "torch"),
}
"""Packages that run a target's artefact."""
_ALWAYS = ("numpy", "msgspec", "psutil", "tokenizers")
_ALONE = ("executorch", "tokenizers")
"""Installed without what they ask for: that is for exporting, or for a hub."""

_HOLD = """
umask 077
base=${XDG_CACHE_HOME:-$HOME/.cache}/mobile-export/device
mkdir -p "$base/files" "$base/venvs" "$base/runs" || exit 1
for part in "$base"/files/*.part; do
  owner=${part%.part}; owner=${owner##*.}
  [ -e "$part" ] && ! kill -0 "$owner" 2>/dev/null && rm -f "$part"
done
run=$(mktemp -d "$base/runs/XXXXXXXX") || exit 1
trap 'rm -rf "$run"' EXIT
trap 'exit 1' HUP INT TERM PIPE
printf '%s\\n%s\\n' "$base" "$run"
cat > /dev/null
"""
_MISSING = """
cd "$1"; shift
for one; do
  [ "$(wc -c 2>/dev/null < "${one%:*}")" = "${one#*:}" ] || echo "${one%:*}"
done
"""
_RECEIVE = """
cd "$1" || exit 1
part=$2.$$.part
trap 'rm -f "$part"' EXIT
trap 'exit 1' HUP INT TERM PIPE
umask 077
cat > "$part" || exit 1
[ "$(sha256sum < "$part" | cut -c1-64)" = "$2" ] || { echo 'the copy was cut off' >&2; exit 1; }
sync "$part" && mv "$part" "$2"
"""
_ARRANGE = """
files=$1; cd "$2" || exit 1; shift 2
mkdir package && tar -xf - -C package || exit 1
while [ $# -gt 0 ]; do
  mkdir -p "$(dirname "$2")" && ln "$files/$1" "$2" || exit 1
  shift 2
done
"""
_ENVIRONMENT = """
venv=$1; alone=$2; needs=$3
[ -e "$venv/ready" ] && exit 0
python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
  { echo 'it has no python3 of version 3.11 or later' >&2; exit 1; }
trap '[ -e "$venv/ready" ] || rm -rf "$venv"' EXIT
trap 'exit 1' HUP INT TERM PIPE
rm -rf "$venv" && python3 -m venv "$venv" || exit 1
"$venv/bin/pip" install --quiet --only-binary :all: $needs >&2 || exit 1
"$venv/bin/pip" install --quiet --only-binary :all: --no-deps $alone >&2 || exit 1
touch "$venv/ready"
"""


class Board:
    """A connected machine, with a folder of this run's own."""

    def __init__(self, spec: Spec, options: Options, remote: Remote, base: str, run: str) -> None:
        self.info = DeviceInfo(name=str(spec), kind=spec.kind)
        self._options, self._remote, self._base, self._run = options, remote, base, run

    def measure(self, entries: Sequence[Entry], plan: Protocol) -> Samples:
        """Copy what is missing, then see `rounds.measure`."""
        python = self._options.python or self._environment(entries)
        self._copy(entries)
        launches = [(one.contender, self._launch(index, one, python)) for index, one in enumerate(entries)]
        probe = Launch("probe", self._worker(python), {}, gone=self._remote.gone)
        return rounds.measure(launches, probe, plan, timed=True, busy=self._options.busy)

    def _launch(self, index: int, entry: Entry, python: str) -> Launch:
        assert entry.folder
        spec = bundle_spec(entry.folder, f"{self._run}/{index}")
        return Launch(entry.contender.name, self._worker(python), spec, gone=self._remote.gone)

    def _worker(self, python: str) -> tuple[str, ...]:
        blas = (f"{name}={value}" for name, value in SOLO_BLAS.items())
        return self._remote.command("env", *blas, f"PYTHONPATH={self._run}/package", python, *WORKER)

    def _environment(self, entries: Sequence[Entry]) -> str:
        """The Python of an environment with the versions that are installed here."""
        targets = {load(entry.folder).manifest.target for entry in entries if entry.folder}
        names = sorted({*_ALWAYS, *(name for target in targets for name in NEEDS[target])})
        pins = {name: f"{name}=={metadata.version(name).partition('+')[0]}" for name in names}
        digest = hashlib.sha256(" ".join(pins.values()).encode()).hexdigest()[:16]
        venv = f"{self._base}/venvs/{digest}"
        alone = " ".join(pin for name, pin in pins.items() if name in _ALONE)
        needs = " ".join(pin for name, pin in pins.items() if name not in _ALONE)
        with console.step(f"environment on {self._remote.destination}"):
            self._remote.run(_ENVIRONMENT, venv, alone, needs)
        return f"{venv}/bin/python"

    def _copy(self, entries: Sequence[Entry]) -> None:
        files, arranged = _files(entries)
        store, run = f"{self._base}/files", self._remote.run
        with console.step(f"copy to {self._remote.destination}") as cost:
            missing = run(_MISSING, store, *(f"{sha}:{path.stat().st_size}" for sha, path in files.items()))
            for sha in missing.split():
                with files[sha].open("rb") as file:
                    run(_RECEIVE, store, sha, given=file)
            with tempfile.TemporaryFile() as package:
                package.write(_package())
                package.seek(0)
                run(_ARRANGE, store, self._run, *arranged, given=package)
            size = sum(files[sha].stat().st_size for sha in missing.split())
            cost.note = f"{len(missing.split())} of {len(files)} files, {console.human_bytes(size)}"


def _files(entries: Sequence[Entry]) -> tuple[dict[str, Path], list[str]]:
    """By sha256 what bundles hold, and pairs of a sha256 and where it goes: `0/model.pte`."""
    files, arranged = {}, []
    for index, entry in enumerate(entries):
        assert entry.folder
        verify(bundle := load(entry.folder))
        manifest = entry.folder / "manifest.json"
        held = {name: one.sha256 for name, one in bundle.manifest.files.items()}
        held[manifest.name] = sha256_file(manifest)
        for name, sha in held.items():
            files[sha] = entry.folder / name
            arranged += [sha, f"{index}/{name}"]
    return files, arranged


def _package() -> bytes:
    """This package's modules as a tar."""
    root = Path(mobile_export.__file__).parent
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as archive:
        for path in sorted(root.rglob("*.py")):
            member = tarfile.TarInfo(str(Path("mobile_export") / path.relative_to(root)))
            member.size = path.stat().st_size
            with path.open("rb") as file:
                archive.addfile(member, file)
    return data.getvalue()


@contextmanager
def open(spec: Spec, options: Options) -> Iterator[Board]:  # noqa: A001
    """Connect. ExportError: the host is not to be reached, or does not let this user in."""
    remote = parse(spec.address)
    with (
        tempfile.TemporaryFile() as said,
        subprocess.Popen(
            remote.script(_HOLD), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=said, text=True
        ) as held,
    ):
        assert held.stdin and held.stdout
        base, run = (held.stdout.readline().strip() for _ in range(2))
        if not run:
            code = held.wait()
            said.seek(0)
            raise remote.error(code, said.read())
        try:
            yield Board(spec, options, remote, base, run)
        finally:
            held.stdin.close()
            try:
                held.wait(30)
            except subprocess.TimeoutExpired:
                held.kill()


def found() -> list[Found]:
    """No machine is listed that nobody named."""
    return []
