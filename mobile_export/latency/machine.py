"""The machine that this runs on: what it is, its clocks and heat, other work, its memory's speed."""

from __future__ import annotations

import os
import platform
import threading
import time
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import psutil  # type: ignore[import-untyped]

from mobile_export.latency.protocol import Bandwidth, Battery, Machine, State

PROBE_BYTES = 1 << 30
"""Far above any cache of a phone, a laptop or one socket of a server; less where memory is short."""
_PROBES = 7
_LOOK_SECONDS = 0.5
_TICK_SECONDS = 0.01
_PACKAGES = ("executorch", "onnxruntime", "coremltools", "torch", "numpy", "tokenizers")
_CPUS = Path("/sys/devices/system/cpu")
_FIRMWARE = Path("/sys/devices/platform/soc/soc:firmware/get_throttled")
"""Raspberry Pi: bits 0 to 3 are under-voltage, capped, throttled, and the soft temperature limit, now."""


def describe() -> Machine:
    """This machine, with the versions of Python and of what runtimes are here."""
    import mobile_export

    versions = {"python": platform.python_version(), "mobile-export": mobile_export.__version__}
    for name in _PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return Machine(
        cpu=_cpu(),
        cores=os.cpu_count() or 1,
        memory_bytes=psutil.virtual_memory().total,
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        versions=versions,
    )


def state(threads: int, number: int, when: Literal["before", "after"]) -> State:
    """What this machine is doing; takes half a second."""
    begin, clock = busy_seconds(), time.perf_counter()
    time.sleep(_LOOK_SECONDS)
    busy = cores(busy_seconds() - begin, time.perf_counter() - clock)
    return State(
        threads=threads,
        round=number,
        when=when,
        governor=_governor(),
        mhz=tuple(round(one.current, 1) for one in _quietly("cpu_freq", percpu=True) or ()),
        celsius=_celsius(),
        thermal=_thermal(),
        battery=_battery(),
        load_average=round(os.getloadavg()[0], 2),
        busy=busy,
    )


def busy_seconds() -> float:
    """Processor seconds of all cores since the start; what a hypervisor gave to others counts too."""
    # Linux counts a guest's time in `user` already.
    idle = ("idle", "iowait", "guest", "guest_nice")
    times = psutil.cpu_times()._asdict()
    return float(sum(value for name, value in times.items() if name not in idle))


def cores(spent: float, elapsed: float, own: float = 0.0) -> float:
    """Cores that others kept busy, less `own` seconds and a tick of the kernel's clock on each core."""
    ticks = _TICK_SECONDS * (os.cpu_count() or 1)
    return round(max((spent - own - ticks) / elapsed, 0.0), 2)


def bandwidth(threads: int) -> Bandwidth:
    """Read `PROBE_BYTES` (at most a quarter of what is free) in order, each thread a part of its own."""
    import numpy as np

    size = min(PROBE_BYTES, psutil.virtual_memory().available // 4) // 8 * 8
    parts = np.array_split(np.ones(size // 8, np.int64), threads)
    samples = []
    for _ in range(_PROBES):
        readers = [threading.Thread(target=part.sum) for part in parts]
        begin = time.perf_counter_ns()
        for reader in readers:
            reader.start()
        for reader in readers:
            reader.join()
        samples.append(time.perf_counter_ns() - begin)
    return Bandwidth(threads=threads, bytes=size, ns=tuple(samples))


def _quietly(name: str, **arguments: Any) -> Any:
    """A sensor of psutil's; None where this system has none, or does not let it be read."""
    try:
        return getattr(psutil, name)(**arguments)
    except (AttributeError, OSError, RuntimeError, NotImplementedError):
        return None


def _cpu() -> str:
    """The kernel's name of the processor; an ARM kernel tells a board's model, or nothing."""
    names: dict[str, str] = {}
    for line in _read(Path("/proc/cpuinfo")).splitlines():
        key, _, value = line.partition(":")
        names.setdefault(key.strip(), value.strip())
    board = _read(Path("/proc/device-tree/model")).strip("\0")
    return names.get("model name") or names.get("Model") or board or platform.processor() or "unknown"


def _governor() -> str:
    """The governor of each core, once where it is the same; `unknown` as in most virtual machines."""
    found = sorted({_read(path).strip() for path in _CPUS.glob("cpu[0-9]*/cpufreq/scaling_governor")})
    return ", ".join(found) or "unknown"


def _celsius() -> dict[str, float]:
    found = {}
    for chip, sensors in (_quietly("sensors_temperatures") or {}).items():
        for index, sensor in enumerate(sensors):
            found[f"{chip} {sensor.label or index}"] = round(float(sensor.current), 1)
    return found


def _thermal() -> str:
    """What holds the clocks down now: a ceiling below the hardware's own, or a Raspberry Pi's firmware."""
    pairs = [
        (_read(path), _read(path.with_name("cpuinfo_max_freq")))
        for path in _CPUS.glob("cpu[0-9]*/cpufreq/scaling_max_freq")
    ]
    capped = [now for now, most in pairs if now and most and int(now) < int(most)]
    firmware = int(_read(_FIRMWARE) or "0", 16) & 0b1111
    held = [f"{len(capped)} cores capped"] if capped else []
    held += [f"firmware throttles ({firmware:#x})"] if firmware else []
    known = pairs or _FIRMWARE.exists()
    return ", ".join(held) or ("none" if known else "unknown")


def _battery() -> Battery | None:
    found = _quietly("sensors_battery")
    return found and Battery(percent=round(found.percent, 1), charging=bool(found.power_plugged))


def _read(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except OSError:
        return ""
