"""Which shapes a function's inputs may take: Core ML refuses others before the program runs."""

from __future__ import annotations

from typing import Any, NamedTuple

from mobile_export.mlpackage import Package


class Allowed(NamedTuple):
    """Shapes of one input. Both empty: what the program declares is all there is to say."""

    listed: tuple[tuple[int, ...], ...] = ()
    ranges: tuple[tuple[int, int], ...] = ()
    """Smallest and largest size of each dimension; -1 is no largest."""

    def holds(self, shape: tuple[int, ...]) -> bool:
        if self.listed:
            return shape in self.listed
        if not self.ranges:
            return True
        return len(shape) == len(self.ranges) and all(
            low <= size and (high < 0 or size <= high)
            for size, (low, high) in zip(shape, self.ranges, strict=True)
        )

    def __str__(self) -> str:
        if self.listed:
            return " or ".join(str(list(shape)) for shape in self.listed)
        sizes = (
            str(low) if low == high else f"{low}..{'' if high < 0 else high}" for low, high in self.ranges
        )
        return f"[{', '.join(sizes)}]"


def allowed(package: Package, function: str) -> dict[str, Allowed]:
    """By input's name, from the model's description."""
    description = package.spec.description
    if description.functions:
        description = next((one for one in description.functions if one.name == function), description)
    return {one.name: _of(one.type.multiArrayType) for one in description.input}


def _of(kind: Any) -> Allowed:
    which = kind.WhichOneof("ShapeFlexibility")
    if which == "enumeratedShapes":
        return Allowed(listed=tuple(tuple(one.shape) for one in kind.enumeratedShapes.shapes))
    if which == "shapeRange":
        sizes = kind.shapeRange.sizeRanges
        return Allowed(ranges=tuple((one.lowerBound, one.upperBound) for one in sizes))
    return Allowed()
