"""The machine that measures: what it is, how busy it is, how fast it reads memory."""

from __future__ import annotations

import os
import platform
import threading
import time
from pathlib import Path

from mobile_export.latency.protocol import Bandwidth, Machine
from mobile_export.manifest import tool_versions

PROBE_BYTES = 1 << 30
"""Far above any cache of a phone, a laptop or one socket of a server."""
_PROBES = 7
_TICK_SECONDS = 0.01


def describe(*packages: str) -> Machine:
    """This machine, with the versions of Python, ours and `packages`."""
    import psutil  # type: ignore[import-untyped]

    return Machine(
        cpu=_cpu(),
        cores=os.cpu_count() or 1,
        memory_bytes=psutil.virtual_memory().total,
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        governor=_governor(),
        versions={"python": platform.python_version(), **tool_versions(*packages)},
    )


def busy_cores(seconds: float) -> float:
    """Cores kept busy by all processes over the next `seconds`."""
    clock = Busy()
    time.sleep(seconds)
    return clock.cores()


class Busy:
    """Cores kept busy since it was made; time that a hypervisor gave to others counts too."""

    def __init__(self) -> None:
        self._busy, self._begin = _busy_seconds(), time.perf_counter()

    def cores(self, own_seconds: float = 0.0) -> float:
        """Less `own_seconds` of processor time, and less a tick of the kernel's clock on each core."""
        ticks = _TICK_SECONDS * (os.cpu_count() or 1)
        spent = _busy_seconds() - self._busy - own_seconds - ticks
        return round(max(spent / (time.perf_counter() - self._begin), 0.0), 2)


def bandwidth(threads: int) -> Bandwidth:
    """Read `PROBE_BYTES` in order, each thread a part of its own."""
    import numpy as np

    parts = np.array_split(np.ones(PROBE_BYTES // 8, np.int64), threads)
    samples = []
    for _ in range(_PROBES):
        readers = [threading.Thread(target=part.sum) for part in parts]
        begin = time.perf_counter_ns()
        for reader in readers:
            reader.start()
        for reader in readers:
            reader.join()
        samples.append(time.perf_counter_ns() - begin)
    return Bandwidth(threads=threads, bytes=PROBE_BYTES, ns=tuple(samples))


def _busy_seconds() -> float:
    import psutil

    times = psutil.cpu_times()
    # Linux counts a guest's time in `user` already.
    idle = ("idle", "iowait", "guest", "guest_nice")
    return float(sum(value for name, value in times._asdict().items() if name not in idle))


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    for line in lines:
        key, _, value = line.partition(":")
        if key.strip() in ("model name", "Model"):
            return value.strip()
    return platform.machine()


def _governor() -> str:
    try:
        return Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor").read_text("utf-8").strip()
    except OSError:
        return "unknown"
