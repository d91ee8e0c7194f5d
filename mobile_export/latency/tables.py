"""A bench report for people: speeds, ratios against the peer, memory bandwidth, and what was not quiet."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence

from mobile_export import console
from mobile_export.latency.protocol import Contender, Report, Speed

_BUSY = 0.15
"""Cores of other work above which the reader is told."""
_SPINNING = 0.02
"""Share of a core above which a waiting runtime counts as not idle."""


def render(report: Report) -> None:
    """Print one table for each thread count, then what the reader must know of the run."""
    machine, protocol = report.machine, report.protocol
    console.say(f"{machine.cpu}, {machine.cores} cores, {machine.system}; {report.started}")
    for threads in protocol.threads:
        rows = [_row(report, one, threads) for one in report.contenders]
        rows += [_ratios(report, one, threads) for one in report.contenders if not one.peer]
        columns = ["", *(title for title, _, _ in _speeds(report)), "load", "peak memory", "file", "KL"]
        console.table(f"\n{threads} thread{'s' * (threads > 1)}", columns, [row for row in rows if row])
    console.say(
        f"\ntokens a second: median of {protocol.rounds} interleaved rounds, ± half of highest less lowest; "
        "ratios: median over rounds of ours / the peer's faster one, same round"
    )
    for line in (*_bandwidth(report), *_warnings(report)):
        console.say(line)


def ratio(report: Report, ours: str, threads: int, what: Speed, prompt: int) -> float | None:
    """Median over rounds of ours / peer's, the peer's variant being the one with the higher median."""
    peers = [report.speeds(one.name, threads, what, prompt) for one in report.contenders if one.peer]
    if not peers:
        return None
    best = max(peers, key=statistics.median)
    pairs = zip(report.speeds(ours, threads, what, prompt), best, strict=True)
    return statistics.median(mine / theirs for mine, theirs in pairs)


def _speeds(report: Report) -> list[tuple[str, Speed, int]]:
    """Title, kind and prompt of each column of speeds."""
    columns: list[tuple[str, Speed, int]] = []
    for regime in report.protocol.regimes:
        columns.append((f"prefill {regime.prompt}", "prefill", regime.prompt))
        if regime.decode:
            columns.append((f"decode {regime.decode} at {regime.prompt}", "decode", regime.prompt))
    return columns


def _row(report: Report, contender: Contender, threads: int) -> list[str]:
    name = contender.name
    cells = []
    for _, what, prompt in _speeds(report):
        speeds = report.speeds(name, threads, what, prompt)
        middle = statistics.median(speeds)
        cells.append(f"{middle:.1f} ±{(max(speeds) - min(speeds)) / 2 / middle:.0%}")
    quality = [one.kl_mean for one in report.quality if one.contender == name]
    kl = f"{quality[0]:.4f}" if quality and quality[0] is not None else "-"
    return [
        name,
        *cells,
        f"{_load(report, name, threads):.2f} s",
        console.human_bytes(_peak(report, name, threads)),
        console.human_bytes(contender.file_bytes),
        kl,
    ]


def _ratios(report: Report, contender: Contender, threads: int) -> list[str]:
    """Ours / peer's: for speeds above 1 is better, else below 1, against the peer's lower figure."""
    peers = [one for one in report.contenders if one.peer]
    if not peers:
        return []
    name = contender.name
    speeds = [ratio(report, name, threads, what, prompt) for _, what, prompt in _speeds(report)]
    load = _load(report, name, threads) / min(_load(report, one.name, threads) for one in peers)
    peak = _peak(report, name, threads) / min(_peak(report, one.name, threads) for one in peers)
    size = contender.file_bytes / min(one.file_bytes for one in peers)
    numbers = [*speeds, load, peak, size]
    return [f"{name} / {peers[0].runtime}", *(f"x{number:.2f}" for number in numbers), ""]


def _load(report: Report, name: str, threads: int) -> float:
    """Seconds, median."""
    loads = [one.ns for one in report.loads if (one.contender, one.threads) == (name, threads)]
    return statistics.median(loads) / 1e9


def _peak(report: Report, name: str, threads: int) -> int:
    return next(one.peak_bytes for one in report.memory if (one.contender, one.threads) == (name, threads))


def _bandwidth(report: Report) -> Iterator[str]:
    """A decoded token reads nearly all of a tied model's artefact: its head is the embedding."""
    for probe in report.bandwidth:
        parts = []
        for one in report.contenders:
            shares = [
                one.file_bytes * statistics.median(speeds) / probe.per_second
                for _, what, prompt in _speeds(report)
                if what == "decode" and (speeds := report.speeds(one.name, probe.threads, what, prompt))
            ]
            parts += [f"{one.name} {share:.0%}" for share in shares]
        speed = f"{probe.per_second / 1e9:.1f} GB/s"
        yield (
            f"threads {probe.threads}: memory is read at {speed}; decode (artefact size x tokens a second) "
            f"reaches {', '.join(parts)}"
        )


def _warnings(report: Report) -> Iterator[str]:
    floors = {one.contender: one.floor_bytes for one in report.loads}
    resident = ", ".join(f"{name} {console.human_bytes(size)}" for name, size in floors.items())
    yield f"of peak memory, interpreter and libraries: {resident}"
    before = max((one.busy for one in report.rounds), default=0.0)
    others = [turn.others for turn in report.turns]
    if max([before, *others], default=0.0) > _BUSY:
        yield (
            f"not quiet: other work kept up to {before:.2f} cores busy before a round, and "
            f"{statistics.median(others):.2f} (median) to {max(others):.2f} during turns"
        )
    for name in spinning(report):
        yield f"{name}: its threads do not sleep while others work; the others' figures suffer"


def spinning(report: Report) -> Sequence[str]:
    """Contenders whose waiting process took more than 2 % of a core."""
    found = []
    for one in report.contenders:
        turns = [turn for turn in report.turns if turn.contender == one.name]
        waited, took = sum(turn.idle_ns for turn in turns), sum(turn.idle_cpu_ns for turn in turns)
        if waited and took / waited > _SPINNING:
            found.append(one.name)
    return found
