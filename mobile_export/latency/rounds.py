"""The rounds: workers on one machine, turn by turn.

Every contender has a process of its own for each thread count, kept through all rounds: fresh
ones would spend most of the time importing, and start cold. While one works the others wait in a
read; each turn records what processor time a process took while it waited, so that a runtime
whose idle threads spin shows in the report. One more worker, the probe, opens nothing and tells
what its machine is doing.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import msgspec

from mobile_export import console
from mobile_export.errors import ExportError
from mobile_export.latency.machine import cores
from mobile_export.latency.protocol import (
    Bandwidth,
    Check,
    Contender,
    FirstToken,
    Load,
    LongRun,
    Machine,
    Memory,
    Protocol,
    Regime,
    Samples,
    State,
    Turn,
    token_ids,
)
from mobile_export.latency.workers import Launch, Worker

_BUSY = 0.5
"""Cores of other work that a bench does not start beside."""
_WARM_UP = 4
"""Tokens that a regime decodes before anything is kept."""
_SAID = 0.5
"""Share of the selftest's tokens, as exported, that a device must say too: where two tokens are about
as likely, other kernels, or calls of another length, pick the other one."""

_CHECKED, _CHECKED_SLOW = 32, 4
"""Tokens of each selftest case; fewer where an emulator or evaluator takes seconds for one."""

Entry = tuple[Contender, Launch]


@dataclass
class _Log:
    states: list[State] = field(default_factory=list)
    loads: list[Load] = field(default_factory=list)
    memory: list[Memory] = field(default_factory=list)
    turns: list[Turn] = field(default_factory=list)
    first_tokens: list[FirstToken] = field(default_factory=list)
    long_runs: list[LongRun] = field(default_factory=list)


def measure(entries: Sequence[Entry], probe: Launch, plan: Protocol, *, timed: bool, busy: bool) -> Samples:
    """Check every contender, then run the plan with those whose times are speeds.

    `timed` False: nowhere here are they. ExportError: a worker fails, a contender does not say what
    its bundle's selftest says, or something else in one round than in another, or, unless `busy`,
    other work keeps the machine from measuring anything.
    """
    log = _Log()
    if plan.cpus:
        entries = [(one, replace(launch, spec={**launch.spec, "cpus": plan.cpus})) for one, launch in entries]
    with Worker(probe) as asked:
        machine = msgspec.convert(asked.ask("machine")["machine"], Machine)
        run = [entry for entry in entries if timed and not entry[0].not_speed]
        if run and not busy:
            _refuse_busy(_state(asked, 0, 0, "before"))
        checks = [_check(entry, max(plan.threads), entry in run) for entry in entries if not entry[0].peer]
        for threads in plan.threads if run else ():
            _loads(run, threads, plan, log)
            _rounds(run, threads, plan, asked, log)
        probes = [asked.ask("bandwidth", threads=threads)["bandwidth"] for threads in plan.threads if run]
    return Samples(
        machine=machine,
        states=tuple(log.states),
        checks=tuple(checks),
        loads=tuple(log.loads),
        memory=tuple(log.memory),
        turns=tuple(log.turns),
        first_tokens=tuple(log.first_tokens),
        long_runs=tuple(log.long_runs),
        bandwidth=tuple(msgspec.convert(one, Bandwidth) for one in probes),
    )


def _state(probe: Worker, threads: int, number: int, when: Literal["before", "after"]) -> State:
    return msgspec.convert(probe.ask("state", threads=threads, number=number, when=when)["state"], State)


def _refuse_busy(state: State) -> None:
    if state.busy is not None and state.busy > _BUSY:
        raise ExportError(
            f"other work keeps {state.busy:.1f} cores of this machine busy",
            "wait until it is done, or measure all the same with --busy",
        )


def _check(entry: Entry, threads: int, fast: bool) -> Check:
    contender, launch = entry
    with console.step(f"check: {contender.name}") as cost, Worker(launch) as worker:
        worker.open(threads)
        said = worker.ask("check", tokens=_CHECKED if fast else _CHECKED_SLOW)
        check = Check(
            contender=contender.name, threads=threads, matched=said["matched"], expected=said["expected"]
        )
        cost.note = check.words()
    refuse_other_words(check)
    return check


def refuse_other_words(check: Check) -> None:
    """Another processor's kernels round otherwise, so that some words may differ; not many."""
    if check.matched < _SAID * check.expected:
        raise ExportError(
            f"'{check.contender}' does not say there what its bundle's selftest says: {check.words()}",
            "its speed would be of another model: check it with `mobile-export parity`",
        )


