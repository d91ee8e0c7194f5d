"""Find the place where a stage departs from the stage before it."""

from __future__ import annotations

import gc
import importlib
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mobile_export import console, passes
from mobile_export.blame import BlameReport, Guilty, Tap
from mobile_export.errors import ExportError
from mobile_export.stages import Inputs
from mobile_export.taps import arithmetic, source
from mobile_export.taps.points import Call
from mobile_export.taps.replay import Error, Tapped

if TYPE_CHECKING:
    from mobile_export.recipe import Quantize
    from mobile_export.types import Program

STAGES = ("traced", "rotated", "quantized", "artifact")
SAME = (*(f"self_attn.{kind}" for kind in ("q_proj", "k_proj", "keys")), "mlp.gate_proj", "lm_head")
"""Kinds whose values a rotated program leaves in their own basis and scale."""
TOKENS = 32
"""Of the first short prompt: all but the last in one call, the last in a call of its own."""
WHOLE = 2.0
"""Times what is expected of it, an op errs before it is guilty; `replay.COLUMN` for one column alone."""


def blame(given: Inputs, stages: Sequence[str] = STAGES) -> BlameReport:
    """The first of `stages` that has a guilty place; the last one when none has.

    `rotated` is passed over where the recipe does not rotate. ExportError: it is the only one.
    """
    taken = [stage for stage in stages if stage != "rotated" or given.recipe.quantize.rotate]
    if not taken:
        raise ExportError("this bundle's recipe does not rotate", "name another stage")
    for stage in taken:
        with console.step(f"blame: {stage}"):
            report = _stage(given, stage)
        gc.collect()
        if report.guilty:
            break
    return report


def _stage(given: Inputs, stage: str) -> BlameReport:
    calls = _calls(given)
    against, tapped, observed, form = _observed(given, stage, calls)
    errors = tapped.errors(calls, observed, form)
    return BlameReport(
        model=given.checkpoint.name,
        target=given.bundle.manifest.target,
        stage=stage,
        against=against,
        tokens=sum(len(call.tokens) for call in calls),
        guilty=next((_guilty(one) for one in errors if _is_guilty(one)), None),
        taps=tuple(_tap(one) for one in errors),
    )


def _observed(given: Inputs, stage: str, calls: Sequence[Call]) -> Any:
    """Name and program of the stage before, the stage's own values, its arithmetic.

    For `traced`, whose stage before is no program, the two are exchanged: the difference is the same.
    """
    if stage == "traced":
        tapped = Tapped(_program(given, "trace"))
        return "source", tapped, source.values(given.checkpoint, tapped.points, calls), arithmetic.Plain()
    if stage == "rotated":
        tapped, rotated = Tapped(_program(given, "trace")), Tapped(_program(given, "rotate"))
        values = rotated.values(calls)
        alike = [{place: seen[place] for place in seen if place.kind in SAME} for seen in values]
        return "traced", tapped, alike, arithmetic.Plain()
    if stage == "quantized":
        tapped, quantized = Tapped(_program(given, "rotate")), Tapped(_program(given, "quantize"))
        form = _rounded(given.recipe.quantize)
        before = "rotated" if given.recipe.quantize.rotate else "traced"
        return before, tapped, quantized.values(calls), form
    tapped = Tapped(_program(given, "quantize"))
    taps: Any = importlib.import_module(f"mobile_export.taps.{given.bundle.manifest.target}")
    values = taps.values(given.bundle.path("program"), tapped.points, calls, given.recipe)
    return "quantized", tapped, values, taps.arithmetic(given.recipe)


def _rounded(quantize: Quantize) -> arithmetic.Plain:
    if quantize.weights == "fp32":
        return arithmetic.Plain()
    return arithmetic.RoundedWeights(group=quantize.group_size if quantize.weights == "int4" else None)


def _program(given: Inputs, last: str) -> Program:
    return passes.run(given.checkpoint, given.recipe, last=last).program


def _calls(given: Inputs) -> list[Call]:
    """A prompt, as long as one call of any target takes, and a step of decoding."""
    recipe = given.recipe
    tokens = given.golden.cases[0].inputs[: min(TOKENS, recipe.context, recipe.coreml.chunk + 1)]
    return [Call(tokens[:-1], 0), Call(tokens[-1:], len(tokens) - 1)]


def _is_guilty(error: Error) -> bool:
    return not error.own <= WHOLE * error.expected or error.columns > 0


def _guilty(error: Error) -> Guilty:
    return Guilty(
        layer=error.place.layer,
        kind=error.place.kind,
        error=_finite(error.own),
        expected=error.expected,
        columns=error.columns,
        column=error.column,
        factor=_finite(error.factor),
    )


def _tap(error: Error) -> Tap:
    return Tap(
        layer=error.place.layer,
        kind=error.place.kind,
        error=_finite(error.own),
        expected=error.expected,
        total=_finite(error.total),
    )


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
