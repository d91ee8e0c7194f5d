"""What Android's services print: thermalservice, battery, meminfo, exit-info, am instrument, getprop.

None of it is an interface that Android promises, so that what is not understood reads as unknown.
Shapes: ThermalManagerService, BatteryService, ActivityThread and ApplicationExitInfo of AOSP.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from mobile_export.latency.phone_reports import Look
from mobile_export.latency.protocol import Battery

THERMAL = ("none", "light", "moderate", "severe", "critical", "emergency", "shutdown")
"""PowerManager.THERMAL_STATUS_*, by number."""
_CHARGING = ("2", "5")
"""BatteryManager: charging, full."""


@dataclass(frozen=True)
class Exit:
    """How a process of an app ended."""

    when: str
    pid: str
    reason: str
    """E.g. `APP CRASH(NATIVE)`."""
    description: str


def look(thermalservice: str, battery: str) -> Look:
    """Thermal status, the sensors' temperatures and the battery."""
    status = re.search(r"^Thermal Status: (\d+)", thermalservice, re.MULTILINE)
    number = int(status[1]) if status else len(THERMAL)
    return Look(
        thermal=THERMAL[number] if number < len(THERMAL) else None,
        celsius=_celsius(thermalservice),
        battery=_battery(battery),
    )


def _celsius(text: str) -> dict[str, float]:
    """By sensor, as the hardware says now; the cached ones are older."""
    _, _, now = text.partition("Current temperatures from HAL:")
    now = now.partition("Current cooling devices")[0]
    found = re.findall(r"Temperature\{mValue=(-?[\d.]+), mType=\d+, mName=([^,}]+)", now)
    return {name: float(value) for value, name in found if float(value) > -50}


def _battery(text: str) -> Battery | None:
    fields = dict(re.findall(r"^ *([a-z]+): (-?\d+)$", text, re.MULTILINE))
    if not {"level", "scale", "status"} <= fields.keys() or not int(fields["scale"]):
        return None
    tenths = fields.get("temperature")
    return Battery(
        percent=100 * int(fields["level"]) / int(fields["scale"]),
        charging=fields["status"] in _CHARGING,
        celsius=None if tenths is None else int(tenths) / 10,
    )


def total_pss_bytes(meminfo: str) -> int:
    """Proportional set size of the process; 0: not told."""
    found = re.search(r"TOTAL(?: PSS)?:\s+(\d+)", meminfo)
    return int(found[1]) * 1024 if found else 0


def last_exit(text: str) -> Exit | None:
    """The newest record: the first that is printed."""
    record = text.partition("ApplicationExitInfo #0:")[2].partition("ApplicationExitInfo #")[0]
    head = re.search(r"timestamp=(\S+ \S+) pid=(\d+)", record)
    reason = re.search(r"\breason=\d+ \((.*?)\) subreason=", record)
    said = re.search(r"description=(.*?) state=", record, re.DOTALL)
    if not head or not reason:
        return None
    description = " ".join(said[1].split()) if said else ""
    return Exit(head[1], head[2], reason[1], "" if description == "null" else description)


def properties(getprop: str) -> dict[str, str]:
    """`[name]: [value]` lines."""
    return dict(re.findall(r"^\[(.+?)\]: \[(.*)\]$", getprop, re.MULTILINE))


def instrumentation(line: str) -> tuple[str, str, str]:
    """A line of `am instrument -r` in its parts.

    `INSTRUMENTATION_RESULT: sha256=12` -> (`RESULT`, `sha256`, `12`); `INSTRUMENTATION_CODE: -1` ->
    (`CODE`, ``, `-1`); anything else -> three empty strings.
    """
    found = re.fullmatch(r"INSTRUMENTATION_(RESULT|STATUS): ([^=]+)=(.*)", line.rstrip())
    if found:
        return found[1], found[2], found[3]
    found = re.fullmatch(r"INSTRUMENTATION_(CODE|STATUS_CODE|FAILED): (.*)", line.rstrip())
    return (found[1], "", found[2]) if found else ("", "", "")
