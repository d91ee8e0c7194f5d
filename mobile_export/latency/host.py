"""Speed of a bundle on this host, for the end of an export: the bench, in short."""

from __future__ import annotations

import statistics
from pathlib import Path

import msgspec

from mobile_export.bundle import load
from mobile_export.latency.bench import bench
from mobile_export.latency.devices import Options
from mobile_export.latency.protocol import Protocol, Regime

PREFILL, DECODE = 128, 32


class Speed(msgspec.Struct, frozen=True):
    """One thread count. Medians of the rounds after a warm-up, tokens fixed, greedy, no sampling."""

    threads: int
    load_seconds: float
    """Open the artefact and make its first answer, the file in the page cache, Python's imports done."""
    prefill: float
    """Tokens per second, `PREFILL` tokens in one call from an empty cache."""
    decode: float
    """Tokens per second, `DECODE` calls of one token after the prefill."""
    peak_bytes: int
    """Largest resident memory of the process, Python's own and mapped file pages included."""


def measure(folder: Path, threads: tuple[int, ...] = (1, 2)) -> list[Speed]:
    """Measure a bundle in new processes. ExportError when one fails."""
    context = load(folder).manifest.io.context
    prompt = max(min(PREFILL, context - DECODE), 1)
    regime = Regime(prompt=prompt, decode=min(DECODE, context - prompt))
    plan = Protocol(threads=threads, regimes=(regime,), loads=1, long_seconds=0, long_regime=regime)
    report = bench([folder], plan=plan, options=Options(busy=True))
    (name,) = [one.name for one in report.contenders]
    speeds = []
    for count in threads:
        load_ns = [one.ns for one in report.loads if one.threads == count and one.kind == "warm"]
        prefill = statistics.median(report.speeds(name, count, "prefill", prompt))
        decode = statistics.median(report.speeds(name, count, "decode", prompt))
        speeds.append(
            Speed(
                threads=count,
                load_seconds=round(statistics.median(load_ns) / 1e9, 3),
                prefill=round(prefill, 1),
                decode=round(decode, 1),
                peak_bytes=next(one.peak_bytes for one in report.memory if one.threads == count),
            )
        )
    return speeds
