"""`mobile-export bench` and `devices`: what the options mean, and what is printed and written."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mobile_export import console
from mobile_export.errors import ExportError
from mobile_export.latency import compare, drafting, exporters, reports, tables
from mobile_export.latency.bench import bench as measure
from mobile_export.latency.bench import parse_cpus, parse_threads
from mobile_export.latency.devices import FORMS, Found, Options, present
from mobile_export.latency.protocol import Protocol


def bench(
    bundles: Sequence[Path],
    *,
    device: str,
    device_python: str,
    vs: str | None,
    peer_python: Path | None,
    model: str | None,
    rounds: int,
    threads: str,
    cpus: str,
    long_seconds: float,
    quick: bool,
    busy: bool,
    out: Path | None,
    llama_bench: Path | None,
    pytorch: Path | None,
    baseline: Path | None,
    draft: Path | None,
    ahead: int,
) -> bool:
    """Measure, print and write; False when something is slower than the baseline."""
    if draft:
        if len(bundles) != 1 or vs or baseline or device != "host":
            raise ExportError(
                "--draft measures one bundle on this host", "leave out --vs, --device and --baseline"
            )
        found = drafting.bench(
            bundles[0], draft, ahead=ahead, rounds=rounds, threads=max(parse_threads(threads)), busy=busy
        )
        drafting.render(found)
        if out:
            drafting.save(found, out)
        return True
    before = reports.load(baseline) if baseline else None
    plan = Protocol(
        rounds=rounds, threads=parse_threads(threads), cpus=parse_cpus(cpus), long_seconds=long_seconds
    )
    report = measure(
        bundles,
        device=device,
        plan=plan,
        vs=vs,
        peer_python=peer_python,
        model=model,
        quick=quick,
        options=Options(python=device_python, busy=busy),
    )
    tables.render(report)
    if out:
        reports.save(report, out)
    for path, records in ((llama_bench, exporters.llama_bench), (pytorch, exporters.pytorch_v3)):
        if path:
            exporters.save(records(report), path)
    if not before:
        return True
    changes = compare.compare(before, report)
    compare.render(changes)
    return not any(change.slower for change in changes)


def devices(found: Sequence[Found]) -> None:
    """Print what is there, and how the rest is named."""
    rows = [(one.name, "ready" if one.ready else "not ready", one.what) for one in found]
    console.table("", ("device", "", "what it is"), rows)
    for one in found:
        if one.hint:
            console.say(f"{one.name}: {one.hint}")
    console.say(f"--device takes {', '.join(FORMS[kind][0] for kind in present())}")
