"""The passes, in the order they run. Adding one is a file here and a line in `PASSES`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mobile_export.passes import runner
from mobile_export.passes.quantize import Quantize
from mobile_export.passes.rotate import Rotate
from mobile_export.passes.runner import Passed
from mobile_export.passes.trace import Trace

if TYPE_CHECKING:
    from mobile_export.recipe import Recipe
    from mobile_export.types import Checkpoint

PASSES: tuple[runner.Pass, ...] = (Trace(), Rotate(), Quantize())


def run(checkpoint: Checkpoint, recipe: Recipe, *, last: str | None = None, use_cache: bool = True) -> Passed:
    """Run the passes up to `last`; see `runner.run`."""
    return runner.run(checkpoint, recipe, PASSES, last=last, use_cache=use_cache)
