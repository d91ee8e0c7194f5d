"""An Android phone, through adb and the sample app's instrumentation: see docs/device-contract.md."""

from __future__ import annotations

import hashlib
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from mobile_export.errors import ExportError
from mobile_export.files import sha256_file
from mobile_export.latency import adb_client, contract, dumpsys
from mobile_export.latency.adb_client import Client
from mobile_export.latency.contract import Request
from mobile_export.latency.devices import Found, Options, Spec
from mobile_export.latency.phone import NOT_SPEED, Answer, Phone
from mobile_export.latency.phone_reports import Look, reached
from mobile_export.latency.protocol import DeviceInfo

if TYPE_CHECKING:
    from mobile_export.bundle import Bundle

ROOT = "/data/local/tmp/mobile-export"
"""The shell writes here, and every app reads."""
REPORTS = f"/sdcard/Android/media/{contract.APP}/mobile-export"
"""The app writes here, and the shell reads."""
LEAST_API = 30
LAUNCH_SECONDS = 3600.0
_LOOK_SECONDS = 10.0
_INSTALL = "see docs/device-contract.md"
_AGAIN = "check the cable and run it again"


class AdbLink:
    """See `phone.Link`."""

    def __init__(self, client: Client) -> None:
        self._client = client

    def push(self, bundle: Bundle) -> str:
        """Only files whose sha256 there is another one are copied, and checked afterwards."""
        from mobile_export.bundle import MANIFEST

        if bundle.manifest.platform == "ios":
            raise ExportError("no Android phone runs a Core ML bundle", "measure it with --device ios")
        manifest = sha256_file(bundle.folder / MANIFEST)
        there = f"{ROOT}/bundles/{manifest[:16]}"
        wanted = {name: file.sha256 for name, file in bundle.manifest.files.items()} | {MANIFEST: manifest}
        for name in self._different(there, wanted):
            self._client.push(bundle.folder / name, f"{there}/{name}")
        if different := self._different(there, wanted):
            raise ExportError(
                f"device {self._client.serial}: '{different[0]}' arrived with another sha256", _AGAIN
            )
        return there

    def _different(self, there: str, wanted: dict[str, str]) -> list[str]:
        found = self._client.sha256([f"{there}/{name}" for name in wanted])
        return [name for name, sha256 in wanted.items() if found.get(f"{there}/{name}") != sha256]

    def look(self) -> Look:
        """From thermalservice and battery."""
        services = ("thermalservice", "battery")
        return dumpsys.look(*(self._client.shell("dumpsys", name, check=False) for name in services))

    def launch(self, request: Request) -> Answer:
        """`am instrument` to its end; the report is pulled and both folders of the run are removed."""
        client = self._client
        folder, out = f"{ROOT}/runs/{request.run}", f"{REPORTS}/{request.run}"
        with tempfile.TemporaryDirectory() as here:
            file = Path(here) / "request.json"
            file.write_bytes(contract.encode(request))
            client.push(file, f"{folder}/request.json")
            try:
                return self._run(request, f"{folder}/request.json", f"{out}/report.json", Path(here))
            finally:
                # A device that is gone has its own error under way.
                with suppress(ExportError):
                    client.shell("am", "force-stop", contract.APP, check=False)
                    client.shell("rm", "-rf", folder, out, check=False)

    def _run(self, request: Request, there: str, report: str, here: Path) -> Answer:
        before = self._last_exit()
        command = ("am", "instrument", "-w", "-r", "-e", "request", there, contract.INSTRUMENTATION)
        held, results, said = 0, {}, []
        with self._client.lines(*command) as lines, _deadline(self._client) as late:
            for line in lines:
                kind, key, value = dumpsys.instrumentation(line)
                if (kind, key, value) == ("STATUS", "phase", "hold"):
                    text = self._client.shell("dumpsys", "meminfo", contract.APP, check=False)
                    held = dumpsys.total_pss_bytes(text)
                if kind in ("RESULT", "CODE", "FAILED"):
                    results[key or kind] = value
                said += [line.strip()] if line.strip() else []
        if late:
            raise ExportError(
                f"device {self._client.serial}: '{request.do}' took longer than {LAUNCH_SECONDS:.0f} s",
                "restart the phone, and measure less",
            )
        if results.get("CODE") != "-1" or "sha256" not in results:
            raise self._ended(request, report, here, before, results, said)
        data = self._pull(report, here)
        if hashlib.sha256(data).hexdigest() != results["sha256"]:
            size = results.get("bytes", "?")
            raise ExportError(
                f"device {self._client.serial}: the report came back as {len(data)} of {size} bytes", _AGAIN
            )
        return Answer(contract.decode(data), held)

    def _pull(self, report: str, here: Path) -> bytes:
        path = here / "report.json"
        self._client.pull(report, path)
        return path.read_bytes()

    def _last_exit(self) -> dumpsys.Exit | None:
        text = self._client.shell("dumpsys", "activity", "exit-info", contract.APP, check=False)
        return dumpsys.last_exit(text)

    def _ended(
        self,
        request: Request,
        report: str,
        here: Path,
        before: dumpsys.Exit | None,
        results: dict[str, str],
        said: list[str],
    ) -> ExportError:
        """The app's process ended by itself, or never began: why, and how far it had come."""
        after, where = self._last_exit(), f"'{request.do}'"
        with suppress(ExportError):
            where += reached(request, contract.decode(self._pull(report, here)))
        if after and after != before:
            why = after.reason + (f", {after.description}" if after.description else "")
            hint = "read `adb logcat -b crash -d`"
            if "LOW MEMORY" in after.reason:
                hint = "close other apps, or export with a smaller --context"
            return ExportError(f"the app ended in {where}: {why}", hint)
        last = results.get("shortMsg") or results.get("FAILED") or (said or ["it said nothing"])[-1]
        return ExportError(f"the app ended in {where}: {last}", "read `adb logcat -d`")


