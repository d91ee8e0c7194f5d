"""An adb server for tests: the real host protocol on a socket, fake devices behind it.

A client is told of it by ADB_SERVER_SOCKET. Requests are four hexadecimal digits of length and a
name; answers start with OKAY or FAIL. Sources: SERVICES.TXT, SYNC.TXT and file_sync_protocol.h of adb.
"""

import socketserver
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

VERSION = 41
"""Of the protocol between client and server; a client that speaks another one would start its own server."""
CHUNK = 64 * 1024
DIRECTORY, FILE = 0o040771, 0o100644

STDOUT, STDERR, EXIT = 1, 2, 3

UNREACHABLE = {
    "offline": "device offline",
    "unauthorized": "device unauthorized.\nThis adb server's $ADB_VENDOR_KEYS is not set\n"
    "Try 'adb kill-server' if that seems wrong.\n"
    "Otherwise check for a confirmation dialog on your device.",
    "authorizing": "device still authorizing",
}


class Refused(Exception):
    """A request that is answered with FAIL."""


class Cut(Exception):
    """The device is gone: the connection ends without an answer."""


class FakeAdbServer(socketserver.ThreadingTCPServer):
    """A context manager; `devices` may change while it runs. `requests` holds what clients asked for."""

    allow_reuse_address = True
    daemon_threads = True

    def __init__(self, *devices: Any) -> None:
        super().__init__(("127.0.0.1", 0), _Connection)
        self.devices = list(devices)
        self.requests: list[str] = []
        self._thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02})

    def __enter__(self) -> "FakeAdbServer":
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.shutdown()
        self._thread.join()
        self.server_close()

    @property
    def spec(self) -> str:
        """For ADB_SERVER_SOCKET."""
        return f"tcp:127.0.0.1:{self.server_address[1]}"

    def listing(self, long: bool) -> str:
        """As `adb devices` prints it."""
        lines = []
        for number, device in enumerate(self.devices, 1):
            more = f" {device.description}" if device.state == "device" else ""
            tail = f"{device.state}{more} transport_id:{number}" if long else device.state
            lines.append(f"{device.serial:<22} {tail}\n" if long else f"{device.serial}\t{tail}\n")
        return "".join(lines)

    def pick(self, kind: str, value: str = "") -> Any:
        """The device of a serial or a transport id, or the only one; refused as the real server refuses."""
        found = {
            "serial": lambda: [one for one in self.devices if one.serial == value],
            "id": lambda: self.devices[int(value) - 1 : int(value)],
            "any": lambda: list(self.devices),
        }[kind]()
        if not found:
            missing = f"device '{value}' not found" if value else "no devices/emulators found"
            raise Refused(missing)
        if len(found) > 1:
            raise Refused("more than one device/emulator")
        if found[0].state in UNREACHABLE:
            raise Refused(UNREACHABLE[found[0].state])
        return found[0]


class _Connection(socketserver.StreamRequestHandler):
    server: FakeAdbServer
    disable_nagle_algorithm = True

    def handle(self) -> None:
        device = None
        # A client that leaves in mid-answer is no error of the server's.
        with suppress(Cut, ConnectionError, struct.error):
            while name := self._request():
                try:
                    if device is not None:
                        self._of_device(device, name)
                        return
                    device = self._of_host(name)
                    if device is None:
                        return
                except Refused as refused:
                    self.wfile.write(b"FAIL" + _text(str(refused)))
                    return

    def _request(self) -> str:
        head = self.rfile.read(4)
        if len(head) < 4:
            return ""
        name = self.rfile.read(int(head, 16)).decode()
        self.server.requests.append(name)
        return name

    def _of_host(self, name: str) -> Any:
        """Answer, or the device that the connection is switched to."""
        server = self.server
        switches: list[tuple[str, str, bool]] = [
            ("host:tport:serial:", "serial", True),
            ("host:transport:", "serial", False),
            ("host:transport-id:", "id", False),
            ("host:tport:any", "any", True),
            ("host:transport-any", "any", False),
        ]
        for start, kind, with_id in switches:
            if name.startswith(start):
                device = server.pick(kind, name.removeprefix(start))
                number = struct.pack("<Q", server.devices.index(device) + 1) if with_id else b""
                self.wfile.write(b"OKAY" + number)
                return device
        self.wfile.write(b"OKAY" + _text(self._host_answer(name)))
        return None

    def _host_answer(self, name: str) -> str:
        server = self.server
        answers: dict[str, Callable[[], str]] = {
            "host:version": lambda: f"{VERSION:04x}",
            "host:devices": lambda: server.listing(False),
            "host:devices-l": lambda: server.listing(True),
            "host:host-features": lambda: "shell_v2,stat_v2,ls_v2,sendrecv_v2",
        }
        if name in answers:
            return answers[name]()
        scope, _, what = name.rpartition(":")
        kind, _, value = scope.partition(":")
        kinds = {"host": "any", "host-serial": "serial", "host-transport-id": "id"}
        if kind not in kinds:
            raise Refused("unknown host service")
        device = server.pick(kinds[kind], value)
        if what == "features":
            return ",".join(device.features)
        if what == "get-state":
            return device.state
        raise Refused("unknown host service")

    def _of_device(self, device: Any, name: str) -> None:
        service, _, argument = name.partition(":")
        if service == "sync":
            self.wfile.write(b"OKAY")
            _Sync(device, self.rfile, self.wfile).serve()
        elif service == "shell":
            self.wfile.write(b"OKAY")
            device.shell(argument, lambda kind, data: None if kind == EXIT else self.wfile.write(data))
        elif service.startswith("shell,v2") and "shell_v2" in device.features:
            self.wfile.write(b"OKAY")
            device.shell(argument, self._packet)
        else:
            raise Refused(f"unknown service '{service}'")

    def _packet(self, kind: int, data: bytes) -> None:
        self.wfile.write(struct.pack("<BI", kind, len(data)) + data)


