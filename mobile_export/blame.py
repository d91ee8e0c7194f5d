"""What blame found: which layer, and which op of it, make a stage differ from the stage before it."""

from __future__ import annotations

import math
from itertools import groupby

import msgspec


class Tap(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One place. Errors are relative, RMS over the tokens; None: not a finite number."""

    layer: int | None
    kind: str
    """`self_attn.q_proj`, `mlp.norm`, `lm_head`, ...: see `taps.points.Place`."""
    error: float | None
    """Made here: by the op on the stage's own inputs."""
    expected: float
    """Of that, what the stage's arithmetic explains."""
    total: float | None
    """Against the stage before on its own inputs: all that was made up to here."""


class Guilty(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The first place whose error nothing explains."""

    layer: int | None
    kind: str
    error: float | None
    expected: float
    columns: int
    """Of the op's output, those that are off by themselves; 0: none stands out."""
    column: int
    """The worst one."""
    factor: float | None
    """What its values are multiplied by (least squares)."""


class BlameReport(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One stage, place by place in the order of the program. `msgspec.json` writes and reads it."""

    schema: int = 1
    model: str
    target: str
    stage: str
    against: str
    tokens: int
    guilty: Guilty | None
    taps: tuple[Tap, ...]


def verdict(report: BlameReport) -> str:
    """One line: who, or that it is nobody."""
    found = report.guilty
    between = f"{report.against} -> {report.stage}"
    if found is None:
        return f"{between}: no op of any layer errs more than its arithmetic explains"
    where = found.kind if found.layer is None else f"layer {found.layer} {found.kind}"
    line = f"{between}: {where}, error {_show(found.error)} where {_show(found.expected)} is expected"
    if found.columns == 1:
        return f"{line}; column {found.column} alone, times {_show(found.factor)}"
    return f"{line}; {found.columns} columns, the worst {found.column}" if found.columns else line


def table(report: BlameReport) -> tuple[str, list[str], list[list[str]]]:
    """Title, columns and rows for `console.table`: the op furthest past its expected error in each layer."""
    lines = []
    for layer, group in groupby(report.taps, key=lambda tap: tap.layer):
        taps = list(group)
        worst = max(taps, key=lambda tap: math.inf if tap.error is None else tap.error / tap.expected)
        name = "-" if layer is None else str(layer)
        lines.append([name, worst.kind, _show(worst.error), _show(worst.expected), _show(taps[-1].total)])
    title = f"{report.model}: {report.against} -> {report.stage}, {report.tokens} tokens"
    return title, ["layer", "worst op", "its error", "expected", "total error after the layer"], lines


def _show(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.3g}"
