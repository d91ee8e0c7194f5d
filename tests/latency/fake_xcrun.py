"""An `xcrun` for tests that knows `devicectl` alone: a stub on PATH, its answers made in this process.

Options are parsed as strictly as devicectl's own, so that a call which it would not take fails.
Shapes of the JSON: devicectl 397 (jsonVersion 2) and Xcode 27 (jsonVersion 5).
"""

import argparse
import hashlib
import json
import socketserver
import threading
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from fake_app import Crash, FakeApp

from mobile_export.latency import contract

ROOT = "Documents/mobile-export"
STUB = """#!/bin/bash
exec 3<>/dev/tcp/127.0.0.1/{port}
printf '%s\\n' $# >&3
printf '%s\\0' "$@" >&3
read -r code <&3
while IFS= read -r line <&3; do printf '%s\\n' "$line"; done
exit "$code"
"""


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


class Failed(Exception):
    """devicectl's error: descriptions from the outermost to the innermost."""

    def __init__(self, *descriptions: str) -> None:
        super().__init__(*descriptions)
        self.descriptions = descriptions

    def json(self) -> dict:
        error: dict = {}
        for text in reversed(self.descriptions):
            info: dict = {"NSLocalizedDescription": {"string": text}}
            if error:
                info["NSUnderlyingError"] = {"error": error}
            error = {"code": 1, "domain": "com.apple.dt.CoreDeviceError", "userInfo": info}
        return error


@dataclass
class FakePhone:
    """An iPhone; its faults are its fields."""

    udid: str = "00008130-FAKE000000000001"
    model: str = "Mobile Export Fake"
    platform: str = "iOS"
    reality: str = "physical"
    pairing: str = "paired"
    connection: str = "connected"
    developer_mode: str = "enabled"
    app: FakeApp | None = field(default_factory=lambda: FakeApp(measure="phys_footprint"))
    locked: bool = False
    full: bool = False
    cut_copy: bool = False
    short_copy: int | None = None
    hangs: str = ""
    """The launch argument that it does not come back from."""
    crash_log: str = "MobileExportSample-2026-11-25-101503.ips"
    crash_logs: dict[str, str] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)
    copied: list[str] = field(default_factory=list)

    def old(self) -> dict:
        """As jsonVersion 2 describes it."""
        return {
            "identifier": "5B4C4E0B-0000-4000-8000-00000000A001",
            "connectionProperties": {"pairingState": self.pairing, "tunnelState": self.connection},
            "deviceProperties": {
                "name": "Nobody's",
                "osVersionNumber": "18.1",
                "developerModeStatus": self.developer_mode,
            },
            "hardwareProperties": {
                "marketingName": self.model,
                "platform": self.platform,
                "productType": "iPhone0,0",
                "reality": self.reality,
                "udid": self.udid,
            },
        }

    def new(self) -> dict:
        """As jsonVersion 5 does, without what it says will be removed."""
        old = self.old()
        return {
            "identifier": old["identifier"],
            "properties": {
                "connection": {"pairingState": self.pairing, "state": self.connection},
                "hardware": old["hardwareProperties"],
                "software": {"osVersionNumber": {"stringValue": "27.0"}},
                "state": {"developerModeStatus": {self.developer_mode: {"mode": 1}}, "name": "Nobody's"},
            },
        }

    def launch(self, arguments: list[str], say) -> int:
        """The app's process, from start to end."""
        assert self.app is not None
        if arguments[0] == "--mobile-export-prepare":
            blobs, bundles = f"{ROOT}/blobs/", f"{ROOT}/bundles/"
            names = {path: path.removeprefix(blobs) for path in self.files if path.startswith(blobs)}
            whole = {path for path, name in names.items() if sha256(self.files[path]) == name}
            self.files = {
                path: data for path, data in self.files.items() if path in whole or path.startswith(bundles)
            }
            has = {names[path]: len(self.files[path]) for path in whole}
            inventory = contract.Inventory(run=arguments[1], blobs=has)
            self.files[f"{ROOT}/inventory.json"] = contract.encode(inventory)
            return 0
        assert arguments[0] == "--mobile-export-request", arguments
        data = self.files[arguments[1]]
        report = arguments[1].replace(".request.json", ".report.json")
        self._assemble(json.loads(data))
        try:
            self.app.run(data, self.files.get, lambda written: self.files.__setitem__(report, written))
        except Crash:
            self.crash_logs[self.crash_log] = "2999-01-01T00:00:00Z"
            say("App terminated due to signal 9.")
            return 1
        self.files[report.replace(".report.json", ".sha256")] = sha256(self.files[report]).encode()
        return 0

    def _assemble(self, request: dict) -> None:
        blobs, folder = f"{ROOT}/blobs/", request["bundle"]
        manifest = self.files.get(blobs + request["manifest"])
        if manifest is not None:
            self.files[f"{folder}/manifest.json"] = manifest
            for name, file in json.loads(manifest)["files"].items():
                self.files[f"{folder}/{name}"] = self.files[blobs + file["sha256"]]


class FakeXcrun(socketserver.ThreadingTCPServer):
    """A context manager; put `folder` first on PATH."""

    daemon_threads = True

    def __init__(self, folder: Path, *phones: FakePhone, version: int = 2) -> None:
        super().__init__(("127.0.0.1", 0), _Call)
        self.phones, self.version, self.calls = list(phones), version, []
        self.broken = ""
        stub = folder / "xcrun"
        stub.write_text(STUB.format(port=self.server_address[1]))
        stub.chmod(0o755)
        self._thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02})

    def __enter__(self) -> "FakeXcrun":
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.shutdown()
        self._thread.join()
        self.server_close()


