"""Two reports of the same work: is the second slower?"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import dataclass

from mobile_export import console
from mobile_export.errors import ExportError
from mobile_export.latency.reports import Report, spread

SLOWER, SPREADS = 1.05, 3.0
"""Slower is: by more than 5 %, and by more than three times the larger spread of the two."""

Times = dict[tuple[str, int, str], list[float]]
"""Contender, threads and what was timed -> nanoseconds in each round."""


@dataclass(frozen=True)
class Change:
    """One thing timed in both. Medians in nanoseconds."""

    contender: str
    threads: int
    what: str
    before: float
    now: float
    spread: float
    """The larger of the two, half of highest less lowest."""

    @property
    def slower(self) -> bool:
        """By more than 5 % and more than the spread explains."""
        return self.now > self.before * SLOWER and self.now - self.before > SPREADS * self.spread


def compare(before: Report, now: Report) -> list[Change]:
    """All that both timed. ExportError: they are not of the same work on the same device."""
    _refuse_others(before, now)
    old, new = _times(before), _times(now)
    changes = []
    for key in sorted(old.keys() & new.keys()):
        middle, most = statistics.median, max(spread(old[key]), spread(new[key]))
        changes.append(Change(*key, before=middle(old[key]), now=middle(new[key]), spread=most))
    if not changes:
        names = ", ".join(sorted({one.name for one in before.contenders}))
        raise ExportError("these reports have nothing timed in common", f"the baseline measured {names}")
    return changes


def render(changes: list[Change]) -> None:
    """Print what got slower, or that nothing did."""
    rows = [
        (one.contender, str(one.threads), one.what, *_milliseconds(one), f"x{one.now / one.before:.2f}")
        for one in changes
        if one.slower
    ]
    if rows:
        columns = ("", "threads", "slower than the baseline", "before", "now", "spread", "")
        console.table("", columns, rows)
    else:
        console.say(f"no slower than the baseline in {len(changes)} times")


def _milliseconds(change: Change) -> list[str]:
    return [f"{ns / 1e6:.1f} ms" for ns in (change.before, change.now, change.spread)]


def _refuse_others(before: Report, now: Report) -> None:
    for report, which in ((before, "the baseline"), (now, "this run")):
        if report.device.not_speed:
            raise ExportError(
                f"{which} has no speeds: {report.device.name} is {report.device.not_speed}",
                "compare runs on real hardware",
            )
    differ = [what for what, old, new in _identity(before, now) if old != new]
    if differ:
        raise ExportError(
            f"these reports are not of the same work: they differ in {', '.join(differ)}",
            "measure the baseline again, on this device with these options",
        )


def _identity(before: Report, now: Report) -> Iterator[tuple[str, object, object]]:
    """What must be equal: the device, the model, and how it was measured."""
    yield "kind of device", before.device.kind, now.device.kind
    for what, title in (("cpu", "processor"), ("cores", "cores"), ("memory_bytes", "memory")):
        yield title, getattr(before.machine, what), getattr(now.machine, what)
    models = [{one.model for one in report.contenders} for report in (before, now)]
    yield "model", models[0], models[1]
    for what in ("threads", "cpus", "regimes", "text", "settle_seconds"):
        yield what, getattr(before.protocol, what), getattr(now.protocol, what)


def _times(report: Report) -> Times:
    times: Times = {}

    def add(contender: str, threads: int, what: str, ns: float) -> None:
        times.setdefault((contender, threads, what), []).append(ns)

    for turn in report.turns:
        if turn.prompt:
            add(turn.contender, turn.threads, f"prefill {turn.prompt}", turn.prefill_ns)
        if turn.decode_ns:
            step = statistics.mean(turn.decode_ns)
            add(turn.contender, turn.threads, f"decode at {turn.prompt}, a token", step)
    for load in report.loads:
        add(load.contender, load.threads, f"{load.kind} load", load.ns)
    for first in report.first_tokens:
        add(first.contender, first.threads, "first token of a text", first.tokenize_ns + first.prefill_ns)
    named = {one.name for one in report.contenders if not report.not_speed(one)}
    return {key: found for key, found in times.items() if key[0] in named}
