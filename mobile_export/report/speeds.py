"""What a bench report comes to: medians of its samples. What is no speed has none."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import msgspec

from mobile_export.errors import ExportError
from mobile_export.latency import reports, tables
from mobile_export.latency.protocol import Contender, DeviceInfo, Machine
from mobile_export.latency.reports import Report

Unit = Literal["tokens/s", "s", "bytes"]


class _Table(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    pass


class Figure(_Table, frozen=True):
    """One thing measured of one contender: the median of its samples, the lowest and the highest."""

    contender: str
    threads: int
    what: str
    """E.g. `prefill 128`, `decode at 1024`, `cold load`, `peak memory`, `first token`."""
    unit: Unit
    median: float
    low: float
    high: float
    samples: int


class BenchFigures(_Table, frozen=True):
    """One run of the bench."""

    file: str
    started: str
    """UTC, ISO 8601."""
    device: DeviceInfo
    machine: Machine
    contenders: tuple[Contender, ...]
    """Those with `not_speed`, and all on a device that has it, are without figures."""
    figures: tuple[Figure, ...]
    notes: tuple[str, ...]
    """What the bench tells of the run: what was no speed and why, whether the machine was quiet."""


def figures(path: Path, model: str) -> BenchFigures:
    """The figures of what `bench --json` wrote. ExportError: it is not that, or not of `model` (a digest)."""
    report = reports.load(path)
    if {one.model for one in report.contenders} != {model}:
        raise ExportError(f"'{path.name}' measured another model", "bench these bundles")
    timed = [one.name for one in report.contenders if not report.not_speed(one)]
    return BenchFigures(
        file=path.name,
        started=report.started,
        device=report.device,
        machine=report.machine,
        contenders=report.contenders,
        figures=tuple(
            figure
            for threads in report.protocol.threads
            for name in timed
            for figure in _figures(report, name, threads)
        ),
        notes=tuple(tables.notes(report)),
    )


def _figures(report: Report, name: str, threads: int) -> Iterator[Figure]:
    for what, unit, samples in _samples(report, name, threads):
        if samples:
            yield Figure(
                contender=name,
                threads=threads,
                what=what,
                unit=unit,
                median=statistics.median(samples),
                low=min(samples),
                high=max(samples),
                samples=len(samples),
            )


def _samples(report: Report, name: str, threads: int) -> Iterator[tuple[str, Unit, Sequence[float]]]:
    for regime in report.protocol.regimes:
        prompt = regime.prompt
        if prompt:
            yield f"prefill {prompt}", "tokens/s", report.speeds(name, threads, "prefill", prompt)
        if regime.decode:
            yield f"decode at {prompt}", "tokens/s", report.speeds(name, threads, "decode", prompt)
    key = (name, threads)
    for kind in ("cold", "warm"):
        loads = [one for one in report.loads if (one.contender, one.threads, one.kind) == (*key, kind)]
        yield f"{kind} load", "s", [one.ns / 1e9 for one in loads]
    firsts = [one for one in report.first_tokens if (one.contender, one.threads) == key]
    yield "first token of a text", "s", [(one.tokenize_ns + one.prefill_ns) / 1e9 for one in firsts]
    memory = [one for one in report.memory if (one.contender, one.threads) == key]
    yield "peak memory", "bytes", [float(one.peak_bytes) for one in memory]
