"""One iOS device through `xcrun devicectl`, whose answers are read from the JSON that it writes.

Both shapes of a device's description are read: `properties` (jsonVersion 5, Xcode 27), else
`hardwareProperties`, `deviceProperties` and `connectionProperties`. devicectl copies files into and
out of an app's data container and lists them; it removes none.
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from mobile_export.errors import ExportError
from mobile_export.latency import contract

QUERY_SECONDS = 60.0
COPY_SECONDS = 1800.0
_AGAIN = "plug it in, unlock it, and run it again"
_KNOWN = {
    "Locked": "unlock the phone, keep its screen on, and run it again",
    "No space left": "free some space on the phone",
    "developer disk image": "open Xcode's Devices window once with this phone plugged in",
    "Developer Mode": "switch on Developer Mode in its settings, under Privacy & Security",
}


@dataclass(frozen=True)
class Listed:
    """A device of `devicectl list devices`."""

    udid: str
    model: str
    system: str
    reality: str
    """`physical`, or something else for what is no device."""
    pairing: str
    connection: str
    """`unavailable` when it cannot be reached; an idle one reads `disconnected`, and connects when asked."""
    developer_mode: str

    @property
    def hint(self) -> str:
        """What keeps it from measuring, and what to do; empty when it is ready."""
        if self.pairing not in ("paired", ""):
            return f"{self.pairing}: unlock it and trust this Mac in the dialog on its screen"
        if self.connection == "unavailable":
            return "unavailable: plug it in and unlock it"
        if self.developer_mode == "disabled":
            return f"no Developer Mode: {_KNOWN['Developer Mode']}"
        return ""


def installed() -> bool:
    """Is there an xcrun on PATH?"""
    return shutil.which("xcrun") is not None


def listed(seconds: float = QUERY_SECONDS) -> list[Listed]:
    """All iPhones and iPads. ExportError: devicectl fails."""
    result = ask("list", "devices", seconds=seconds)
    devices = [_listed(one) for one in result.get("devices", [])]
    return [one for one in devices if one is not None]


def _listed(device: dict[str, Any]) -> Listed | None:
    """None: it has no id, runs no iOS, or is a simulator, which devicectl lists since Xcode 27."""

    def of(new: str, old: str) -> Any:
        return _at(device, f"properties.{new}") or _at(device, old) or ""

    udid = of("hardware.udid", "hardwareProperties.udid") or device.get("identifier", "")
    platform = of("hardware.platform", "hardwareProperties.platform") or "iOS"
    reality = of("hardware.reality", "hardwareProperties.reality") or "physical"
    if not udid or platform != "iOS" or reality == "simulated":
        return None
    mode = of("state.developerModeStatus", "deviceProperties.developerModeStatus")
    model = of("hardware.marketingName", "hardwareProperties.marketingName")
    system = of("software.osVersionNumber.stringValue", "deviceProperties.osVersionNumber")
    return Listed(
        udid=udid,
        model=model or of("hardware.productType", "hardwareProperties.productType"),
        system=f"iOS {system}",
        reality=reality,
        pairing=of("connection.pairingState", "connectionProperties.pairingState"),
        connection=of("connection.state", "connectionProperties.tunnelState"),
        developer_mode=next(iter(mode), "") if isinstance(mode, dict) else mode,
    )


def _at(value: Any, path: str) -> Any:
    for key in path.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    return value


class Client:
    """An iOS device. Each method raises ExportError when devicectl cannot do it."""

    def __init__(self, udid: str) -> None:
        self.udid = udid
        self._container = ("--domain-type", "appDataContainer", "--domain-identifier", contract.APP)

    def has_app(self) -> bool:
        """Is the app installed?"""
        return bool(self._ask("info", "apps", "--bundle-id", contract.APP).get("apps"))

    def crash_logs(self) -> dict[str, str]:
        """Time of each of the system's crash reports, ISO 8601, by name."""
        domain = ("--domain-type", "systemCrashLogs", "--username", "mobile")
        result = self._ask("info", "files", *domain)
        return {
            one["relativePath"]: str(_at(one, "metadata.lastModDate") or "")
            for one in result.get("files", [])
        }

    def push(self, path: Path, there: str) -> None:
        """Copy a file into the container."""
        ways = ("--source", str(path), "--destination", there)
        self._ask("copy", "to", *self._container, *ways, seconds=COPY_SECONDS)

    def pull(self, there: str, path: Path) -> None:
        """Copy a file out of the container."""
        ways = ("--source", there, "--destination", str(path))
        self._ask("copy", "from", *self._container, *ways, seconds=COPY_SECONDS)

    def launch(self, *arguments: str, seconds: float) -> tuple[list[str], bool]:
        """A fresh process of the app to its end: what is printed meanwhile, and whether it took too long.

        devicectl passes on what the app prints to a terminal alone: nothing here stands on it.
        """
        options = ("--console", "--terminate-existing")
        command = ("device", "process", "launch", "--device", self.udid, *options, contract.APP, "--")
        done = subprocess.Popen(
            ["xcrun", "devicectl", *command, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        try:
            said, late = done.communicate(timeout=seconds)[0], False
        except subprocess.TimeoutExpired:
            done.terminate()
            said, late = done.communicate()[0], True
        return [line.strip() for line in said.splitlines() if line.strip()], late

    def _ask(self, *words: str, seconds: float = QUERY_SECONDS) -> dict[str, Any]:
        return ask("device", *words[:2], "--device", self.udid, *words[2:], seconds=seconds)


def ask(*words: str, seconds: float) -> dict[str, Any]:
    """The `result` of a devicectl command. ExportError: it fails."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "answer.json"
        limit = ("--timeout", f"{seconds:.0f}", "--json-output", str(file))
        try:
            done = subprocess.run(
                ["xcrun", "devicectl", *words, *limit],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=seconds + 30,
            )
        except subprocess.TimeoutExpired:
            raise ExportError(f"devicectl gave no answer in {seconds:.0f} s", _AGAIN) from None
        try:
            answer = msgspec.json.decode(file.read_bytes(), type=dict[str, Any])
        except (OSError, msgspec.DecodeError):
            answer = {}
    if done.returncode == 0 and isinstance(answer.get("result"), dict):
        return answer["result"]
    said = " ".join(dict.fromkeys(_descriptions(answer.get("error")))) or last_line(
        (done.stderr or done.stdout).splitlines()
    )
    what = " ".join(words[1:3] if words[0] == "device" else words[:2])
    raise ExportError(f"devicectl cannot {what}: {said}", hint(said))


def hint(said: str) -> str:
    """What to do about what devicectl says."""
    return next((what for word, what in _KNOWN.items() if word in said), _AGAIN)


def last_line(lines: Sequence[str]) -> str:
    """The last of them."""
    return lines[-1].strip() if lines else "it said nothing"


def _descriptions(error: Any) -> Iterator[str]:
    """From the outermost error to the one that it stems from."""
    while isinstance(error, dict):
        for key in ("NSLocalizedDescription", "NSLocalizedFailureReason"):
            if text := _at(error, f"userInfo.{key}.string"):
                yield " ".join(str(text).split())
        error = _at(error, "userInfo.NSUnderlyingError.error")