class _Sync:
    """File transfer on a connection that stays open for several requests."""

    def __init__(self, device: Any, rfile: Any, wfile: Any) -> None:
        self.device, self.rfile, self.wfile = device, rfile, wfile

    def serve(self) -> None:
        handlers = {
            b"STAT": lambda path: self._stat(b"STAT", path),
            b"LIST": lambda path: self._list(b"DENT", path),
            b"SEND": self._receive_file,
            b"RECV": self._send_file,
        }
        if "stat_v2" in self.device.features:
            handlers[b"STA2"] = lambda path: self._stat(b"STA2", path)
            handlers[b"LST2"] = lambda path: self._stat(b"LST2", path)
        if "sendrecv_v2" in self.device.features:
            handlers[b"SND2"] = self._receive_file_v2
            handlers[b"RCV2"] = self._send_file_v2
        if "ls_v2" in self.device.features:
            handlers[b"LIS2"] = lambda path: self._list(b"DNT2", path)
        while True:
            kind, size = struct.unpack("<4sI", self.rfile.read(8))
            path = self.rfile.read(size).decode()
            if kind == b"QUIT":
                return
            if kind not in handlers:
                self._fail(f"unknown command {kind!r}")
                return
            self.device.transfers.append(kind.decode())
            handlers[kind](path)

    def _receive_file_v2(self, path: str) -> None:
        """As the first version; mode and flags follow the path."""
        _, _, flags = struct.unpack("<4sII", self.rfile.read(12))
        assert flags == 0, "no feature offers compression"
        self._receive_file(path + ",")

    def _send_file_v2(self, path: str) -> None:
        """As the first version; flags follow the path."""
        _, flags = struct.unpack("<4sI", self.rfile.read(8))
        assert flags == 0, "no feature offers compression"
        self._send_file(path)

    def _fail(self, why: str) -> None:
        self.wfile.write(b"FAIL" + struct.pack("<I", len(why)) + why.encode())

    def _attributes(self, path: str) -> tuple[int, int] | None:
        """Mode and size; None: there is no such file."""
        if path in self.device.files:
            return FILE, len(self.device.files[path])
        inside = path.rstrip("/") + "/"
        return (DIRECTORY, 4096) if any(name.startswith(inside) for name in self.device.files) else None

    def _stat(self, kind: bytes, path: str) -> None:
        self.wfile.write(kind + self._fields(kind, path))

    def _fields(self, kind: bytes, path: str) -> bytes:
        found = self._attributes(path)
        mode, size = found or (0, 0)
        if kind in (b"STAT", b"DENT"):
            return struct.pack("<3I", mode, size, 0)
        missing = 0 if found else 2  # ENOENT
        return struct.pack("<I2Q4IQ3q", missing, 0, 0, mode, 1, 0, 0, size, 0, 0, 0)

    def _list(self, kind: bytes, folder: str) -> None:
        inside = folder.rstrip("/") + "/"
        names = {path[len(inside) :].split("/")[0] for path in self.device.files if path.startswith(inside)}
        for name in sorted(names):
            encoded = name.encode()
            self.wfile.write(kind + self._fields(kind, inside + name))
            self.wfile.write(struct.pack("<I", len(encoded)) + encoded)
        self.wfile.write(b"DONE" + bytes(len(self._fields(kind, "")) + 4))

    def _receive_file(self, path_and_mode: str) -> None:
        path = path_and_mode.rpartition(",")[0]
        content = bytearray()
        for part in self._parts():
            content += part
            if len(content) > self.device.room:
                # The real daemon takes what is still on its way before it fails.
                for _ in self._parts():
                    pass
                self._fail("write failed: No space left on device")
                return
            if len(content) > self.device.cut_push_after:
                self.device.unplug()
                raise Cut
        self.device.files[path] = bytes(content)
        self.wfile.write(b"OKAY" + struct.pack("<I", 0))

    def _parts(self) -> Iterator[bytes]:
        while True:
            kind, size = struct.unpack("<4sI", self.rfile.read(8))
            if kind == b"DONE":
                return
            yield self.rfile.read(size)

    def _send_file(self, path: str) -> None:
        if path not in self.device.files:
            self._fail("open failed: No such file or directory")
            return
        content = self.device.files[path][: self.device.short_pull]
        for at in range(0, len(content), CHUNK):
            part = content[at : at + CHUNK]
            self.wfile.write(b"DATA" + struct.pack("<I", len(part)) + part)
            if at + len(part) > self.device.cut_pull_after:
                self.device.unplug()
                raise Cut
        self.wfile.write(b"DONE" + struct.pack("<I", 0))


def _text(text: str) -> bytes:
    data = text.encode()
    return f"{len(data):04x}".encode() + data
