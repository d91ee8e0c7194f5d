"""Two reports of the same work: does the second say worse?"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from mobile_export import console
from mobile_export.errors import ExportError
from mobile_export.parity import ParityReport

_Report = TypeVar("_Report")


@dataclass(frozen=True)
class Tolerance:
    """How much worse counts as the same: what another processor's rounding may do, not another model."""

    relative: float = 0.0
    absolute: float = 0.0
    higher_is_worse: bool = True

    def worse(self, before: float | None, now: float | None) -> bool:
        """None is not a finite number, and worse than any."""
        if before is None or now is None:
            return now is None and before is not None
        loss = now - before if self.higher_is_worse else before - now
        return loss > self.relative * abs(before) + self.absolute


KL = Tolerance(relative=0.05, absolute=1e-6)
TOP1 = Tolerance(absolute=0.002, higher_is_worse=False)
PERPLEXITY = Tolerance(relative=0.001)
"""Of a perplexity, and of a ratio of two."""


@dataclass(frozen=True)
class Change:
    """One figure of both reports."""

    where: str
    what: str
    before: float | None
    now: float | None
    worse: bool


def change(where: str, what: str, before: float | None, now: float | None, tolerance: Tolerance) -> Change:
    """Both figures, and whether the second is worse."""
    return Change(where, what, before, now, tolerance.worse(before, now))


def read(path: Path, kind: type[_Report]) -> _Report:
    """A report that `--json` wrote. ExportError: there is none, or it is not one of that kind."""
    hint = "name a file that --json of the same command wrote"
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except OSError as error:
        raise ExportError(f"cannot read baseline '{path.name}': {error.strerror}", hint) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ExportError(f"baseline '{path.name}': {error}", hint) from None


def of_parity(before: ParityReport, now: ParityReport) -> list[Change]:
    """Mean KL, top-1 and perplexity ratio of each stage that both ran, on the same positions.

    ExportError: they are of different models or targets, or have no such stage in common.
    """
    refuse_others([("model", before.model, now.model), ("checkpoint", before.checkpoint, now.checkpoint)])
    refuse_others([("target", before.target, now.target), ("device", before.device, now.device)])
    old = {(line.stage, line.against, line.metrics.positions): line.metrics for line in before.stages}
    changes = []
    for line in now.stages:
        earlier = old.get((line.stage, line.against, line.metrics.positions))
        if earlier is None:
            continue
        for what, tolerance in (("kl_mean", KL), ("top1", TOP1), ("perplexity_ratio", PERPLEXITY)):
            old_value, value = getattr(earlier, what), getattr(line.metrics, what)
            changes.append(change(f"{line.against} -> {line.stage}", what, old_value, value, tolerance))
    return refuse_none(changes)


def refuse_others(pairs: Iterable[tuple[str, Any, Any]]) -> None:
    """ExportError that names what the baseline has otherwise."""
    differ = [what for what, old, new in pairs if old != new]
    if differ:
        raise ExportError(
            f"the baseline is not of the same work: it has another {', '.join(differ)}",
            "record it again with --json",
        )


def refuse_none(changes: list[Change]) -> list[Change]:
    """ExportError when there was nothing to compare."""
    if not changes:
        raise ExportError(
            "the baseline has nothing in common with this run", "run what it ran, or record it again"
        )
    return changes


def render(changes: Sequence[Change]) -> bool:
    """Print what is worse than the baseline, or that nothing is; whether nothing is."""
    worse = [change for change in changes if change.worse]
    if worse:
        rows = [(one.where, one.what, _show(one.before), _show(one.now)) for one in worse]
        console.table("", ("", "worse than the baseline", "before", "now"), rows)
    elif changes:
        console.say(f"no worse than the baseline in {len(changes)} figures")
    else:
        console.say("only the source's figures are the baseline's: it has none of these bundles")
    return not worse


def _show(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.6g}"
