"""How much a small artefact's drafts speed a large one up, which says what it would have said alone."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, Literal

import msgspec

from mobile_export import bundle as bundles
from mobile_export import console
from mobile_export.bundle import Bundle
from mobile_export.errors import ExportError
from mobile_export.files import write_file
from mobile_export.latency import machine
from mobile_export.latency.protocol import Contender, Machine, Table
from mobile_export.speculative import Speculation, greedy, speculate
from mobile_export.targets import target
from mobile_export.tokenizers_io import chat_ids

PROMPTS = {
    "code": "Write a Python function that merges two sorted lists into one sorted list.",
    "prose": "Explain in a few sentences why the sea is salty.",
    "chinese": "请用三句话介绍一下长城的历史。",
}
TOKENS = 96


class Trial(Table, frozen=True):
    """One prompt in one round: the target alone, then with drafts. Both times are of the same tokens."""

    prompt: str
    round: int
    alone_ns: int
    drafted_ns: int
    drafted: int
    accepted: int
    """Drafted tokens that the target says too."""
    checks: int
    """Calls of the target that checked drafts."""


class DraftReport(Table, frozen=True):
    """One run on the host. A round is kept only when both ways said the same, token for token."""

    started: str
    """UTC, ISO 8601."""
    machine: Machine
    target: Contender
    draft: Contender
    threads: int
    ahead: int
    """Tokens drafted at a time."""
    tokens: int
    """Of each answer."""
    prompts: dict[str, str]
    trials: tuple[Trial, ...]
    busy: float
    """Cores of other work just before."""
    format: Literal["mobile-export-draft"] = "mobile-export-draft"
    schema_version: Literal[1] = 1

    def of(self, prompt: str) -> list[Trial]:
        """A prompt's trials, by round."""
        return [trial for trial in self.trials if trial.prompt == prompt]


def bench(
    large: Path, small: Path, *, ahead: int, rounds: int, threads: int, busy: bool = False
) -> DraftReport:
    """Measure `large` alone and with drafts of `small`, by turns, on this host.

    Raises ExportError when the two cannot be used together, the drafts change the answer, or other
    work keeps the machine from measuring.
    """
    opened = [bundles.load(folder) for folder in (large, small)]
    others = _others()
    if others > 0.5 and not busy:
        raise ExportError(
            f"other work keeps {others:.1f} cores of this machine busy",
            "wait until it is done, or measure all the same with --busy",
        )
    questions = _questions(opened)
    with console.step("load both"):
        first, second = (
            target(one.manifest.target).open(one.path("program"), threads=threads) for one in opened
        )
    trials = []
    for number in range(-1, rounds):
        with console.step(f"round {number + 1} of {rounds}" if number >= 0 else "warm-up"):
            for name, tokens in questions.items():
                count = TOKENS if number >= 0 else 8
                alone, alone_ns = _timed(partial(greedy, first, tokens, count))
                found, drafted_ns = _timed(partial(speculate, first, second, tokens, count, ahead))
                trial = _trial(name, number, alone, alone_ns, found, drafted_ns)
                trials += [trial] if number >= 0 else []
    return DraftReport(
        started=datetime.now(UTC).isoformat(timespec="seconds"),
        machine=machine.describe(),
        target=_contender(opened[0]),
        draft=_contender(opened[1]),
        threads=threads,
        ahead=ahead,
        tokens=TOKENS,
        prompts=PROMPTS,
        trials=tuple(trials),
        busy=others,
    )


def render(report: DraftReport) -> None:
    """Print a line a prompt."""
    console.say(f"{report.machine.cpu}, {report.threads} threads; {report.started}")
    console.say(
        f"target {report.target.name}, draft {report.draft.name}, {report.ahead} tokens ahead, "
        f"{report.tokens} tokens an answer: with drafts the same tokens as without, in every round"
    )
    rows = []
    for prompt in report.prompts:
        trials = report.of(prompt)
        alone, drafted = (
            report.tokens / statistics.median(getattr(one, name) for one in trials) * 1e9
            for name in ("alone_ns", "drafted_ns")
        )
        ratios = [one.alone_ns / one.drafted_ns for one in trials]
        middle, half = statistics.median(ratios), (max(ratios) - min(ratios)) / 2
        share = trials[0].accepted / max(trials[0].drafted, 1)
        rows.append(
            [
                prompt,
                f"{alone:.1f}",
                f"{drafted:.1f}",
                f"x{middle:.2f} ±{half:.2f}",
                f"{share:.0%} of {trials[0].drafted}",
                trials[0].checks,
            ]
        )
    console.table("", ["prompt", "alone", "with drafts", "speed-up", "accepted", "checks"], rows)
    console.say("tokens a second, prompt included: median of rounds, ± half of highest less lowest")


def save(report: DraftReport, path: Path) -> None:
    """Write the report as JSON."""
    write_file(path, msgspec.json.format(msgspec.json.encode(report), indent=1) + b"\n")


def _questions(opened: list[Bundle]) -> dict[str, list[int]]:
    """Ids of each prompt. ExportError: two vocabularies, or too short a context."""
    first, second = opened
    if first.path("tokenizer").read_bytes() != second.path("tokenizer").read_bytes():
        raise ExportError(
            "target and draft have different tokenizers", "draft with a bundle of the same model family"
        )
    questions = {name: chat_ids(first, text) for name, text in PROMPTS.items()}
    needed = max(map(len, questions.values())) + TOKENS
    if (context := min(one.manifest.io.context for one in opened)) < needed:
        raise ExportError(f"a context of {context} is too short for it", f"export with --context {needed}")
    return questions


def _trial(
    name: str, number: int, alone: list[int], alone_ns: int, found: Speculation, drafted_ns: int
) -> Trial:
    if found.tokens != alone:
        at = next(i for i, pair in enumerate(zip(alone, found.tokens, strict=True)) if pair[0] != pair[1])
        raise ExportError(
            f"with drafts the target says another token than alone, token {at} of '{name}'",
            "its runtime computes one token and several differently: use a target in fp32",
        )
    return Trial(
        prompt=name,
        round=number,
        alone_ns=alone_ns,
        drafted_ns=drafted_ns,
        drafted=found.drafted,
        accepted=found.accepted,
        checks=found.checks,
    )


def _timed(work: Callable[[], Any]) -> tuple[Any, int]:
    begin = time.perf_counter_ns()
    made = work()
    return made, time.perf_counter_ns() - begin


def _others() -> float:
    begin, busy = time.perf_counter(), machine.busy_seconds()
    time.sleep(0.5)
    return machine.cores(machine.busy_seconds() - busy, time.perf_counter() - begin)


def _contender(bundle: Bundle) -> Contender:
    made = bundle.manifest
    return Contender(
        name=f"{made.target} {made.recipe.name}",
        runtime=made.runtime.name,
        peer=False,
        file_bytes=sum(file.bytes for file in made.files.values() if file.role == "program"),
        model=made.model.digest,
        options={"recipe": made.recipe.name, "kv cache": made.io.kv_cache},
    )
