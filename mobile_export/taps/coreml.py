"""A package's values, by the evaluator's tap: the saved ops themselves, in fp16."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mobile_export.evaluate.program import Site
from mobile_export.recipe import Recipe
from mobile_export.taps.arithmetic import FP16, Plain
from mobile_export.taps.points import Call, Point, Role, Values

if TYPE_CHECKING:
    from torch import Tensor


def arithmetic(recipe: Recipe) -> Plain:
    """Every op's result is fp16."""
    return Plain(FP16)


def values(artifact: Path, points: Sequence[Point], calls: Sequence[Call], recipe: Recipe) -> list[Values]:
    """By call, of the functions an application runs."""
    from mobile_export.targets import coreml

    runner = coreml.open(artifact, arithmetic="fp16")
    seen: list[Values] = []
    for call in calls:
        runner.tap = tap = _Tap()
        runner.last_logits(call.tokens, call.start)
        count = len(call.tokens)  # a chunk is padded
        made = {point.place: tap.found.get((point.role, point.index)) for point in points}
        seen.append({place: value[:count] for place, value in made.items() if value is not None})
    return seen


class _Tap:
    """Values [rows, width] by role and number, in the order of the program."""

    def __init__(self) -> None:
        self.found: dict[tuple[Role, int], Tensor] = {}
        self.counts: dict[Role, int] = {}

    def __call__(self, site: Site, arguments: Mapping[str, Any], value: Tensor) -> None:
        if site.op == "linear":
            self.found["operand", self.counts.get("product", -1) + 1] = arguments["x"][0].clone()
            self._add("product", value)
        elif site.op == "gather" and site.name == "embedding":
            self._add("embedding", value)
        elif site.op == "add" and "residual" in site.name:
            self._add("sum", value)
        elif site.op == "slice_update" and "key_cache" in site.name:
            self._add("keys", arguments["update"].transpose(1, 2).flatten(2))

    def _add(self, role: Role, value: Tensor) -> None:
        number = self.counts[role] = self.counts.get(role, -1) + 1
        self.found[role, number] = value[0].clone()
