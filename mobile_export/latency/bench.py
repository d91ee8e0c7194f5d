"""The bench: artefacts in their runtimes on this machine, in one run, turn by turn.

Every contender has a process of its own for each thread count, kept through all rounds: fresh
ones would spend most of the time importing, and start cold. While one works the others wait in a
read; each turn records what processor time a process took while it waited, so that a runtime
whose idle threads spin shows in the report.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from mobile_export import bundle as bundles
from mobile_export import console
from mobile_export.errors import ExportError
from mobile_export.latency import machine, peer
from mobile_export.latency.protocol import (
    Contender,
    Load,
    Memory,
    Protocol,
    Quality,
    Regime,
    Report,
    Round,
    Turn,
)
from mobile_export.latency.workers import Launch, RemoteRunner, Worker
from mobile_export.short_golden import short_golden
from mobile_export.targets import SOLO_BLAS

if TYPE_CHECKING:
    from mobile_export.bundle import Bundle
    from mobile_export.golden import Golden
    from mobile_export.types import Checkpoint

REGIMES = (Regime(prompt=128, decode=128), Regime(prompt=512))
LOADS = 3
SETTLE_SECONDS = 0.2
_LOOK_SECONDS = 0.5
_BUSY = 0.5
"""Cores of other work that a bench does not start beside."""
_BESIDE = {"tokenizer", "tokenizer-runner", "tokenizer-config", "chat-template", "selftest", "notice"}
"""Files that the runtime of the artefact does not read."""
_SAME_MODEL = 0.1
"""KL in nats above which a contender does not carry the model at all."""

Entry = tuple[Contender, Launch]


@dataclass
class _Log:
    rounds: list[Round] = field(default_factory=list)
    loads: list[Load] = field(default_factory=list)
    memory: list[Memory] = field(default_factory=list)
    turns: list[Turn] = field(default_factory=list)


def parse_threads(text: str) -> tuple[int, ...]:
    """`1,2` -> (1, 2)."""
    counts = text.split(",")
    if not all(count.isdecimal() and int(count) for count in counts):
        raise ExportError(f"'{text}' is no list of thread counts", "write e.g. --threads 1,2")
    return tuple(dict.fromkeys(map(int, counts)))


def bench(
    folders: Sequence[Path],
    *,
    vs: str | None = None,
    peer_python: Path | None = None,
    model: str | None = None,
    rounds: int = 5,
    threads: Sequence[int] = (1, 2),
    regimes: Sequence[Regime] = REGIMES,
    quick: bool = False,
    busy: bool = False,
) -> Report:
    """Measure bundles, and with `vs="llama.cpp"` that peer with the same weights.

    With a peer, each contender is first compared with the source over the golden, or with `quick`
    over its short prompts. `model` names the source where a bundle was made of a folder or file.
    Raises ExportError when bundles hold different models, a worker fails, a contender does not say
    what the model says, or, unless `busy`, other work keeps the machine from measuring anything.
    """
    opened = [bundles.load(folder) for folder in folders]
    context = _context(opened, regimes)
    started = datetime.now(UTC).isoformat(timespec="seconds")
    entries = _bundles(folders, opened)
    if not busy:
        _refuse_busy()
    quality: list[Quality] = []
    if vs:
        found, interpreter = _source(opened[0], model), peer.python(peer_python)
        with console.step("peer: Q8_0 GGUF"):
            entries += peer.contenders(found, context, interpreter)
        golden = short_golden(found, context) if quick else _golden(found, context)
        quality = _qualities(wide(entries), golden, max(threads))
    log = _Log()
    for count in threads:
        _measure(entries, count, rounds, regimes, log)
    return Report(
        started=started,
        machine=machine.describe(),
        protocol=Protocol(
            rounds=rounds,
            threads=tuple(threads),
            regimes=tuple(regimes),
            loads=LOADS,
            settle_seconds=SETTLE_SECONDS,
        ),
        contenders=tuple(contender for contender, _ in entries),
        rounds=tuple(log.rounds),
        loads=tuple(log.loads),
        memory=tuple(log.memory),
        turns=tuple(log.turns),
        bandwidth=tuple(machine.bandwidth(count) for count in threads),
        quality=tuple(quality),
    )


def _context(opened: Sequence[Bundle], regimes: Sequence[Regime]) -> int:
    """The smallest context, when all turns fit it and all bundles hold one model."""
    if len({one.manifest.model.digest for one in opened}) > 1:
        raise ExportError("these bundles hold different models", "bench bundles of one model at a time")
    context = min(one.manifest.io.context for one in opened)
    needed = max(regime.prompt + regime.decode for regime in regimes)
    if context < needed:
        raise ExportError(
            f"a context of {context} is too short for the bench", f"export with --context {needed}"
        )
    return context


def _refuse_busy() -> None:
    others = machine.busy_cores(_LOOK_SECONDS)
    if others > _BUSY:
        raise ExportError(
            f"other work keeps {others:.1f} cores of this machine busy",
            "wait until it is done, or measure all the same with --busy",
        )


def _bundles(folders: Sequence[Path], opened: Sequence[Bundle]) -> list[Entry]:
    """Named by their targets; by folder, or a number, where that is not one name each."""
    targets = [one.manifest.target for one in opened]
    names = targets if len(set(targets)) == len(targets) else [str(folder) for folder in folders]
    entries = []
    for index, (folder, one) in enumerate(zip(folders, opened, strict=True)):
        name = names[index] if names.count(names[index]) == 1 else f"{names[index]} #{index + 1}"
        versions = {tool: metadata.version(tool) for tool in one.manifest.tools}
        contender = Contender(
            name=name,
            runtime=one.manifest.runtime.name,
            peer=False,
            file_bytes=sum(file.bytes for file in one.manifest.files.values() if file.role not in _BESIDE),
            model=one.manifest.model.digest,
            options={**versions, "recipe": one.manifest.recipe.name, "kv cache": one.manifest.io.kv_cache},
        )
        command = (sys.executable, "-m", "mobile_export.latency.worker")
        entries.append((contender, Launch(name, command, {"kind": "bundle", "path": str(folder)}, SOLO_BLAS)))
    return entries


def _source(bundle: Bundle, model: str | None) -> Checkpoint:
    from mobile_export.checkpoint import resolve

    checkpoint = resolve(model or bundle.manifest.model.spec)
    if checkpoint.digest != bundle.manifest.model.digest:
        raise ExportError(
            f"'{checkpoint.name}' is not the model these bundles were made of", "name that model with --model"
        )
    return checkpoint


def wide(entries: Sequence[Entry]) -> list[Entry]:
    """The same with room for every position's logits, which turns have no use for."""
    return [
        (contender, replace(launch, spec={**launch.spec, "all_logits": True}))
        for contender, launch in entries
    ]


