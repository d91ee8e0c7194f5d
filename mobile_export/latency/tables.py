"""A bench report for people: speeds, latencies, ratios against the peer, bandwidth, and what was not quiet.

What is no speed never gets a number here.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence

from mobile_export import console
from mobile_export.latency.protocol import Contender
from mobile_export.latency.reports import Report, Speed, percentile, spread

_BUSY = 0.15
"""Cores of other work above which the reader is told."""
_SPINNING = 0.02
"""Share of a core above which a waiting runtime counts as not idle."""
_COLD = 0.05
"""Share of an artefact in the page cache above which a cold load was not one."""
_THROTTLED = 1.05
"""Last over first decile of a long run above which the reader is told that the device slows down."""


def render(report: Report) -> None:
    """Print the tables of each thread count, then what the reader must know of the run."""
    machine, protocol = report.machine, report.protocol
    console.say(
        f"{report.device.name}: {machine.cpu}, {machine.cores} cores, {machine.system}; {report.started}"
    )
    timed = [one for one in report.contenders if not report.not_speed(one)]
    for threads in protocol.threads if timed else ():
        rows = [_row(report, one, threads) for one in timed]
        rows += [_ratios(report, one, threads) for one in timed if not one.peer]
        columns = ["", *(title for title, _, _ in _speeds(report)), "file", "KL"]
        console.table(f"\n{threads} thread{'s' * (threads > 1)}", columns, [row for row in rows if row])
        columns = ["", "load cold", "load warm", "peak memory", "first token", "of a text"]
        columns += [f"token p50/p90/p99 at {depth}" for depth in _depths(report)]
        console.table("", columns, [_latencies(report, one, threads) for one in timed])
    if timed:
        console.say(
            f"\ntokens a second: median of {protocol.rounds} interleaved rounds, ± half of highest less "
            "lowest; ratios: median over rounds of ours / the peer's faster one, same round"
        )
    for line in notes(report):
        console.say(line)


def notes(report: Report) -> Iterator[str]:
    """What the reader must know beside the tables, a line each."""
    yield from _not_speeds(report)
    if all(report.not_speed(one) for one in report.contenders):
        return
    yield from _bandwidth(report)
    yield from _warnings(report)


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
        if regime.prompt:
            columns.append((f"prefill {regime.prompt}", "prefill", regime.prompt))
        if regime.decode:
            columns.append((f"decode {regime.decode} at {regime.prompt}", "decode", regime.prompt))
    return columns


def _depths(report: Report) -> list[int]:
    return [regime.prompt for regime in report.protocol.regimes if regime.decode]


def _row(report: Report, contender: Contender, threads: int) -> list[str]:
    name = contender.name
    cells = []
    for _, what, prompt in _speeds(report):
        speeds = report.speeds(name, threads, what, prompt)
        middle = statistics.median(speeds)
        cells.append(f"{middle:.1f} ±{spread(speeds) / middle:.0%}")
    quality = [one.kl_mean for one in report.quality if one.contender == name]
    kl = f"{quality[0]:.4f}" if quality and quality[0] is not None else "-"
    return [name, *cells, console.human_bytes(contender.file_bytes), kl]


def _latencies(report: Report, contender: Contender, threads: int) -> list[str]:
    """Seconds, bytes, milliseconds."""
    name = contender.name
    loads = {
        kind: [
            one.ns for one in report.loads if (one.contender, one.threads, one.kind) == (name, threads, kind)
        ]
        for kind in ("cold", "warm")
    }
    firsts = [one for one in report.first_tokens if (one.contender, one.threads) == (name, threads)]
    cells = [f"{statistics.median(found) / 1e9:.2f} s" if found else "-" for found in loads.values()]
    peaks = [one.peak_bytes for one in report.memory if (one.contender, one.threads) == (name, threads)]
    cells.append(console.human_bytes(peaks[0]) if peaks else "-")
    for with_text in (False, True):
        times = [one.prefill_ns + one.tokenize_ns * with_text for one in firsts]
        cells.append(f"{statistics.median(times) / 1e6:.1f} ms" if times else "-")
    for depth in _depths(report):
        steps = [step for turn in report.of(name, threads, depth) for step in turn.decode_ns]
        cells.append("/".join(f"{percentile(steps, at) / 1e6:.1f}" for at in (50, 90, 99)) + " ms")
    return [name, *cells]


def _ratios(report: Report, contender: Contender, threads: int) -> list[str]:
    """Ours / peer's speeds, above 1 is better; of the file's size, below 1."""
    peers = [one for one in report.contenders if one.peer]
    if not peers:
        return []
    name = contender.name
    speeds = [ratio(report, name, threads, what, prompt) for _, what, prompt in _speeds(report)]
    size = contender.file_bytes / min(one.file_bytes for one in peers)
    return [f"{name} / {peers[0].runtime}", *(f"x{number:.2f}" for number in (*speeds, size)), ""]


def _not_speeds(report: Report) -> Iterator[str]:
    """What was checked on that device, and why it was not timed."""
    for one in report.contenders:
        if reason := report.not_speed(one):
            said = [check for check in report.checks if check.contender == one.name]
            tokens = f"; source's tokens {said[0].matched}, at export {said[0].expected}" if said else ""
            yield f"{one.name} on {report.device.name}: not a speed ({reason}){tokens}"


def _bandwidth(report: Report) -> Iterator[str]:
    """A decoded token reads nearly all of a tied model's artefact: its head is the embedding."""
    for probe in report.bandwidth:
        parts = []
        for one in report.contenders:
            if report.not_speed(one):
                continue
            shares = [
                f"{one.file_bytes * statistics.median(speeds) / probe.per_second:.0%} at {prompt}"
                for _, what, prompt in _speeds(report)
                if what == "decode" and (speeds := report.speeds(one.name, probe.threads, what, prompt))
            ]
            if shares:
                parts.append(f"{one.name} {', '.join(shares)}")
        speed = f"{probe.per_second / 1e9:.1f} GB/s"
        yield (
            f"threads {probe.threads}: memory is read at {speed}; decode (artefact size x tokens a second) "
            f"reaches {'; '.join(parts)}"
        )


