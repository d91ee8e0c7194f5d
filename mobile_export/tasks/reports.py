"""What the tasks of one model gave: source and artefacts side by side, and the verdicts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import msgspec

from mobile_export.baseline import PERPLEXITY, Change, Tolerance, change, refuse_none, refuse_others
from mobile_export.recipe import Gate
from mobile_export.tasks.code import PASSED, CodeResult
from mobile_export.tasks.perplexity import TextScore, perplexity
from mobile_export.tasks.sets import KINDS

SOURCE = "source"
PASSES = Tolerance(absolute=1.0, higher_is_worse=False)
"""One answer: a near tie may fall the other way on another processor."""


class Contender(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The source, or one artefact in one arithmetic."""

    name: str
    """`source`, or the target and its arithmetic, e.g. `coreml fp16`."""
    target: str = ""
    recipe: str = ""
    """Digest; empty for the source."""
    perplexity: dict[str, float | None]
    """Over all texts (`all`) and by kind."""
    texts: tuple[TextScore, ...]
    code: tuple[CodeResult, ...] = ()
    """Empty: no problem was asked."""
    seconds: float = 0.0
    """What it took; 0: taken from the baseline."""

    @property
    def passes(self) -> int:
        """Problems solved."""
        return sum(result.verdict == PASSED for result in self.code)


class Verdict(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """An artefact held to a limit of its recipe."""

    contender: str
    what: str
    measured: float | None
    """None: not a finite number, or nothing to measure it on."""
    limit: float
    passed: bool


class TaskReport(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """All contenders of one model. `msgspec.json` writes and reads it."""

    schema: int = 1
    model: str
    checkpoint: str
    """Digest of the source."""
    texts_sha256: str
    code_sha256: str
    window: int
    """Tokens the texts were cut into; a perplexity of another window is another figure."""
    contenders: tuple[Contender, ...]
    verdicts: tuple[Verdict, ...] = ()

    @property
    def passed(self) -> bool:
        """Every artefact's figures are finite, and no limit was passed."""
        finite = all(one.perplexity["all"] is not None for one in self.contenders)
        return bool(self.contenders) and finite and all(verdict.passed for verdict in self.verdicts)

    @property
    def source(self) -> Contender | None:
        """The source among the contenders."""
        return next((one for one in self.contenders if one.name == SOURCE), None)


def perplexities(scores: Sequence[TextScore]) -> dict[str, float | None]:
    """By kind, and over all."""
    by_kind = {kind: [score for score in scores if score.kind == kind] for kind in KINDS}
    return {"all": perplexity(scores), **{kind: perplexity(some) for kind, some in by_kind.items() if some}}


def hold(source: Contender, artefact: Contender, gate: Gate) -> tuple[Verdict, ...]:
    """An artefact against the source: the ratio of perplexities, and how many fewer answers pass.

    Only the problems that both were asked count.
    """
    ratio = _ratio(artefact.perplexity["all"], source.perplexity["all"])
    held = [_at_most(artefact.name, "perplexity ratio", ratio, gate.perplexity_ratio)]
    ours, theirs = _common(artefact.code, source.code)
    if artefact.code:
        fewer = float(theirs - ours) if _shared(artefact.code, source.code) else None
        held.append(_at_most(artefact.name, "passes fewer", fewer, gate.fewer_passes))
    return tuple(held)


def refuse_other_work(before: TaskReport, now: TaskReport) -> None:
    """ExportError when figures of the two cannot be compared."""
    refuse_others(
        [
            ("checkpoint", before.checkpoint, now.checkpoint),
            ("text set", before.texts_sha256, now.texts_sha256),
            ("problem set", before.code_sha256, now.code_sha256),
            ("window", before.window, now.window),
        ]
    )


def changes(before: TaskReport, now: TaskReport) -> list[Change]:
    """Perplexities and passes of each artefact that both ran.

    ExportError: they are of other work, or there is none and the source's figures are not `before`'s either.
    """
    refuse_other_work(before, now)
    old = {one.name: one for one in before.contenders if one.name != SOURCE}
    found = []
    for one in now.contenders:
        earlier = old.get(one.name)
        if earlier is None:
            continue
        for kind, value in one.perplexity.items():
            old_value = earlier.perplexity.get(kind)
            found.append(change(one.name, f"perplexity, {kind}", old_value, value, PERPLEXITY))
        if _shared(earlier.code, one.code):
            old_passes, passes = _common(earlier.code, one.code)
            found.append(change(one.name, "passes", old_passes, passes, PASSES))
    borrowed = now.source is not None and not now.source.seconds
    return found if borrowed else refuse_none(found)


def table(report: TaskReport) -> tuple[str, tuple[str, ...], list[tuple[str, ...]]]:
    """Title, columns and rows, for `console.table`."""
    source = report.source
    rows = []
    for one in report.contenders:
        base = source.perplexity["all"] if source else None
        ratio = _ratio(one.perplexity["all"], base)
        mine = [verdict.passed for verdict in report.verdicts if verdict.contender == one.name]
        rows.append(
            (
                one.name,
                *(_show(one.perplexity.get(kind)) for kind in ("all", *KINDS)),
                "-" if ratio is None else f"x{ratio:.4f}",
                f"{one.passes} of {len(one.code)}" if one.code else "not asked",
                f"{one.seconds:.0f} s" if one.seconds else "baseline",
                "" if not mine else "ok" if all(mine) else "FAIL",
            )
        )
    tokens = sum(score.tokens for score in report.contenders[0].texts) if report.contenders else 0
    title = f"{report.model}: perplexity over {tokens:,} tokens, answers that pass their tests"
    return title, ("", "perplexity", *KINDS, "to the source", "passes", "took", ""), rows


def _at_most(name: str, what: str, measured: float | None, limit: float) -> Verdict:
    passed = measured is not None and measured <= limit
    return Verdict(contender=name, what=what, measured=measured, limit=limit, passed=passed)


def _ratio(value: float | None, base: float | None) -> float | None:
    return None if value is None or base is None else value / base


def _shared(some: Iterable[CodeResult], others: Iterable[CodeResult]) -> set[str]:
    return {one.name for one in some} & {one.name for one in others}


def _common(some: Sequence[CodeResult], others: Sequence[CodeResult]) -> tuple[int, int]:
    """Passes of each on the problems that both were asked."""
    names = _shared(some, others)
    first, second = (
        sum(one.verdict == PASSED and one.name in names for one in results) for results in (some, others)
    )
    return first, second


def _show(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
