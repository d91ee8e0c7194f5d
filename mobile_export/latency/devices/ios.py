"""An iPhone or iPad, through devicectl and the sample app: see docs/device-contract.md."""

from __future__ import annotations

import hashlib
import secrets
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from mobile_export.errors import ExportError
from mobile_export.files import sha256_file
from mobile_export.latency import contract, devicectl
from mobile_export.latency.contract import Request
from mobile_export.latency.devicectl import Client, Listed
from mobile_export.latency.devices import Found, Options, Spec
from mobile_export.latency.phone import NOT_SPEED, Answer, Phone
from mobile_export.latency.phone_reports import Look, reached
from mobile_export.latency.protocol import DeviceInfo

if TYPE_CHECKING:
    from mobile_export.bundle import Bundle

ROOT = "Documents/mobile-export"
EXECUTABLE = "MobileExportSample"
"""What crash reports of the app are named after."""
LAUNCH_SECONDS = 3600.0
_LOOK_SECONDS = 5.0
_CLOCKS_DIFFER = timedelta(seconds=10)


class IosLink:
    """See `phone.Link`. The app keeps files under their sha256, and makes bundles of them."""

    def __init__(self, client: Client) -> None:
        self._client = client

    def push(self, bundle: Bundle) -> str:
        """Only files that the app does not have are copied."""
        from mobile_export.bundle import MANIFEST

        manifest = sha256_file(bundle.folder / MANIFEST)
        there = self._inventory()
        files = {file.sha256: bundle.folder / name for name, file in bundle.manifest.files.items()}
        files[manifest] = bundle.folder / MANIFEST
        for sha256, path in files.items():
            if sha256 not in there:
                self._client.push(path, f"{ROOT}/blobs/{sha256}")
        return f"{ROOT}/bundles/{manifest[:16]}"

    def _inventory(self) -> dict[str, int]:
        """What the app has. It also makes its folders, and removes what earlier runs left."""
        run = secrets.token_hex(8)
        said, _ = self._client.launch("--mobile-export-prepare", run, seconds=LAUNCH_SECONDS)
        data = self._pull(f"{ROOT}/inventory.json")
        found = contract.decode_inventory(data) if data is not None else None
        if found is None or found.run != run:
            raise _not_launched(said) or ExportError(
                f"device {self._client.udid}: the app does not answer '--mobile-export-prepare'",
                "install the app that belongs to this version of mobile-export",
            )
        return found.blobs

    def _pull(self, there: str) -> bytes | None:
        """A file's bytes; None: it is not there. ExportError: the phone is gone."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "file"
            try:
                self._client.pull(there, path)
            except ExportError:
                self._client.has_app()
                return None
            return path.read_bytes()

    def look(self) -> Look:
        """devicectl tells nothing of heat or battery; the app does."""
        return Look()

    def launch(self, request: Request) -> Answer:
        """The app from its start to its end; the report is pulled."""
        run = f"{ROOT}/runs/{request.run}"
        began = datetime.now(UTC) - _CLOCKS_DIFFER
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "request.json"
            path.write_bytes(contract.encode(request))
            self._client.push(path, f"{run}.request.json")
        arguments = ("--mobile-export-request", f"{run}.request.json")
        said, late = self._client.launch(*arguments, seconds=LAUNCH_SECONDS)
        if late:
            raise ExportError(
                f"device {self._client.udid}: '{request.do}' took longer than {LAUNCH_SECONDS:.0f} s",
                "restart the phone, and measure less",
            )
        digest, data = self._pull(f"{run}.sha256"), self._pull(f"{run}.report.json")
        if digest is None or data is None:
            raise self._ended(request, data, began, said)
        if hashlib.sha256(data).hexdigest() != digest.decode(errors="replace").strip():
            raise ExportError(
                f"device {self._client.udid}: the report came back with another sha256, {len(data)} bytes",
                "check the cable and run it again",
            )
        return Answer(contract.decode(data))

    def _ended(
        self, request: Request, partial: bytes | None, began: datetime, said: list[str]
    ) -> ExportError:
        """The app's process ended by itself, or never began: why, and how far it had come."""
        if error := _not_launched(said):
            return error
        where = f"'{request.do}'"
        with suppress(ExportError):
            where += reached(request, contract.decode(partial or b""))
        logs = self._crash_logs(began)
        if any("JetsamEvent" in name for name in logs):
            return ExportError(
                f"the app ended in {where}: iOS took its memory ({logs[-1]})",
                "close other apps, or export with a smaller --context",
            )
        why = f"see {logs[-1]}" if logs else devicectl.last_line(said)
        return ExportError(f"the app ended in {where}: {why}", "read the phone's crash reports in Xcode")

    def _crash_logs(self, began: datetime) -> list[str]:
        """Names of the reports since then, oldest first."""
        with suppress(ExportError, ValueError):
            found = [(datetime.fromisoformat(when), name) for name, when in self._client.crash_logs().items()]
            return [
                name
                for when, name in sorted(found)
                if when >= began and name.startswith(("JetsamEvent", EXECUTABLE))
            ]
        return []


def _not_launched(said: list[str]) -> ExportError | None:
    """devicectl's own error, where there is one."""
    failed = next((line for line in said if line.startswith("ERROR:")), None)
    if failed is None:
        return None
    what = failed.removeprefix("ERROR:").strip()
    return ExportError(f"devicectl cannot launch the app: {what}", devicectl.hint(" ".join(said)))


@contextmanager
def open(spec: Spec, options: Options) -> Iterator[Phone]:  # noqa: A001
    """The device of that UDID, or the only one there. ExportError: not ready, or without the app."""
    if not devicectl.installed():
        raise ExportError("xcrun is not installed", "measure iPhones from a Mac with Xcode 16 or later")
    chosen = _choose(devicectl.listed(), spec.address)
    client = Client(chosen.udid)
    if not client.has_app():
        raise ExportError(
            f"device {chosen.udid} does not have the app {contract.APP}", "see docs/device-contract.md"
        )
    yield Phone(
        IosLink(client), DeviceInfo(name=f"ios:{chosen.udid}", kind="ios", not_speed=_not_speed(chosen))
    )


def found() -> list[Found]:
    """What devicectl lists."""
    if not devicectl.installed():
        return []
    try:
        devices = devicectl.listed(_LOOK_SECONDS)
    except ExportError:
        return []
    return [Found(f"ios:{one.udid}", f"{one.model}, {one.system}", not one.hint, one.hint) for one in devices]


def _choose(devices: list[Listed], udid: str) -> Listed:
    named = [one for one in devices if one.udid.lower() == udid.lower()] if udid else devices
    if udid and not named:
        there = ", ".join(one.udid for one in devices) or "none"
        raise ExportError(f"devicectl has no device '{udid}'", f"plug it in; there now: {there}")
    if not named:
        raise ExportError("devicectl has no device", "plug in an iPhone that trusts this Mac")
    if len(named) > 1:
        names = " or ".join(f"ios:{one.udid}" for one in named)
        raise ExportError(f"devicectl has {len(named)} devices", f"name one: --device {names}")
    if named[0].hint:
        state, _, what = named[0].hint.partition(": ")
        raise ExportError(f"device {named[0].udid}: {state}", what)
    return named[0]


def _not_speed(device: Listed) -> str:
    """Empty on a phone."""
    if device.model == "Mobile Export Fake":
        return NOT_SPEED["fake"]
    return "" if device.reality == "physical" else NOT_SPEED["simulator"]
