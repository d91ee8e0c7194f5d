"""Speed of a bundle on this host, in a fresh process: load, prefill, decode, peak memory."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from mobile_export.errors import ExportError
from mobile_export.targets import SOLO_BLAS, target

PREFILL, DECODE, ROUNDS = 128, 32, 5


class Speed(msgspec.Struct, frozen=True):
    """One thread count. Medians of `ROUNDS` rounds after a warm-up, tokens fixed, greedy, no sampling."""

    threads: int
    load_seconds: float
    """Open the artefact and make its first answer, the file in the page cache, Python's imports done."""
    prefill: float
    """Tokens per second, `PREFILL` tokens in one call from an empty cache."""
    decode: float
    """Tokens per second, `DECODE` calls of one token after the prefill."""
    peak_bytes: int
    """Largest resident memory of the process, Python's own and mapped file pages included."""


def measure(folder: Path, threads: int) -> Speed:
    """Measure a bundle in a new process. ExportError when that process fails."""
    command = [sys.executable, "-m", "mobile_export.latency.host", str(folder), str(threads)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **SOLO_BLAS})
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise ExportError(f"the speed run failed: {reason}", "run `mobile-export inspect` on the bundle")
    return msgspec.json.decode(done.stdout.splitlines()[-1], type=Speed)


def _measure_here(folder: Path, threads: int) -> Speed:
    from mobile_export.bundle import load

    bundle = load(folder)
    opened = target(bundle.manifest.target)
    opened.open(bundle.path("program"), threads=threads)  # imports
    begin = time.perf_counter()
    runner = opened.open(bundle.path("program"), threads=threads)
    runner.last_logits([7], 0)
    loaded = time.perf_counter() - begin
    prompt = [7 + index % 251 for index in range(max(min(PREFILL, runner.context - DECODE), 1))]
    steps = min(DECODE, runner.context - len(prompt))

    def prefill() -> None:
        runner.last_logits(prompt, 0)

    def decode() -> None:
        for step in range(steps):
            runner.last_logits([11 + step], len(prompt) + step)

    first, rest = zip(*[(_timed(prefill), _timed(decode)) for _ in range(ROUNDS + 1)], strict=True)
    return Speed(
        threads=threads,
        load_seconds=round(loaded, 3),
        prefill=round(len(prompt) / statistics.median(first[1:]), 1),
        decode=round(steps / statistics.median(rest[1:]), 1),
        peak_bytes=_peak_bytes(),
    )


def _peak_bytes() -> int:
    """Since this program started: Linux's ru_maxrss would remember the larger process it was forked from."""
    import resource

    status = Path("/proc/self/status")
    if status.exists():
        return int(status.read_text().split("VmHWM:")[1].split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _timed(work: Callable[[], None]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


if __name__ == "__main__":
    from mobile_export import quiet

    quiet.python()
    print(msgspec.json.encode(_measure_here(Path(sys.argv[1]), int(sys.argv[2]))).decode())
