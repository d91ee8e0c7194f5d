"""Measuring on a phone, through its app: a launch for each thing to do, reports into samples.

What a phone is reached by is a `Link`. Each launch is a fresh process, so that a crash loses no more
than it was asked for, and memory and loads are of processes that did nothing else.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import TYPE_CHECKING, Any, Protocol

import msgspec

from mobile_export import console
from mobile_export.files import sha256_file
from mobile_export.latency import contract, protocol
from mobile_export.latency import phone_reports as reports
from mobile_export.latency.contract import DeviceReport, Request
from mobile_export.latency.phone_reports import Look
from mobile_export.latency.protocol import Samples, token_ids
from mobile_export.latency.rounds import refuse_change, refuse_other_words

if TYPE_CHECKING:
    from mobile_export.bundle import Bundle
    from mobile_export.latency.devices import Entry

HOLD_MS = 2000
NOT_SPEED: dict[contract.Kind, str] = {
    "physical": "",
    "emulator": "an emulator, no phone",
    "simulator": "a simulator, no phone",
    "fake": "a fake device of a test",
}


@dataclass(frozen=True)
class Answer:
    """A launch's report, and what the host saw meanwhile."""

    report: DeviceReport
    held_bytes: int = 0
    """For `memory`: the process as the system's own tool saw it at the end; 0: nobody looked."""


class Link(Protocol):
    """The way to one phone."""

    def push(self, bundle: Bundle) -> str:
        """The bundle's folder there. Files that are there already stay."""
        ...

    def launch(self, request: Request) -> Answer:
        """A fresh process of the app does that, to its end. ExportError: it crashed, or the phone is gone."""
        ...

    def look(self) -> Look:
        """How the phone does."""
        ...


