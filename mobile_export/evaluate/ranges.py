"""How much of fp16's range each op of a program uses."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from mobile_export.evaluate.program import Site

if TYPE_CHECKING:
    import torch

LIMIT = 65504.0
"""The largest finite fp16 value (IEEE 754 binary16)."""
_LAYER = re.compile(r"layers_(\d+)")


class OpRange(NamedTuple):
    op: str
    """The op's type."""
    name: str
    layer: int | None
    """From the op's name; None when it names no layer."""
    function: str
    largest: float
    """|value| over all runs; infinite when the op itself made a value that is not finite."""
    share: float
    """`largest / 65504`."""


class Ranges:
    """A tap of `Evaluator.run`: the largest |value| of every output that is declared fp16.

    What is not finite counts against the op that made it, not against those that hand it on (a mask
    of -inf, or all that follows an overflow): these count with their finite values.
    """

    def __init__(self) -> None:
        self._largest: dict[tuple[str, str, str], float] = {}

    def __call__(self, site: Site, arguments: Mapping[str, Any], value: torch.Tensor) -> None:
        if site.dtype != "fp16" or value.numel() == 0:
            return
        low, high = (bound.item() for bound in value.aminmax())
        largest = max(-low, high)
        if not math.isfinite(largest):
            largest = _finite(value) if _handed_on(arguments.values()) else math.inf
        key = (site.function, site.op, site.name)
        self._largest[key] = max(largest, self._largest.get(key, 0.0))

    def all(self) -> list[OpRange]:
        """In the order of the program."""
        return [
            OpRange(op, name, _layer(name), function, largest, largest / LIMIT)
            for (function, op, name), largest in self._largest.items()
        ]

    def worst(self, count: int) -> list[OpRange]:
        """The `count` largest, largest first."""
        return sorted(self.all(), key=lambda one: -one.largest)[:count]

    def overflowing(self) -> list[OpRange]:
        """Past 65504 or not finite, in the order of the program."""
        return [one for one in self.all() if one.largest > LIMIT]


def _handed_on(arguments: Iterable[Any]) -> bool:
    import torch

    for one in arguments:
        for value in one if isinstance(one, list) else [one]:
            if isinstance(value, float) and not math.isfinite(value):
                return True
            if isinstance(value, torch.Tensor) and not value.isfinite().all():
                return True
    return False


def _finite(value: torch.Tensor) -> float:
    return value.nan_to_num(0.0, 0.0, 0.0).abs().max().item()


def _layer(name: str) -> int | None:
    found = _LAYER.search(name)
    return int(found.group(1)) if found else None
