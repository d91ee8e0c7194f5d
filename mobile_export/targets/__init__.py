"""The targets. Each is a module here, found by its name.

`write(program, recipe, checkpoint, draft) -> Lowered` puts the artefact into a bundle;
`open(artifact, threads=1) -> Runner` executes it.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mobile_export.errors import ExportError

if TYPE_CHECKING:
    from pathlib import Path

    from mobile_export.manifest import Contract, Runtime
    from mobile_export.recipe import Recipe

PLATFORMS = {"android": "executorch", "ios": "coreml", "onnx": "onnx"}
"""The target of each platform."""


SOLO_BLAS = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
"""Environment, set before torch is imported, of a process that runs artefacts and no torch model:
runtimes that call torch's BLAS from threads of their own then do not wait for a second pool."""


def target(name: str) -> Any:
    """The target's module, e.g. `executorch`."""
    return importlib.import_module(f"mobile_export.targets.{name}")


def runners(name: str, artifact: Path, runtime: str | None = None) -> Iterator[tuple[str, Any]]:
    """Stage and runner, one at a time: `artifact`, or one for each arithmetic that the target tells apart.

    `runtime` `coreml` adds Core ML itself, `artifact device`.
    """
    if runtime and name != runtime:
        raise ExportError(
            f"a bundle of {name} does not run in {runtime}", "name a bundle that `ios` exported"
        )
    module = target(name)
    arithmetics = getattr(module, "ARITHMETICS", ())
    for arithmetic in arithmetics:
        yield f"artifact {arithmetic}", module.open(artifact, arithmetic=arithmetic)
    if not arithmetics:
        yield "artifact", module.open(artifact)
    if runtime:
        yield "artifact device", target(f"{runtime}_device").open(artifact)


def need_int8(recipe: Recipe, runtime: str) -> None:
    """ExportError for a recipe whose weights are others than the codes that all runtimes share."""
    asked = recipe.quantize.weights
    if asked != "int8":
        raise ExportError(
            f"{runtime} bundles take int8 weights, and recipe '{recipe.name}' asks for {asked}",
            "export it with `mobile-export onnx`, or use another recipe",
        )


@dataclass(frozen=True)
class Lowered:
    """What a target wrote, for the manifest."""

    artifact: Path
    runtime: Runtime
    io: Contract
    tools: tuple[str, ...]
    """Packages that shaped the artefact's bytes."""