def _qualities(entries: Sequence[Entry], golden: Golden, threads: int) -> list[Quality]:
    qualities = []
    for contender, launch in entries:
        with console.step(f"quality: {contender.name}") as cost, Worker(launch) as worker:
            runner = RemoteRunner(worker, worker.open(threads))
            qualities.append(_quality(contender.name, runner, golden))
            cost.note = f"KL {qualities[-1].kl_mean}"
    return qualities


def _golden(checkpoint: Checkpoint, context: int) -> Golden:
    """The committed golden, else the short prompts asked of the source now."""
    from mobile_export.golden import find
    from mobile_export.prompts import load_prompts

    try:
        return find(checkpoint, load_prompts()).subset(context=context)
    except ExportError:
        return short_golden(checkpoint, context)


def _quality(name: str, runner: RemoteRunner, golden: Golden) -> Quality:
    from mobile_export.observe import observe
    from mobile_export.parity import compare

    observed = observe(runner, golden.cases, {"source": golden.observation})
    metrics = compare(golden.cases, golden.observation, observed, "source")
    if metrics.broken or metrics.kl_mean is None or metrics.kl_mean > _SAME_MODEL:
        raise ExportError(
            f"'{name}' does not say what the model says: KL {metrics.kl_mean}",
            "its speed would be of another model: make that artefact again",
        )
    return Quality(
        contender=name,
        positions=metrics.positions,
        kl_mean=metrics.kl_mean,
        top1=metrics.top1,
        greedy_mean=metrics.greedy_mean,
        greedy_tokens=max(len(case.greedy) for case in golden.cases),
    )


