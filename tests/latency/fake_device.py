"""Phones that adb does not know from real ones, but that say themselves that they are fake.

Each has files by path and a shell of the few commands that the bench uses. What their services print
has the shape of Android's own `dumpsys`.
"""

import hashlib
import shlex
from collections.abc import Callable
from dataclasses import dataclass, field

from fake_adb import EXIT, STDERR, STDOUT
from fake_app import Crash, FakeApp

from mobile_export.latency import contract

NEVER = 1 << 60
FEATURES = ("shell_v2", "cmd", "stat_v2", "ls_v2", "sendrecv_v2")
MEDIA = f"/sdcard/Android/media/{contract.APP}"

THERMAL = """IsStatusOverride: false
ThermalEventListeners:
\tcallbacks: 1
\tkilled: false
\tbroadcasts count: -1
ThermalStatusListeners:
\tcallbacks: 1
\tkilled: false
\tbroadcasts count: -1
Thermal Status: {status}
Cached temperatures:
\tTemperature{{mValue=99.0, mType=3, mName=SKIN, mStatus=0}}
\tTemperature{{mValue=98.0, mType=1, mName=GPU, mStatus=0}}
HAL Ready: true
HAL connection:
\tThermalHAL AIDL 1  connected: yes
Current temperatures from HAL:
\tTemperature{{mValue=41.5, mType=0, mName=CPU0, mStatus=0}}
\tTemperature{{mValue=33.25, mType=3, mName=SKIN, mStatus={status}}}
\tTemperature{{mValue=-99.9, mType=6, mName=POWER_AMPLIFIER, mStatus=0}}
Current cooling devices from HAL:
\tCoolingDevice{{mValue=0, mType=2, mName=TYPE_CPU}}
"""
BATTERY = """Current Battery Service state:
  AC powered: false
  USB powered: true
  Wireless powered: false
  status: 2
  health: 2
  present: true
  level: 80
  scale: 100
  voltage: 4250
  temperature: 305
  technology: Li-ion
"""
MEMINFO = """Applications Memory Usage (in Kilobytes):
Uptime: 1000 Realtime: 1000

** MEMINFO in pid 4242 [{app}] **
                   Pss  Private  Private  SwapPss      Rss     Heap     Heap     Heap
                 Total    Dirty    Clean    Dirty    Total     Size    Alloc     Free
                ------   ------   ------   ------   ------   ------   ------   ------
        TOTAL   716800   700000    16800        0   820000        0        0        0

 App Summary
                       Pss(KB)                        Rss(KB)
                        ------                         ------
           Java Heap:     9000                          9000
           TOTAL PSS:   716800            TOTAL RSS:   820000      TOTAL SWAP PSS:        0
"""
EXIT_INFO = """ACTIVITY MANAGER PROCESS EXIT INFO (dumpsys activity exit-info)
Last Timestamp of Persistence Into Persistent Storage: 2026-11-25 10:00:00.000
  package: {app}
    Historical Process Exit for uid=10234
{records}"""
RECORD = """        ApplicationExitInfo #{number}:
          timestamp=2026-11-25 10:15:0{at}.482 pid={pid} realUid=10234 packageUid=10234 user=0
          process={app} reason={reason} subreason=0 (UNKNOWN) status=11
          importance=100 pss=0.00 rss=612MB description={description} state=empty trace=null
"""
PROPERTIES = {
    "ro.product.manufacturer": "Nobody",
    "ro.product.model": "Fake",
    "ro.product.name": "mobile_export_fake",
    "ro.build.version.release": "16",
    "ro.build.version.sdk": "36",
    "ro.build.id": "FAKE.1",
    "ro.soc.model": "none",
    "ro.boot.qemu": "0",
}

Out = Callable[[int, bytes], None]