class _Call(socketserver.StreamRequestHandler):
    server: FakeXcrun
    disable_nagle_algorithm = True

    def handle(self) -> None:
        words = [self._word() for _ in range(int(self.rfile.readline()))]
        self.server.calls.append(words)
        lines: list[str] = []
        options, result, error, code = None, None, None, 0
        try:
            assert words[0] == "devicectl", words
            # What follows `--` is the app's; devicectl would take options before it for its own.
            at = words.index("--") if "--" in words else len(words)
            options = _parser().parse_args(words[1:at])
            options.arguments = words[at + 1 :]
            if self.server.broken:
                raise Failed(self.server.broken)
            result = self._do(options, lines.append)
        except SystemExit:
            lines, code = ["error: Unknown option"], 64
        except Failed as failed:
            error, code = failed.json(), 1
            lines += [f"ERROR: {failed.descriptions[0]} (com.apple.dt.CoreDeviceError error 1)"]
            lines += [f"       {text}" for text in failed.descriptions[1:]]
        if isinstance(result, int):
            code, result = result, {}
        if options is not None and options.json_output:
            info = {"outcome": "failed" if error else "success", "jsonVersion": self.server.version}
            answer = {"info": info, **({"error": error} if error else {"result": result})}
            Path(options.json_output).write_text(json.dumps(answer))
        # A caller that has waited long enough is gone.
        with suppress(ConnectionError):
            self.wfile.write(f"{code}\n".encode() + "".join(line + "\n" for line in lines).encode())

    def _word(self) -> str:
        return b"".join(iter(lambda: self.rfile.read(1), b"\0")).decode()

    def _do(self, options: argparse.Namespace, say) -> dict | int:
        if options.what == "list":
            shape = FakePhone.old if self.server.version < 5 else FakePhone.new
            return {"devices": [shape(phone) for phone in self.server.phones]}
        phone = next((one for one in self.server.phones if one.udid == options.device), None)
        if phone is None:
            raise Failed(f"The specified device was not found. (Name: {options.device})")
        if options.action == "launch":
            if phone.locked:
                raise Failed(
                    "The application failed to launch.",
                    "The request was denied by service delegate (SBMainWorkspace) for reason: Locked.",
                )
            if phone.hangs in options.arguments:
                threading.Event().wait(3)
            return phone.launch(options.arguments, say)
        return getattr(self, f"_{options.action}")(phone, options)

    def _apps(self, phone: FakePhone, options: argparse.Namespace) -> dict:
        found = phone.app is not None and options.bundle_id == contract.APP
        return {"apps": [{"bundleIdentifier": contract.APP, "name": "Sample"}] if found else []}

    def _files(self, phone: FakePhone, options: argparse.Namespace) -> dict:
        assert options.domain_type == "systemCrashLogs"
        rows = phone.crash_logs.items()
        return {"files": [{"relativePath": name, "metadata": {"lastModDate": when}} for name, when in rows]}

    def _to(self, phone: FakePhone, options: argparse.Namespace) -> dict:
        data = Path(options.source).read_bytes()
        if phone.full:
            raise Failed("The file could not be copied.", "No space left on device")
        if phone.cut_copy and len(data) > 10_000:
            phone.files[options.destination] = data[:10_000]
            raise Failed("The file could not be copied.", "The connection was invalidated.")
        phone.files[options.destination] = data
        phone.copied.append(options.destination)
        return {}

    def _from(self, phone: FakePhone, options: argparse.Namespace) -> dict:
        if options.source not in phone.files:
            raise Failed("The file could not be copied.", "No such file or directory")
        short = phone.short_copy if options.source.endswith("report.json") else None
        Path(options.destination).write_bytes(phone.files[options.source][:short])
        return {}


def _parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    common.add_argument("--json-output")
    common.add_argument("--timeout", type=int)
    device = argparse.ArgumentParser(add_help=False, parents=[common], allow_abbrev=False)
    device.add_argument("--device", required=True)
    domain = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    domain.add_argument("--domain-type", required=True, choices=["appDataContainer", "systemCrashLogs"])
    domain.add_argument("--domain-identifier")

    top = argparse.ArgumentParser(allow_abbrev=False)
    kinds = top.add_subparsers(dest="what", required=True)
    listing = kinds.add_parser("list").add_subparsers(dest="action", required=True)
    listing.add_parser("devices", parents=[common])
    groups = kinds.add_parser("device").add_subparsers(dest="group", required=True)
    info = groups.add_parser("info").add_subparsers(dest="action", required=True)
    info.add_parser("apps", parents=[device]).add_argument("--bundle-id")
    files = info.add_parser("files", parents=[device, domain])
    files.add_argument("--username")
    copy = groups.add_parser("copy").add_subparsers(dest="action", required=True)
    for way in ("to", "from"):
        one = copy.add_parser(way, parents=[device, domain])
        one.add_argument("--source", required=True)
        one.add_argument("--destination", required=True)
    process = groups.add_parser("process").add_subparsers(dest="action", required=True)
    launch = process.add_parser("launch", parents=[device])
    launch.add_argument("--console", action="store_true")
    launch.add_argument("--terminate-existing", action="store_true")
    launch.add_argument("bundle", choices=[contract.APP])
    return top