def _measure(
    entries: Sequence[Entry], threads: int, rounds: int, regimes: Sequence[Regime], log: _Log
) -> None:
    with console.step(f"loads, threads: {threads}"):
        log.loads += [_load(entry, threads) for _ in range(LOADS) for entry in entries]
    with ExitStack() as stack:
        workers, vocab = {}, 0
        for contender, launch in entries:
            worker = workers[contender.name] = stack.enter_context(Worker(launch))
            vocab = int(worker.open(threads)["vocab"])
        for worker in workers.values():
            for regime in regimes:
                worker.ask("turn", prompt=prompt(regime.prompt, vocab), decode=min(regime.decode, 4))
        for number in range(rounds):
            with console.step(f"round {number + 1} of {rounds}, threads: {threads}"):
                log.rounds.append(_round(threads, number))
                for regime in regimes:
                    for name, worker in workers.items():
                        log.turns.append(_turn(worker, name, threads, number, regime, vocab))
        _refuse_changes(log.turns)
        for name, worker in workers.items():
            peak = worker.ask("memory")["peak_bytes"]
            log.memory.append(Memory(contender=name, threads=threads, peak_bytes=peak))


def _load(entry: Entry, threads: int) -> Load:
    contender, launch = entry
    with Worker(launch) as worker:
        answer = worker.open(threads, again=True)
    return Load(contender=contender.name, threads=threads, ns=answer["ns"], floor_bytes=answer["floor_bytes"])


def prompt(length: int, vocab: int) -> list[int]:
    """The fixed token ids of a prompt; all of them exist, none of them means anything."""
    return [7 + 31 * index % min(vocab - 7, 997) for index in range(length)]


def _round(threads: int, number: int) -> Round:
    load = round(os.getloadavg()[0], 2)
    return Round(threads=threads, round=number, load_average=load, busy=machine.busy_cores(_LOOK_SECONDS))


def _turn(worker: Worker, name: str, threads: int, number: int, regime: Regime, vocab: int) -> Turn:
    time.sleep(SETTLE_SECONDS)
    busy = machine.Busy()
    answer = worker.ask("turn", prompt=prompt(regime.prompt, vocab), decode=regime.decode)
    return Turn(
        contender=name,
        threads=threads,
        round=number,
        prompt=regime.prompt,
        prefill_ns=answer["prefill_ns"],
        decode_ns=tuple(answer["decode_ns"]),
        tokens=tuple(answer["tokens"]),
        cpu_ns=answer["cpu_ns"],
        idle_ns=answer["idle_ns"],
        idle_cpu_ns=answer["idle_cpu_ns"],
        others=busy.cores(answer["cpu_ns"] / 1e9),
    )


def _refuse_changes(turns: Sequence[Turn]) -> None:
    """A round that says something else than the first one did is not a measurement of the same work."""
    first: dict[tuple[str, int, int], tuple[int, ...]] = {}
    for turn in turns:
        said = first.setdefault((turn.contender, turn.threads, turn.prompt), turn.tokens)
        if said != turn.tokens:
            raise ExportError(
                f"'{turn.contender}' said something else in round {turn.round + 1} than in the first",
                "its runtime is not deterministic: check it with `mobile-export parity`",
            )