@dataclass
class FakeDevice:
    """A phone; its faults are its fields."""

    serial: str = "FAKE0001"
    state: str = "device"
    features: tuple[str, ...] = FEATURES
    app: FakeApp | None = field(default_factory=FakeApp)
    exit_reason: tuple[str, str] = ("5 (APP CRASH(NATIVE))", "crash")
    thermal_status: int = 0
    room: int = NEVER
    cut_push_after: int = NEVER
    cut_pull_after: int = NEVER
    short_pull: int | None = None
    rots: bool = False
    """What is pushed to it is not what it keeps."""
    properties: dict[str, str] = field(default_factory=lambda: dict(PROPERTIES))
    files: dict[str, bytes] = field(default_factory=dict)
    exits: list[str] = field(default_factory=list)
    commands: list[str] = field(default_factory=list)
    transfers: list[str] = field(default_factory=list)
    """Kinds of the file requests."""

    description = "usb:1-1 product:mobile_export_fake model:Fake device:fake"

    def unplug(self) -> None:
        """The cable is pulled."""
        self.state = "offline"

    def shell(self, command: str, out: Out) -> None:
        """Run one command: what it prints, then its exit code."""
        self.commands.append(command)
        words = shlex.split(command)
        names = {"am": self._am, "dumpsys": self._dumpsys, "getprop": self._getprop, "pm": self._pm}
        names |= {"sha256sum": self._sha256sum, "rm": self._rm}
        if words[0] not in names:
            out(STDERR, f"/system/bin/sh: {words[0]}: inaccessible or not found\n".encode())
            out(EXIT, bytes([127]))
            return
        out(EXIT, bytes([names[words[0]](words[1:], out)]))

    def _getprop(self, words: list[str], out: Out) -> int:
        lines = [f"[{name}]: [{value}]\n" for name, value in self.properties.items()]
        out(STDOUT, "".join(lines).encode())
        return 0

    def _pm(self, words: list[str], out: Out) -> int:
        if words != ["path", contract.APP] or self.app is None:
            return 1
        out(STDOUT, f"package:/data/app/~~x==/{contract.APP}-y==/base.apk\n".encode())
        return 0

    def _sha256sum(self, words: list[str], out: Out) -> int:
        code = 0
        for path in words:
            if path in self.files:
                content = self.files[path] + (b"!" if self.rots else b"")
                out(STDOUT, f"{hashlib.sha256(content).hexdigest()}  {path}\n".encode())
            else:
                out(STDERR, f"sha256sum: {path}: No such file or directory\n".encode())
                code = 1
        return code

    def _rm(self, words: list[str], out: Out) -> int:
        assert words[0] == "-rf"
        for folder in words[1:]:
            self.files = {
                path: content
                for path, content in self.files.items()
                if path != folder and not path.startswith(folder + "/")
            }
        return 0

    def _dumpsys(self, words: list[str], out: Out) -> int:
        records = "".join(
            record.replace("NUMBER", str(index)) for index, record in enumerate(reversed(self.exits))
        )
        services = {
            "thermalservice": THERMAL.format(status=self.thermal_status),
            "battery": BATTERY,
            f"meminfo {contract.APP}": MEMINFO.format(app=contract.APP),
            f"activity exit-info {contract.APP}": EXIT_INFO.format(app=contract.APP, records=records),
        }
        out(STDOUT, services[" ".join(words)].encode())
        return 0

    def _am(self, words: list[str], out: Out) -> int:
        if words == ["force-stop", contract.APP]:
            return 0
        assert words[:5] == ["instrument", "-w", "-r", "-e", "request"], words
        assert words[6:] == [contract.INSTRUMENTATION], words
        assert self.app is not None
        data = self.files[words[5]]
        run = words[5].split("/")[-2]
        path = f"{MEDIA}/mobile-export/{run}/report.json"

        def say(line: str) -> None:
            out(STDOUT, line.encode() + b"\n")

        def status(phase: str) -> None:
            say(f"INSTRUMENTATION_STATUS: phase={phase}")
            say("INSTRUMENTATION_STATUS_CODE: 1")

        status("started")
        try:
            self.app.run(data, self.files.get, lambda report: self.files.__setitem__(path, report))
        except Crash:
            self._exited(*self.exit_reason)
            say("INSTRUMENTATION_RESULT: shortMsg=Process crashed.")
            say("INSTRUMENTATION_CODE: 0")
            return 0
        if self.app.done[-1] == "memory":
            status("hold")
        report = self.files[path]
        say(f"INSTRUMENTATION_RESULT: bytes={len(report)}")
        say(f"INSTRUMENTATION_RESULT: sha256={hashlib.sha256(report).hexdigest()}")
        say("INSTRUMENTATION_CODE: -1")
        return 0

    def _exited(self, reason: str, description: str) -> None:
        at = len(self.exits)
        ids = {"number": "NUMBER", "at": at, "pid": 4242 + at, "app": contract.APP}
        self.exits.append(RECORD.format(**ids, reason=reason, description=description))
