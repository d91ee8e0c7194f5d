"""Parity stage by stage: source, traced, quantized, artefact, each against the stage before it."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mobile_export import console
from mobile_export.bundle import Bundle
from mobile_export.errors import ExportError
from mobile_export.parity import ParityReport, StageResult, by_position, compare, stage_result
from mobile_export.recipe import Recipe, Threshold, parse_recipe
from mobile_export.targets import reference, runners, target

if TYPE_CHECKING:
    from mobile_export.cases import Observation
    from mobile_export.golden import Golden
    from mobile_export.types import Checkpoint, Runner

STAGES = ("source", "traced", "quantized", "artifact")
CONSISTENCY_TOKENS = 32
"""Tokens each stage is fed in one call, in chunks, and one by one."""


@dataclass(frozen=True)
class Inputs:
    """What parity of one bundle works on."""

    bundle: Bundle
    recipe: Recipe
    checkpoint: Checkpoint
    golden: Golden
    runtime: str | None = None
    """`coreml`: run the artefact in Core ML itself too."""
    device: str | None = None
    """Where the artefact runs instead of here, e.g. `qemu-arm64`."""


def inputs(
    bundle: Bundle,
    *,
    model: str | None = None,
    short: bool = False,
    runtime: str | None = None,
    device: str | None = None,
) -> Inputs:
    """The recipe from the manifest, the source it was made of (`model` where that was a path), its golden.

    Raises ExportError when the source is another one, or has no golden.
    """
    from mobile_export.checkpoint import resolve
    from mobile_export.golden import find
    from mobile_export.prompts import load_prompts
    from mobile_export.short_golden import short_golden

    recipe = parse_recipe(dict(bundle.manifest.recipe.table))
    with console.step("model"):
        checkpoint = resolve(model or bundle.manifest.model.spec)
    if checkpoint.digest != bundle.manifest.model.digest:
        raise ExportError(
            f"'{checkpoint.name}' is not the model this bundle was made of",
            "name that model with --model",
        )
    if short:
        golden = short_golden(checkpoint, recipe.context)
    else:
        golden = find(checkpoint, load_prompts()).subset(context=recipe.context)
    return Inputs(bundle, recipe, checkpoint, golden, runtime, device)


def parity(given: Inputs, stages: tuple[str, ...] = STAGES) -> ParityReport:
    """Run `stages` in order over the golden; each is measured against the one before it.

    The golden stands before the first. The artefact is also measured against the golden, as `total`.
    """
    limits: Any = given.recipe.parity
    lines: list[StageResult] = []
    groups = []
    before, seen = "golden", given.golden.observation
    for stage, runner in _runners(given, stages):
        with console.step(f"parity: {stage}"):
            references = {"golden": given.golden.observation, before: seen}
            observed = _observe(given, runner, references)
            groups.append(_consistency(given, stage, runner))
        limit = _limit(limits, stage, before)
        lines.append(_line(given, stage, before, seen, observed, limit))
        if stage.startswith("artifact") and before != "golden":
            total = limits.total if stage == "artifact" else limits.coreml.total
            lines.append(_line(given, stage, "golden", given.golden.observation, observed, total))
        before, seen = stage, observed
        del runner
        gc.collect()
    return ParityReport(
        model=given.checkpoint.name,
        checkpoint=given.checkpoint.digest,
        target=given.bundle.manifest.target,
        recipe=given.bundle.manifest.recipe.digest,
        device=given.device or "",
        stages=tuple(lines),
        consistency=tuple(groups),
        claim=getattr(target(given.bundle.manifest.target), "CLAIM", ""),
    )


def _runners(given: Inputs, stages: tuple[str, ...]) -> Iterator[tuple[str, Runner]]:
    """One runner at a time: no two models in this process at once.

    A device opens the artefact first: what it lacks shows before the other stages have run.
    """
    from mobile_export import passes
    from mobile_export.latency import devices
    from mobile_export.targets.source import HFRunner

    device = devices.runner(given.device, given.bundle.folder) if given.device else nullcontext()
    with device as there:
        for stage in stages:
            if stage == "source":
                yield stage, HFRunner(given.checkpoint.model())
            elif stage == "artifact" and there:
                yield stage, there
            elif stage == "artifact":
                yield from runners(given.bundle.manifest.target, given.bundle.path("program"), given.runtime)
            else:
                last = {"traced": "trace", "quantized": "quantize"}[stage]
                yield stage, reference.open(passes.run(given.checkpoint, given.recipe, last=last).program)


def _limit(limits: Any, stage: str, before: str) -> Threshold:
    if stage.startswith("artifact "):  # in an arithmetic
        return limits.coreml.total if before == "golden" else limits.coreml.rounding
    if stage == "artifact" and before == "golden":
        return limits.total
    return limits.traced if stage == "source" else getattr(limits, stage)


def _observe(given: Inputs, runner: Runner, references: dict[str, Observation]) -> Observation:
    from mobile_export.observe import observe

    return observe(runner, given.golden.cases, references)


def _consistency(given: Inputs, stage: str, runner: Runner) -> Any:
    from mobile_export.observe import consistency

    tokens = given.golden.cases[0].inputs[:CONSISTENCY_TOKENS]
    if not stage.startswith("artifact"):
        return consistency(runner, tokens, stage)
    cut = given.recipe.parity.cut
    return consistency(runner, tokens, stage, max_kl=cut.kl_max, margin=cut.margin)


def _line(
    given: Inputs, stage: str, against: str, reference: Observation, observed: Observation, limit: Any
) -> StageResult:
    both = (given.golden.cases, reference, observed, against)
    return stage_result(stage, against, compare(*both), limit, by_position(*both))
