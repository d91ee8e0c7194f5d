"""The report as one HTML file: no script, nothing to load."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from mobile_export import blame
from mobile_export.blame import BlameReport, Tap
from mobile_export.console import human_bytes
from mobile_export.parity import StageResult
from mobile_export.report.data import BundleData, BundleParity, Report
from mobile_export.report.figures import Bar, Series, bars, lines, treemap
from mobile_export.report.speeds import BenchFigures, Figure

_TEMPLATE = "report.html.jinja"
_FP16 = 65504.0
_CHARTS = {
    "prefill": "Prefill, tokens a second: more is better",
    "decode": "Decode, tokens a second: more is better",
    "load": "Load: less is better",
    "first": "First token of a text: less is better",
    "peak": "Peak memory: less is better",
}
"""By a word of what was measured; in this order."""
_EXACT = 1e-6
"""Mean KL below which a stage is called exact and not drawn by position."""
_FLOOR = 1e-8
"""Mean KL at which a bar begins."""


class Proof(NamedTuple):
    """How near an artefact is to the source."""

    stage: str
    figures: Any
    """Metrics, or what a manifest keeps of them."""


class Chart(NamedTuple):
    """A figure and its names."""

    title: str
    svg: Any
    legend: list[str]


def render(report: Report) -> str:
    """The page; the same report gives the same text."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"bytes": human_bytes, "short": short, "json": _json}
    return environment.get_template(_TEMPLATE).render(
        report=report,
        proofs={one.name: proofs(report, one) for one in report.bundles},
        treemaps={one.name: treemap(one.parts) for one in report.bundles},
        groups={one.name: _groups(one) for one in report.bundles},
        parity=[(_where(one), one.report, _parity_bars(one.report.stages)) for one in report.parity],
        by_position=[(_where(one), _by_position(one.report.stages)) for one in report.parity],
        errors=[_errors(one.report) for one in report.blames],
        verdicts=[blame.verdict(one.report) for one in report.blames],
        worst=[blame.table(one.report) for one in report.blames],
        fp16={one.name: _fp16(one) for one in report.bundles if one.fp16},
        speeds=[list(_speeds(bench)) for bench in report.benches],
    )


def proofs(report: Report, one: BundleData) -> list[Proof]:
    """Against the source: what parity measured, else the export's own check on the short prompts."""
    measured = [
        Proof(f"{line.stage} on {found.report.device}" if found.report.device else line.stage, line.metrics)
        for found in report.parity
        if found.bundle == one.name
        for line in found.report.stages
        if line.against == "golden" and line.stage.startswith("artifact")
    ]
    kept = [Proof(name.removeprefix("source -> "), of) for name, of in sorted(one.manifest.quality.items())]
    return measured or kept


def short(value: Any) -> str:
    """Three significant digits; a dash for what could not be measured."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "–" if value is None else str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.3g}"


def _json(value: Any) -> str:
    return msgspec.json.format(msgspec.json.encode(value, order="sorted"), indent=1).decode()


def _groups(one: BundleData) -> list[tuple[str, int, float]]:
    """Name, bytes and share of each group."""
    sizes: dict[str, int] = {}
    for part in one.parts:
        sizes[part.group] = sizes.get(part.group, 0) + part.bytes
    return [(group, size, size / one.artifact_bytes) for group, size in sizes.items()]


def _where(one: BundleParity) -> str:
    """The bundle, and the device it ran on where that was another than the one that wrote the report."""
    return f"{one.bundle} on {one.report.device}" if one.report.device else one.bundle


def _parity_bars(stages: Sequence[StageResult]) -> Any:
    return bars(
        [
            Bar(
                label=f"{line.against} → {line.stage}",
                value=line.metrics.kl_mean or 0.0,
                text=short(line.metrics.kl_mean),
                kind="ours" if line.passed else "failed",
                limit=line.threshold.kl_mean if line.threshold else None,
            )
            for line in stages
        ],
        floor=_FLOOR,
    )


def _by_position(stages: Sequence[StageResult]) -> Chart | None:
    """None where every stage is exact, or the report is of a version without positions."""
    lossy = [line for line in stages if line.by_position and (line.metrics.kl_mean or 0.0) > _EXACT]
    if not lossy:
        return None
    ticks = [str(one.first) for one in lossy[0].by_position]
    names = [f"{line.against} → {line.stage}" for line in lossy]
    values = [[one.kl_mean for one in line.by_position] for line in lossy]
    drawn = lines([Series(*pair) for pair in zip(names, values, strict=True)], ticks)
    return Chart("Mean KL by position", drawn, names)


def _errors(report: BlameReport) -> Chart:
    """Errors layer by layer; what is before, after or between the layers stands under its name."""
    groups = [(layer, list(taps)) for layer, taps in groupby(report.taps, key=lambda tap: tap.layer)]
    worst = [max(taps, key=_excess) for _, taps in groups]
    series = [
        Series("all up to here", [taps[-1].total for _, taps in groups]),
        Series("the worst op's own", [tap.error for tap in worst]),
        Series("expected of that op", [tap.expected for tap in worst]),
    ]
    ticks = [str(layer) if layer is not None else taps[0].kind[:5] for layer, taps in groups]
    return Chart("Relative error", lines(series, ticks), [one.name for one in series])


def _excess(tap: Tap) -> float:
    return math.inf if tap.error is None else tap.error / tap.expected


def _fp16(one: BundleData) -> Chart:
    inside = [found for found in one.fp16 if found.layer is not None]
    values = [found.largest for found in inside]
    drawn = lines([Series("largest", values)], [str(found.layer) for found in inside], limit=_FP16)
    return Chart("Largest value by layer", drawn, ["largest |value| of any op", "end of fp16's range, 65504"])


def _speeds(bench: BenchFigures) -> Iterator[Chart]:
    peers = {one.name for one in bench.contenders if one.peer}
    order = list(dict.fromkeys(one.what for one in bench.figures))
    for word, title in _CHARTS.items():
        found = [one for one in bench.figures if word in one.what.split()]
        if found:
            found.sort(key=lambda one: (order.index(one.what), one.threads))  # contenders side by side
            yield Chart(title, bars([_speed(one, one.contender in peers) for one in found]), [])


def _speed(one: Figure, peer: bool) -> Bar:
    threads = f"{one.threads} thread{'s' * (one.threads > 1)}"
    text = human_bytes(round(one.median)) if one.unit == "bytes" else f"{short(one.median)} {one.unit}"
    return Bar(
        label=f"{one.what}, {threads}: {one.contender}",
        value=one.median,
        text=text,
        kind="peer" if peer else "ours",
        low=one.low,
        high=one.high,
    )
