"""A `.pte`'s values in ExecuTorch's own runtime: a copy of the program gives them as outputs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from mobile_export.recipe import Recipe
from mobile_export.taps.arithmetic import FP16, FP32, INT8, Int8Activations, Plain
from mobile_export.taps.points import Call, Point, Values
from mobile_export.taps.pte import tap

_CACHE = {"fp32": FP32, "fp16": FP16, "int8": INT8}


def arithmetic(recipe: Recipe) -> Plain:
    """Products take activations that are rounded to int8 token by token."""
    options = recipe.executorch
    return Int8Activations(FP32, _CACHE[options.kv_cache], mlp_parts=options.mlp_parts)


def values(artifact: Path, points: Sequence[Point], calls: Sequence[Call], recipe: Recipe) -> list[Values]:
    """By call, of `forward`, the method that devices run."""
    import torch

    from mobile_export.targets import executorch

    seen: list[Values] = []
    with TemporaryDirectory() as folder:
        copy = Path(folder, artifact.name)
        outputs = tap(artifact, copy, max(len(call.tokens) for call in calls))
        method = executorch.open(copy).program.load_method("forward")
        for call in calls:
            made = method.execute((torch.tensor([list(call.tokens)]), torch.tensor([call.start])))
            seen.append(
                {
                    point.place: torch.cat(
                        [made[at].float()[0].flatten(1) for at in outputs[point.role, point.index]], 1
                    )
                    for point in points
                    if (point.role, point.index) in outputs
                }
            )
    return seen
