"""Products and what reduces along dimensions: linear, attention, reductions, norms.

Each function is an op of the MIL reference, parameters by their names there.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.linear(x, weight, bias)


def matmul(x: Tensor, y: Tensor, transpose_x: bool = False, transpose_y: bool = False) -> Tensor:
    return torch.matmul(x.mT if transpose_x and x.ndim > 1 else x, y.mT if transpose_y and y.ndim > 1 else y)


def einsum(values: list[Tensor], equation: str) -> Tensor:
    return torch.einsum(equation, *values)


def conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    strides: list[int] | None = None,
    pad_type: Literal["valid", "custom"] = "valid",
    pad: list[int] | None = None,
    dilations: list[int] | None = None,
    groups: int = 1,
) -> Tensor:
    if pad_type == "custom" and pad and any(pad):
        pairs = zip(pad[0::2], pad[1::2], strict=True)
        x = F.pad(x, [size for pair in reversed(list(pairs)) for size in pair])
    run = (F.conv1d, F.conv2d, F.conv3d)[x.ndim - 3]
    return run(x, weight, bias, stride=strides or 1, dilation=dilations or 1, groups=groups)


def scaled_dot_product_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None
) -> Tensor:
    """`softmax(q k^T / sqrt(E) + mask) v`; a bool mask keeps where it is true. q [..., L, E]."""
    scores = query @ key.mT / math.sqrt(query.shape[-1])
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, -math.inf)
    elif attn_mask is not None:
        scores = scores + attn_mask
    return scores.softmax(-1) @ value


def softmax(x: Tensor, axis: int = -1) -> Tensor:
    return x.softmax(axis)


def layer_norm(
    x: Tensor,
    axes: list[int] | None = None,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    epsilon: float = 1e-5,
) -> Tensor:
    chosen = _axes(x, axes)
    shape = [size if index in chosen else 1 for index, size in enumerate(x.shape)]
    centred = x - x.mean(chosen, keepdim=True)
    result = centred / (centred.square().mean(chosen, keepdim=True) + epsilon).sqrt()
    if gamma is not None:
        result = result * gamma.reshape(shape)
    return result if beta is None else result + beta.reshape(shape)


def batch_norm(
    x: Tensor,
    mean: Tensor,
    variance: Tensor,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    epsilon: float = 1e-5,
) -> Tensor:
    return F.batch_norm(x, mean, variance, gamma, beta, eps=epsilon)


def instance_norm(
    x: Tensor, gamma: Tensor | None = None, beta: Tensor | None = None, epsilon: float = 1e-5
) -> Tensor:
    return F.instance_norm(x, weight=gamma, bias=beta, eps=epsilon)


def l2_norm(x: Tensor, epsilon: float = 1e-6) -> Tensor:
    """Over the last three dimensions."""
    return x / (x.square().sum((-3, -2, -1), keepdim=True) + epsilon).sqrt()


def _reduction(
    function: Callable[[Tensor, list[int], bool], Tensor],
) -> Callable[[Tensor, list[int] | None, bool], Tensor]:
    def run(x: Tensor, axes: list[int] | None = None, keep_dims: bool = False) -> Tensor:
        return function(x, _axes(x, axes), keep_dims)

    return run


def _mean(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    return x.double().mean(axes, keep) if not x.is_floating_point() else x.mean(axes, keep)


def _prod(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    for axis in sorted(axes, reverse=True):
        x = x.prod(axis, keep)
    return x


def reduce_argmax(
    x: Tensor, axis: int = -1, keep_dims: bool = False, output_dtype: Literal["int32", "uint16"] = "int32"
) -> Tensor:
    return x.argmax(axis, keep_dims)


def reduce_argmin(
    x: Tensor, axis: int = -1, keep_dims: bool = False, output_dtype: Literal["int32", "uint16"] = "int32"
) -> Tensor:
    return x.argmin(axis, keep_dims)


def cumsum(x: Tensor, axis: int = 0, exclusive: bool = False, reverse: bool = False) -> Tensor:
    x = x.flip(axis) if reverse else x
    if exclusive:
        x = torch.cat((torch.zeros_like(x.narrow(axis, 0, 1)), x.narrow(axis, 0, x.shape[axis] - 1)), axis)
    result = x.cumsum(axis)
    return result.flip(axis) if reverse else result


def _axes(x: Tensor, axes: list[int] | None) -> list[int]:
    return [axis % x.ndim for axis in axes] if axes is not None else list(range(x.ndim))


REDUCTIONS: dict[str, Callable[[Tensor, list[int], bool], Tensor]] = {
    "l1_norm": lambda x, axes, keep: x.abs().sum(axes, keep),
    "l2_norm": lambda x, axes, keep: x.square().sum(axes, keep).sqrt(),
    "log_sum": lambda x, axes, keep: x.sum(axes, keep).log(),
    "log_sum_exp": lambda x, axes, keep: x.logsumexp(axes, keep),
    "max": lambda x, axes, keep: x.amax(axes, keep),
    "mean": _mean,
    "min": lambda x, axes, keep: x.amin(axes, keep),
    "prod": _prod,
    "sum": lambda x, axes, keep: x.sum(axes, keep),
    "sum_square": lambda x, axes, keep: x.square().sum(axes, keep),
}

NAMED = (
    linear,
    matmul,
    einsum,
    conv,
    scaled_dot_product_attention,
    softmax,
    layer_norm,
    batch_norm,
    instance_norm,
    l2_norm,
    reduce_argmax,
    reduce_argmin,
    cumsum,
)

OPS: dict[str, Callable[..., Tensor]] = {
    **{f"reduce_{name}": _reduction(function) for name, function in REDUCTIONS.items()},
    **{function.__name__: function for function in NAMED},
}
