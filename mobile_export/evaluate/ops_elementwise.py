"""Element by element: arithmetic, comparison, activations, casts.

Each function is an op of the MIL reference, parameters by their names there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Dtype = Literal["fp16", "fp32", "int8", "uint8", "int16", "uint16", "int32", "bool"]


def _unary(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def run(x: Tensor) -> Tensor:
        return function(x)

    return run


def _binary(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    def run(x: Tensor, y: Tensor) -> Tensor:
        return function(x, y)

    return run


def inverse(x: Tensor, epsilon: float = 1e-4) -> Tensor:
    return (x + epsilon).reciprocal()


def rsqrt(x: Tensor, epsilon: float = 1e-12) -> Tensor:
    return (x + epsilon).rsqrt()


def log(x: Tensor, epsilon: float = 1e-45) -> Tensor:
    return (x + epsilon).log()


def clip(x: Tensor, alpha: float, beta: float) -> Tensor:
    return x.clamp(alpha, beta)


def threshold(x: Tensor, alpha: float) -> Tensor:
    return x.clamp(min=alpha)


def thresholded_relu(x: Tensor, alpha: float) -> Tensor:
    return x.where(x >= alpha, 0)


def gelu(
    x: Tensor, mode: Literal["EXACT", "TANH_APPROXIMATION", "SIGMOID_APPROXIMATION"] = "EXACT"
) -> Tensor:
    if mode == "SIGMOID_APPROXIMATION":
        return x * (1.702 * x).sigmoid()
    return F.gelu(x, approximate="none" if mode == "EXACT" else "tanh")


def leaky_relu(x: Tensor, alpha: float) -> Tensor:
    return x.where(x >= 0, alpha * x)


def elu(x: Tensor, alpha: float) -> Tensor:
    return x.where(x > 0, alpha * x.expm1())


def clamped_relu(x: Tensor, alpha: float, beta: float) -> Tensor:
    return leaky_relu(x, alpha).clamp(max=beta)


def linear_activation(x: Tensor, alpha: float, beta: float) -> Tensor:
    return alpha * x + beta


def scaled_tanh(x: Tensor, alpha: float, beta: float) -> Tensor:
    return alpha * (beta * x).tanh()


def sigmoid_hard(x: Tensor, alpha: float, beta: float) -> Tensor:
    return (alpha * x + beta).clamp(0, 1)


def prelu(x: Tensor, alpha: Tensor) -> Tensor:
    return F.prelu(x, alpha)


def softplus(x: Tensor) -> Tensor:
    return torch.logaddexp(x, torch.zeros(()))


def real_div(x: Tensor, y: Tensor) -> Tensor:
    return x / y


def select(cond: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return torch.where(cond, a, b)


def cast(x: Tensor, dtype: Dtype) -> Tensor:
    """To integers towards zero, past their range to its end. The declared type does the rest."""
    if dtype in ("fp16", "fp32"):
        return x.float()
    if dtype == "bool":
        return x.bool()
    return x.double().trunc().clamp(-(2**31), 2**31 - 1).to(torch.int32) if x.is_floating_point() else x.int()


def quantize(
    input: Tensor,
    scale: Tensor,
    output_dtype: Literal["int8", "uint8"],
    zero_point: Tensor | None = None,
    axis: int | None = None,
) -> Tensor:
    """`round(input / scale) + zero_point`, ties to even, clipped to the type; by channel along `axis`."""
    low, high = (-128, 127) if output_dtype == "int8" else (0, 255)
    codes = (input / _along(scale, input, axis)).round()
    return (codes if zero_point is None else codes + _along(zero_point, input, axis)).clamp(low, high)


def dequantize(
    input: Tensor, scale: Tensor, zero_point: Tensor | None = None, axis: int | None = None
) -> Tensor:
    """`scale * (input - zero_point)`, by channel along `axis`."""
    shifted = input if zero_point is None else input - _along(zero_point, input, axis)
    return shifted * _along(scale, input, axis)


def _along(values: Tensor, x: Tensor, axis: int | None) -> Tensor:
    if axis is None:
        return values
    return values.reshape([-1 if at == axis % x.ndim else 1 for at in range(x.ndim)])


def identity(x: Tensor) -> Tensor:
    return x


UNARY: dict[str, Callable[[Tensor], Tensor]] = {
    "abs": torch.abs,
    "acos": torch.acos,
    "asin": torch.asin,
    "atan": torch.atan,
    "atanh": torch.atanh,
    "ceil": torch.ceil,
    "cos": torch.cos,
    "cosh": torch.cosh,
    "erf": torch.erf,
    "exp": torch.exp,
    "exp2": torch.exp2,
    "floor": torch.floor,
    "logical_not": torch.logical_not,
    "relu": F.relu,
    "relu6": F.relu6,
    "round": torch.round,
    "sigmoid": torch.sigmoid,
    "sign": torch.sign,
    "silu": F.silu,
    "sin": torch.sin,
    "sinh": torch.sinh,
    "softsign": F.softsign,
    "sqrt": torch.sqrt,
    "square": torch.square,
    "tan": torch.tan,
    "tanh": torch.tanh,
}

BINARY: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "add": torch.add,
    "equal": torch.eq,
    "floor_div": torch.floor_divide,
    "greater": torch.gt,
    "greater_equal": torch.ge,
    "less": torch.lt,
    "less_equal": torch.le,
    "logical_and": torch.logical_and,
    "logical_or": torch.logical_or,
    "logical_xor": torch.logical_xor,
    "maximum": torch.maximum,
    "minimum": torch.minimum,
    "mod": torch.remainder,
    "mul": torch.mul,
    "not_equal": torch.ne,
    "pow": torch.pow,
    "sub": torch.sub,
}

NAMED = (
    inverse,
    rsqrt,
    log,
    clip,
    threshold,
    thresholded_relu,
    gelu,
    leaky_relu,
    elu,
    clamped_relu,
    linear_activation,
    scaled_tanh,
    sigmoid_hard,
    prelu,
    softplus,
    real_div,
    select,
    cast,
    quantize,
    dequantize,
    identity,
)

OPS: dict[str, Callable[..., Tensor]] = {
    **{name: _unary(function) for name, function in UNARY.items()},
    **{name: _binary(function) for name, function in BINARY.items()},
    **{function.__name__: function for function in NAMED},
}