def _warnings(report: Report) -> Iterator[str]:
    floors = {one.contender: one.floor_bytes for one in report.memory}
    if floors:
        resident = ", ".join(f"{name} {console.human_bytes(size)}" for name, size in floors.items())
        yield f"of peak memory, interpreter and libraries: {resident}"
    if firsts := report.first_tokens:
        yield f"first token: of {firsts[0].tokens} tokens; of a text: with making them"
    for run in report.long_runs:
        slower = throttling(run.decode_ns)
        length = sum(map(sum, run.decode_ns)) / 1e9
        slows = ": it slows down" if slower > _THROTTLED else ""
        deciles = f"last / first decile of {length:.0f} s of decoding"
        yield f"{run.contender}: {deciles}: x{slower:.2f} the time{slows}"
    yield from _not_quiet(report)
    for name in spinning(report):
        yield f"{name}: its threads do not sleep while others work; the others' figures suffer"


def _not_quiet(report: Report) -> Iterator[str]:
    """Other work, held clocks, and loads that were not cold."""
    before = max((one.busy or 0.0 for one in report.states if one.when == "before"), default=0.0)
    others = [turn.others for turn in report.turns if turn.others is not None]
    if max([before, *others], default=0.0) > _BUSY:
        during = (
            f", and {statistics.median(others):.2f} (median) to {max(others):.2f} during turns"
            if others
            else ""
        )
        yield f"not quiet: other work kept up to {before:.2f} cores busy before a round{during}"
    held = sorted({one.thermal for one in report.states} - {"none", "nominal", "unknown"})
    if held:
        yield f"not cool: the system says {', '.join(held)}"
    warm = [one.cached for one in report.loads if one.kind == "cold" and one.cached and one.cached > _COLD]
    if warm:
        yield f"not cold: up to {max(warm):.0%} of the artefact was in the page cache at a cold load"


def throttling(decode_ns: Sequence[Sequence[int]]) -> float:
    """Median token time of the last tenth of a long run's repetitions over that of the first tenth."""
    share = max(len(decode_ns) // 10, 1)
    first, last = decode_ns[:share], decode_ns[-share:]
    middle = [statistics.median([step for turn in part for step in turn]) for part in (last, first)]
    return middle[0] / middle[1]


def spinning(report: Report) -> Sequence[str]:
    """Contenders whose waiting process took more than 2 % of a core; one that is alone disturbs nobody."""
    if len(report.contenders) == 1:
        return []
    found = []
    for one in report.contenders:
        turns = [turn for turn in report.turns if turn.contender == one.name]
        waited = sum(turn.idle_ns or 0 for turn in turns)
        if waited and sum(turn.idle_cpu_ns or 0 for turn in turns) / waited > _SPINNING:
            found.append(one.name)
    return found
