"""Every op that the evaluator knows, by its type in the program."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mobile_export.evaluate import ops_elementwise, ops_gather, ops_linear, ops_shape

OPS: dict[str, Callable[..., Any]] = {
    **ops_elementwise.OPS,
    **ops_linear.OPS,
    **ops_shape.OPS,
    **ops_gather.OPS,
}

# Outputs that may be inputs' memory (`x`, `values`); all others are new.
VIEWS = {*ops_shape.OPS, "gather", "gather_along_axis", "gather_nd", "identity", "cast"}
# Outputs that are inputs' values, moved: rounding them again changes nothing.
MOVES = {*ops_shape.OPS, "gather", "gather_along_axis", "gather_nd", "identity"} - {"pad", "range_1d"}
