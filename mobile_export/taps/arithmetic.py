"""What each form of the model computes otherwise than the program it was made of, and may."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mobile_export.taps.points import Point

if TYPE_CHECKING:
    from torch import Tensor

FP32, FP16, INT8 = 1e-4, 2e-3, 2e-2
"""Relative errors that a value may have for being computed or kept in that type."""


@dataclass(frozen=True)
class Plain:
    """Everything in one type; a KV cache perhaps in another."""

    type: float = FP32
    cache: float = 0.0

    def floor(self, point: Point) -> float:
        """The type's, and after the cache that of the cache."""
        cached = point.place.kind in ("self_attn.keys", "self_attn.attention")
        return max(self.type, self.cache) if cached else self.type

    def simulate(self, point: Point, args: tuple[Any, ...]) -> Tensor | None:
        """As the program."""
        return None


@dataclass(frozen=True)
class Int8Activations(Plain):
    """Products of int8 codes with activations that are rounded to int8 as they come."""

    block: int | None = None
    """Columns that share a scale, symmetric; None: a token's own scale and zero point."""

    def simulate(self, point: Point, args: tuple[Any, ...]) -> Tensor | None:
        """A product of the rounded operand."""
        if point.role != "product":
            return None
        operand, *weight = args
        rounded = _per_token(operand) if self.block is None else _per_block(operand, self.block)
        return point.node.target(rounded, *weight)  # type: ignore[operator]


@dataclass(frozen=True)
class Int8Weights(Plain):
    """Weights rounded to int8, a scale for each row; `nearest` is the most that any rounding may cost."""

    def simulate(self, point: Point, args: tuple[Any, ...]) -> Tensor | None:
        """The operator of the rounded weight."""
        if point.role not in ("product", "embedding"):
            return None
        from mobile_export.passes.rounding import quantize_per_channel

        at = 1 if point.role == "product" else 0
        codes, scales = quantize_per_channel(args[at].detach())
        rounded = codes.float() * scales[:, None]
        return point.node.target(*args[:at], rounded, *args[at + 1 :])  # type: ignore[operator]


def _per_token(x: Tensor) -> Tensor:
    """Asymmetric int8, by row."""
    low, high = x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True).clamp(min=0)
    scale = ((high - low) / 255).clamp(min=1e-30)
    return (x / scale).round() * scale


def _per_block(x: Tensor, most: int) -> Tensor:
    """Symmetric int8, by the blocks of columns that a width allows."""
    blocks = x.unflatten(-1, (-1, math.gcd(x.shape[-1], most)))
    scale = (blocks.abs().amax(-1, keepdim=True) / 127).clamp(min=1e-30)
    return ((blocks / scale).round() * scale).flatten(-2)
