"""What each form of the model computes otherwise than the program it was made of, and may."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mobile_export.taps.points import Point

if TYPE_CHECKING:
    from torch import Tensor

_ROWS = 8192
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
    """Products of codes with activations that are rounded to int8 as they come."""

    block: int | None = None
    """Columns that share a scale, symmetric, unless the weight has groups of its own; None: a token's own
    scale and zero point."""
    mlp_parts: int = 1
    """Of what down_proj reads, each with a scale and zero point of its own."""

    def simulate(self, point: Point, args: tuple[Any, ...]) -> Tensor | None:
        """A product of the rounded operand."""
        if point.role != "product":
            return None
        operand, *weight = args
        scales = weight[1]
        block = operand.shape[-1] // scales.shape[1] if scales.dim() == 2 else self.block
        if block is not None:
            rounded = _per_block(operand, block)
        else:
            cut = point.place.kind == "mlp.down_proj" and operand.shape[-1] % self.mlp_parts == 0
            rounded = _per_token(operand.unflatten(-1, (self.mlp_parts if cut else 1, -1))).flatten(-2)
        return point.node.target(rounded, *weight)  # type: ignore[operator]


@dataclass(frozen=True)
class RoundedWeights(Plain):
    """Weights rounded to int8, a scale for each row, or all but the head to int4 in groups of columns;
    to the nearest code, the most that any rounding may cost."""

    group: int | None = None

    def simulate(self, point: Point, args: tuple[Any, ...]) -> Tensor | None:
        """The operator of the rounded weight."""
        if point.role not in ("product", "embedding"):
            return None
        import torch

        if point.role == "embedding":
            weight, ids = args[:2]
            return _nearest(weight.detach()[ids[0]], None)[None]
        operand, weight, *bias = args
        linear = torch.nn.functional.linear
        group = None if point.place.kind == "lm_head" else self.group
        parts = [linear(operand, _nearest(part, group)) for part in weight.detach().split(_ROWS)]
        product = torch.cat(parts, -1)  # in parts: the head's weight is a quarter of the model
        return product if not bias or bias[0] is None else product + bias[0]


def _nearest(weight: Tensor, group: int | None) -> Tensor:
    """Rows rounded to int8, each with its own scale, or to int4 in groups of columns."""
    from mobile_export.passes.rounding import quantize_per_channel, quantize_per_group

    if group:
        codes, scales = quantize_per_group(weight, group)
        return codes.float() * scales.repeat_interleave(group, 1)
    codes, scales = quantize_per_channel(weight)
    return codes.float() * scales[:, None]


def _per_token(x: Tensor) -> Tensor:
    """Asymmetric int8, by the last dimension."""
    low, high = x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True).clamp(min=0)
    scale = ((high - low) / 255).clamp(min=1e-30)
    return (x / scale).round() * scale


def _per_block(x: Tensor, most: int) -> Tensor:
    """Symmetric int8, by the blocks of columns that a width allows."""
    blocks = x.unflatten(-1, (-1, math.gcd(x.shape[-1], most)))
    scale = (blocks.abs().amax(-1, keepdim=True) / 127).clamp(min=1e-30)
    return ((blocks / scale).round() * scale).flatten(-2)