@contextmanager
def open(spec: Spec, options: Options) -> Iterator[Phone]:  # noqa: A001
    """The phone of that serial, or the only one. ExportError: not ready, too old, or without the app."""
    adb = adb_client.binary()
    if adb is None:
        raise ExportError("adb is not installed", "install Android's platform-tools, or Debian's package adb")
    chosen = adb_client.choose(adb_client.listed(adb), spec.address)
    client = Client(adb, chosen.serial)
    properties = dumpsys.properties(client.shell("getprop"))
    api = properties.get("ro.build.version.sdk", "")
    if not api.isdecimal() or int(api) < LEAST_API:
        raise ExportError(
            f"device {chosen.serial} has Android's API level {api or '?'}, and {LEAST_API} is the least",
            "use a phone with Android 11 or later",
        )
    if "package:" not in client.shell("pm", "path", contract.APP, check=False):
        raise ExportError(f"device {chosen.serial} does not have the app {contract.APP}", _INSTALL)
    info = DeviceInfo(name=f"adb:{chosen.serial}", kind="adb", not_speed=_not_speed(properties))
    yield Phone(AdbLink(client), info)


def found() -> list[Found]:
    """What adb lists."""
    adb = adb_client.binary()
    if adb is None:
        return []
    try:
        devices = adb_client.listed(adb, _LOOK_SECONDS)
    except ExportError:
        return []
    return [
        Found(
            f"adb:{one.serial}", one.model or one.state, not one.hint, one.hint and f"{one.state}: {one.hint}"
        )
        for one in devices
    ]


def _not_speed(properties: dict[str, str]) -> str:
    """Empty on a phone."""
    if properties.get("ro.product.name") == "mobile_export_fake":
        return NOT_SPEED["fake"]
    virtual = "1" in (properties.get("ro.boot.qemu"), properties.get("ro.kernel.qemu"))
    virtual |= properties.get("ro.hardware", "") in ("goldfish", "ranchu", "cutf_cvm", "vsoc_x86_64")
    return NOT_SPEED["emulator"] if virtual else ""


@contextmanager
def _deadline(client: Client) -> Iterator[list[bool]]:
    """Stops the app after LAUNCH_SECONDS; the list is then not empty."""
    late: list[bool] = []

    def stop() -> None:
        late.append(True)
        with suppress(ExportError):
            client.shell("am", "force-stop", contract.APP, check=False)

    timer = threading.Timer(LAUNCH_SECONDS, stop)
    timer.start()
    try:
        yield late
    finally:
        timer.cancel()
