"""Exports, from a model's name to bundles that passed parity in their real runtimes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from mobile_export import bundle, console, manifest
from mobile_export.errors import ExportError, nearest
from mobile_export.recipe import Recipe, load_recipe
from mobile_export.targets import PLATFORMS, runners, target

if TYPE_CHECKING:
    from mobile_export.latency.host import Speed
    from mobile_export.passes.runner import Ran
    from mobile_export.types import Checkpoint, Program


class ExportResult(msgspec.Struct, frozen=True):
    """What an export made. Speeds and costs are of this host and this run; they are not in the bundle."""

    folder: str
    manifest: manifest.Manifest
    passes: list[dict[str, Any]]
    seconds: dict[str, float]
    speed: list[Speed] = []


def export(platform: str, *, out: Path | None = None, measure: bool = True, **how: Any) -> ExportResult:
    """Write the bundle of a model for a platform; see `mobile-export PLATFORM --help`, and `export_all`.

    `measure`: time an ExecuTorch bundle on this host afterwards.
    """
    if platform not in PLATFORMS:
        raise ExportError(f"unknown platform '{platform}'", nearest(platform, PLATFORMS))
    (result,) = _export({platform: out}, **how)
    if measure and platform == "android":
        return msgspec.structs.replace(result, speed=_speed(Path(result.folder)))
    return result


def export_all(*, out: Path | None = None, **how: Any) -> list[ExportResult]:
    """Write a model's bundle for every platform, each in a folder of its name under `out` (dist/MODEL).

    The model is traced and quantized once. Each bundle appears when it has passed: those before one
    that fails stay.
    """
    return _export({platform: out and out / platform for platform in PLATFORMS}, **how)


def _export(
    folders: dict[str, Path | None],
    *,
    model: str | None = None,
    recipe: str | None = None,
    context: int | None = None,
    revision: str | None = None,
    progress: Callable[[str], None] | None = None,
) -> list[ExportResult]:
    """Bundles by platform, in their folders or under dist/MODEL.

    Nothing appears in a folder unless the artefact, executed by its real runtime, agrees with the
    fp32 source within the recipe's `parity.total`. Raises ExportError.
    """
    from mobile_export import passes
    from mobile_export.checkpoint import resolve

    chosen = load_recipe(recipe or default_recipe(model), context=context)
    with console.step("model"):
        checkpoint = resolve(model, revision=revision, progress=progress)
    _refuse_context(checkpoint, chosen)
    base = Path("dist") / checkpoint.name
    targets = {platform: out or base / platform for platform, out in folders.items()}
    for folder in targets.values():
        bundle.refuse_other(folder)
    passed = passes.run(checkpoint, chosen)
    costs = [_cost(ran) for ran in passed.log]
    results = []
    for platform, folder in targets.items():
        seconds: dict[str, float] = {}
        with bundle.create(folder) as draft:
            made = _fill(draft, platform, checkpoint, chosen, passed.program, seconds)
        results.append(ExportResult(str(folder), made, costs, seconds))
    return results


def default_recipe(model: str | None) -> str:
    """The recipe of a model for which none is named."""
    from mobile_export.checkpoint import catalog

    return "sandbox" if (model or "").startswith("sandbox:") else catalog.recipe_of(model)


def _refuse_context(checkpoint: Checkpoint, recipe: Recipe) -> None:
    """Before minutes of work: the model must reach as far as the cache does."""
    config = json.loads((checkpoint.folder / "config.json").read_bytes())
    limit = int(config["max_position_embeddings"])
    if recipe.context > limit:
        raise ExportError(
            f"context {recipe.context} is past the model's {limit}", f"use --context {limit} or less"
        )


def _fill(
    draft: bundle.Draft,
    platform: str,
    checkpoint: Checkpoint,
    recipe: Recipe,
    program: Program,
    seconds: dict[str, float],
) -> manifest.Manifest:
    from mobile_export.report.card import model_card
    from mobile_export.tokenizers_io import write_tokenizers

    name = PLATFORMS[platform]
    with console.step(f"lower to {name}") as cost:
        lowered = target(name).write(program, recipe, checkpoint, draft)
    seconds["lower"] = round(cost.seconds, 1)
    normalize = write_tokenizers(checkpoint, draft)
    draft.path("NOTICE", "notice").write_text(_notice(checkpoint), "utf-8")
    where = "the evaluator" if hasattr(target(name), "ARITHMETICS") else "the real runtime"
    with console.step(f"parity in {where}") as cost:
        quality: dict[str, dict[str, Any]] = {}
        selftest: dict[str, Any] = {}
        for stage, runner in runners(name, lowered.artifact):
            proven, selftest = _prove(checkpoint, recipe, stage, runner)
            quality[f"source -> {stage}, short prompts"] = proven
            cost.note = f"KL {proven['kl_mean']}  top-1 {proven['top1']}"
            del runner
    seconds["parity"] = round(cost.seconds, 1)
    draft.path("selftest.json", "selftest").write_bytes(_json(selftest))
    made = manifest.Manifest(
        platform=platform,
        target=name,
        model=manifest.Model(
            name=checkpoint.name,
            spec=checkpoint.spec,
            family=checkpoint.family,
            license=checkpoint.license,
            digest=checkpoint.digest,
            provenance=checkpoint.provenance,
        ),
        recipe=manifest.RecipeUsed(recipe.name, recipe.digest, msgspec.to_builtins(recipe)),
        tools=manifest.tool_versions("torch", "transformers", *lowered.tools),
        runtime=lowered.runtime,
        io=msgspec.structs.replace(lowered.io, normalize=normalize),
        quality=quality,
    )
    draft.path("model_card.md", "model-card").write_text(model_card(made), "utf-8")
    return draft.finish(made).manifest


def _prove(
    checkpoint: Checkpoint, recipe: Recipe, stage: str, runner: Any
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The artefact against the source on the short prompts, in every way of calling it."""
    from mobile_export.golden import selftest
    from mobile_export.observe import consistency, observe
    from mobile_export.parity import check, compare, rounded
    from mobile_export.short_golden import short_golden

    golden = short_golden(checkpoint, recipe.context)
    ranges = _ranges(runner) if stage == "artifact fp32" else None
    observed = observe(runner, golden.cases, {"source": golden.observation})
    if ranges is not None:
        _refuse_overflow(ranges)
    metrics = compare(golden.cases, golden.observation, observed, "source")
    limit = recipe.parity.total if stage == "artifact" else recipe.parity.coreml.total
    if not check(metrics, limit):
        raise ExportError(
            f"the {stage} does not say what the model says: KL {metrics.kl_mean}, top-1 {metrics.top1:.3f} "
            f"over {metrics.positions} positions, {metrics.broken} of them not finite",
            "nothing was written; if this model just loses more in int8, use a recipe with wider limits "
            "(e.g. --recipe int8-loose), else report it with the output of `mobile-export doctor`",
        )
    cut = recipe.parity.cut
    agreed = consistency(runner, golden.cases[0].inputs[:24], stage, max_kl=cut.kl_max, margin=cut.margin)
    if not agreed.passed:
        ways = ", ".join(way.way for way in agreed.ways if not way.passed)
        raise ExportError(
            f"the artefact answers differently when its input is cut differently ({ways})",
            "nothing was written; report it with the output of `mobile-export doctor`",
        )
    return rounded(metrics), selftest(golden.cases, observed)