def _loads(entries: Sequence[Entry], threads: int, plan: Protocol, log: _Log) -> None:
    """Load and memory, each in fresh processes."""
    with console.step(f"loads, threads: {threads}"):
        for _ in range(plan.loads):
            for contender, launch in entries:
                with Worker(launch) as worker:
                    found = worker.with_artefact("load", threads=threads)
                vocab = int(found["vocab"])
                loads = found["loads"]
                log.loads += [Load(contender=contender.name, threads=threads, **load) for load in loads]
    turns = [_work(regime, vocab, _WARM_UP) for regime in plan.regimes]
    with console.step(f"memory, threads: {threads}"):
        for contender, launch in entries:
            with Worker(launch) as worker:
                found = worker.with_artefact("memory", threads=threads, turns=turns)
            size = {name: found[name] for name in ("floor_bytes", "peak_bytes")}
            log.memory.append(Memory(contender=contender.name, threads=threads, **size))


def _rounds(entries: Sequence[Entry], threads: int, plan: Protocol, probe: Worker, log: _Log) -> None:
    with ExitStack() as stack:
        workers, vocab = {}, 0
        for contender, launch in entries:
            worker = workers[contender.name] = stack.enter_context(Worker(launch))
            vocab = int(worker.open(threads)["vocab"])
        for worker in workers.values():
            for regime in plan.regimes:
                worker.ask("turn", **_work(regime, vocab, _WARM_UP))
        said: dict[tuple[str, int | None], Any] = {}
        for number in range(plan.rounds):
            with console.step(f"round {number + 1} of {plan.rounds}, threads: {threads}"):
                log.states.append(_state(probe, threads, number, "before"))
                for regime in plan.regimes:
                    for name, worker in workers.items():
                        turn = _turn(worker, probe, name, threads, number, _work(regime, vocab), plan)
                        refuse_change(said, name, regime.prompt, number, turn.tokens)
                        log.turns.append(turn)
                for contender, _ in entries:
                    if not contender.peer:
                        time.sleep(plan.settle_seconds)
                        found = workers[contender.name].ask("first_token", text=plan.text)
                        refuse_change(said, contender.name, None, number, found["said"])
                        log.first_tokens.append(_first_token(contender.name, threads, number, found))
                log.states.append(_state(probe, threads, number, "after"))
        if plan.long_seconds and threads == max(plan.threads):
            _long_runs(workers, threads, vocab, plan, probe, log)


def _work(regime: Regime, vocab: int, most: int | None = None) -> dict[str, Any]:
    """A turn's request, at `most` that many tokens decoded."""
    decode = regime.decode if most is None else min(regime.decode, most)
    return {"prompt": token_ids(regime.prompt, vocab), "decode": decode}


def _turn(
    worker: Worker, probe: Worker, name: str, threads: int, number: int, work: dict[str, Any], plan: Protocol
) -> Turn:
    time.sleep(plan.settle_seconds)
    before = probe.ask("busy")
    answer = worker.ask("turn", **work)
    after = probe.ask("busy")
    elapsed = (after["ns"] - before["ns"]) / 1e9
    others = cores(after["busy_seconds"] - before["busy_seconds"], elapsed, answer["cpu_ns"] / 1e9)
    return Turn(
        contender=name,
        threads=threads,
        round=number,
        prompt=len(work["prompt"]),
        prefill_ns=answer["prefill_ns"],
        decode_ns=tuple(answer["decode_ns"]),
        tokens=tuple(answer["tokens"]),
        cpu_ns=answer["cpu_ns"],
        idle_ns=answer["idle_ns"],
        idle_cpu_ns=answer["idle_cpu_ns"],
        others=others,
    )


def _first_token(name: str, threads: int, number: int, found: dict[str, Any]) -> FirstToken:
    times = {key: found[key] for key in ("tokens", "tokenize_ns", "prefill_ns")}
    return FirstToken(contender=name, threads=threads, round=number, **times)


def refuse_change(
    said: dict[Any, Any], name: str, what: int | None, number: int, tokens: Iterable[int]
) -> None:
    """A round that says something else than the first one did is not a measurement of the same work."""
    if said.setdefault((name, what), tuple(tokens)) != tuple(tokens):
        raise ExportError(
            f"'{name}' said something else in round {number + 1} than in the first",
            "its runtime is not deterministic: check it with `mobile-export parity`",
        )


def _long_runs(
    workers: Mapping[str, Worker], threads: int, vocab: int, plan: Protocol, probe: Worker, log: _Log
) -> None:
    """One contender after another; each heats the device for itself."""
    for name, worker in workers.items():
        with console.step(f"long run: {name}"):
            log.states.append(_state(probe, threads, -1, "before"))
            found = worker.ask("long_run", **_work(plan.long_regime, vocab), seconds=plan.long_seconds)
            log.states.append(_state(probe, threads, -1, "after"))
        turns = tuple(tuple(turn) for turn in found["decode_ns"])
        log.long_runs.append(LongRun(contender=name, threads=threads, decode_ns=turns))
