"""The command `evaluate`."""

from __future__ import annotations

from pathlib import Path

import msgspec

from mobile_export import baseline as baselines
from mobile_export import console
from mobile_export.bundle import load, verify
from mobile_export.files import disk_errors, write_file
from mobile_export.targets import target
from mobile_export.tasks.evaluate import Work, evaluate
from mobile_export.tasks.reports import TaskReport, changes, table


def run(
    bundles: tuple[Path, ...],
    *,
    model: str | None = None,
    source: bool = True,
    code: int | None = None,
    out: Path | None = None,
    baseline: Path | None = None,
) -> bool:
    """Evaluate, print, write `out`; whether every limit was kept and nothing is worse than `baseline`."""
    before = baselines.read(baseline, TaskReport) if baseline else None
    opened = [load(folder) for folder in bundles]
    for bundle in opened:
        verify(bundle)
    report = evaluate(opened, model=model, source=source, before=before, work=Work(code=code))
    if out:
        with disk_errors(out.name):
            write_file(out, msgspec.json.format(msgspec.json.encode(report), indent=1) + b"\n")
    console.table(*table(report))
    for result in (
        f"{one.name}: '{result.name}' {result.verdict}"
        for one in report.contenders
        for result in one.code
        if result.verdict != "passed"
    ):
        console.say(result)
    for verdict in report.verdicts:
        if not verdict.passed:
            console.say(f"{verdict.contender}: {verdict.what} {verdict.measured}, limit {verdict.limit}")
    for claim in sorted({getattr(target(bundle.manifest.target), "CLAIM", "") for bundle in opened} - {""}):
        console.say(claim)
    if report.source is None:
        console.say("the source was not run: nothing was held to a limit against it")
    kept = baselines.render(changes(before, report)) if before else True
    return report.passed and kept