def _ranges(runner: Any) -> Any:
    """Watches how much of fp16's range every op uses."""
    from mobile_export.evaluate.ranges import Ranges

    runner.tap = Ranges()
    return runner.tap


def _refuse_overflow(ranges: Any) -> None:
    past = ranges.overflowing()
    if past:
        worst = past[0]
        where = f" of layer {worst.layer}" if worst.layer is not None else ""
        raise ExportError(
            f"{worst.op} '{worst.name}'{where} reaches {worst.largest:.3g}, and fp16 ends at 65504",
            "nothing was written; this model cannot be computed in fp16 as it is",
        )


def _notice(checkpoint: Checkpoint) -> str:
    notice = checkpoint.provenance.get("notice", "")
    return f"{checkpoint.name}: weights licensed under {checkpoint.license}.\n{notice}\n".rstrip() + "\n"


def _json(value: Any) -> bytes:
    return msgspec.json.format(msgspec.json.encode(value, order="sorted"), indent=1) + b"\n"


def _cost(ran: Ran) -> dict[str, Any]:
    return {
        "name": ran.name,
        "cached": ran.cached,
        "seconds": round(ran.seconds, 1),
        "peak_bytes": ran.peak_bytes,
    }


def _speed(folder: Path) -> list[Speed]:
    from mobile_export.latency.host import measure

    with console.step("speed on this host"):
        return measure(folder)