@dataclass
class Phone:
    """A device that measures through a link. `info.not_speed` may come with the first report."""

    link: Link
    info: protocol.DeviceInfo
    _log: list[Samples] = field(default_factory=list)

    def measure(self, entries: Sequence[Entry], plan: protocol.Protocol) -> Samples:
        """Run the plan with each bundle in turn; with several, round by round."""
        contenders = [self._contender(entry) for entry in entries]
        for one in contenders:
            self._check(one, max(plan.threads))
        for threads in plan.threads:
            for one in contenders:
                self._loads(one, threads, plan)
            whole = len(contenders) == 1
            for first in range(0, 1 if whole else plan.rounds):
                for one in contenders:
                    self._rounds(one, threads, plan, first, plan.rounds if whole else 1)
        if plan.long_seconds:
            for one in contenders:
                self._long_run(one, plan)
        return _merge(self._log)

    def _contender(self, entry: Entry) -> _Contender:
        from mobile_export.bundle import MANIFEST, load, verify

        assert entry.folder
        bundle = load(entry.folder)
        verify(bundle)
        with console.step(f"push: {entry.contender.name}"):
            folder = self.link.push(bundle)
        return _Contender(entry.contender.name, bundle, folder, sha256_file(entry.folder / MANIFEST))

    def _ask(self, one: _Contender, do: contract.Do, threads: int, **more: object) -> tuple[Request, Answer]:
        request = Request(
            run=secrets.token_hex(8),
            do=do,
            bundle=one.folder,
            manifest=one.manifest,
            threads=threads,
            **more,  # type: ignore[arg-type]
        )
        answer = self.link.launch(request)
        reports.refuse(one.name, request, answer.report)
        if not self.info.not_speed:
            reason = NOT_SPEED[answer.report.phone.kind]
            self.info = msgspec.structs.replace(self.info, not_speed=reason)
        self._log.append(Samples(machine=reports.machine(answer.report)))
        return request, answer

    def _keep(self, **parts: object) -> None:
        """More samples, in the order of time."""
        self._log.append(Samples(machine=self._log[-1].machine, **parts))  # type: ignore[arg-type]

    def _check(self, one: _Contender, threads: int) -> None:
        cases = {
            case["name"]: case
            for case in msgspec.json.decode(one.bundle.path("selftest").read_bytes())["cases"]
        }
        with console.step(f"check: {one.name}") as cost:
            _, answer = self._ask(one, "check", threads)
            said = {check.case: check.tokens for check in answer.report.checks}
            matched = sum(_common(case["greedy"], said.get(name, ())) for name, case in cases.items())
            expected = sum(case["greedy_match"] for case in cases.values())
            check = protocol.Check(contender=one.name, threads=threads, matched=matched, expected=expected)
            cost.note = check.words()
        refuse_other_words(check)
        self._keep(checks=(check,))

    def _loads(self, one: _Contender, threads: int, plan: protocol.Protocol) -> None:
        with console.step(f"loads, threads: {threads}"):
            for _ in range(plan.loads):
                _, answer = self._ask(one, "load", threads)
                self._keep(loads=reports.loads(one.name, answer.report))
        with console.step(f"memory, threads: {threads}"):
            regimes = one.regimes(plan.regimes, most=4)
            _, answer = self._ask(one, "memory", threads, regimes=regimes, hold_ms=HOLD_MS)
            measured = answer.report.memory
            assert measured
            self._keep(
                memory=(
                    protocol.Memory(
                        contender=one.name,
                        threads=threads,
                        floor_bytes=measured.floor_bytes,
                        peak_bytes=max(measured.peak_bytes, answer.held_bytes),
                    ),
                )
            )

    def _rounds(
        self, one: _Contender, threads: int, plan: protocol.Protocol, first: int, rounds: int
    ) -> None:
        settle = round(plan.settle_seconds * 1000)
        common = {"rounds": rounds, "warmups": 1, "settle_ms": settle}
        with console.step(f"rounds: {one.name}, threads: {threads}") as cost:
            before = self.link.look()
            regimes = one.regimes(plan.regimes)
            request, answer = self._ask(one, "turns", threads, regimes=regimes, **common)
            states = reports.states(answer.report, first, before, self.link.look())
            cost.note = reports.heat(states)
        turns = reports.turns(one.name, request, answer.report, first)
        said = one.said.setdefault(threads, {})
        for turn in turns:
            refuse_change(said, one.name, turn.prompt, turn.round, turn.tokens)
        text = {"text": plan.text, "text_tokens": one.bundle.manifest.io.context - 1}
        _, answer = self._ask(one, "first-token", threads, **text, **common)
        for one_token in answer.report.first_tokens:
            refuse_change(said, one.name, None, first + one_token.round, (one_token.token,))
        self._keep(
            states=states, turns=turns, first_tokens=reports.first_tokens(one.name, answer.report, first)
        )

    def _long_run(self, one: _Contender, plan: protocol.Protocol) -> None:
        threads = max(plan.threads)
        more = {"regimes": one.regimes((plan.long_regime,)), "seconds": round(plan.long_seconds)}
        with console.step(f"long run: {one.name}") as cost:
            before = self.link.look()
            _, answer = self._ask(one, "long-run", threads, **more)
            states = reports.states(answer.report, -1, before, self.link.look())
            cost.note = reports.heat(states)
        decoded = tuple(turn.decode_ns for turn in answer.report.turns)
        long_run = protocol.LongRun(contender=one.name, threads=threads, decode_ns=decoded)
        self._keep(states=states, long_runs=(long_run,))


class _Contender:
    """A bundle on the phone, and what it said so far."""

    def __init__(self, name: str, bundle: Bundle, folder: str, manifest: str) -> None:
        self.name, self.bundle, self.folder, self.manifest = name, bundle, folder, manifest
        self.said: dict[int, dict[Any, Any]] = {}
        """By thread count: see `rounds.refuse_change`."""

    def regimes(
        self, regimes: Sequence[protocol.Regime], most: int | None = None
    ) -> tuple[contract.Regime, ...]:
        """With their token ids; decoding at `most` so many."""
        vocab = self.bundle.manifest.io.vocab
        return tuple(
            contract.Regime(
                prompt=tuple(token_ids(one.prompt, vocab)),
                decode=one.decode if most is None else min(one.decode, most),
                first=token_ids(1, vocab)[0],
            )
            for one in regimes
        )


def _common(wanted: Sequence[int], said: Sequence[int]) -> int:
    """Length of the common start."""
    pairs = zip(wanted, said, strict=False)
    return next((i for i, (one, other) in enumerate(pairs) if one != other), min(len(wanted), len(said)))


def _merge(log: Sequence[Samples]) -> Samples:
    """All in one; the machine with every contender's runtime."""
    versions = {name: value for one in log for name, value in one.machine.versions.items()}
    machine = msgspec.structs.replace(log[0].machine, versions=versions)
    names = [name for name in Samples.__struct_fields__ if name != "machine"]
    joined = {name: tuple(chain.from_iterable(getattr(one, name) for one in log)) for name in names}
    return Samples(machine=machine, **joined)
