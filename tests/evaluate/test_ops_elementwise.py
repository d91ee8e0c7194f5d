"""Arithmetic, comparison, activations and casts against numpy and torch."""

import math

import numpy as np
import pytest
import torch.nn.functional as F
from cases import Case, binary, bits, check, check_inference, real, torched, unary, whole

ERF = np.vectorize(math.erf)
CASES = [
    unary("abs", np.abs),
    unary("acos", np.arccos, -0.99, 0.99),
    unary("asin", np.arcsin, -0.99, 0.99),
    unary("atan", np.arctan),
    unary("atanh", np.arctanh, -0.99, 0.99),
    unary("ceil", np.ceil),
    unary("cos", np.cos),
    unary("cosh", np.cosh),
    unary("erf", ERF),
    unary("exp", np.exp),
    unary("exp2", np.exp2),
    unary("floor", np.floor),
    unary("relu", lambda x: np.maximum(x, 0)),
    unary("relu6", lambda x: np.clip(x, 0, 6), -9, 9),
    unary("round", np.round),
    unary("sigmoid", lambda x: 1 / (1 + np.exp(-x))),
    unary("sign", np.sign),
    unary("silu", lambda x: x / (1 + np.exp(-x)), inferred=False),
    unary("sin", np.sin),
    unary("sinh", np.sinh),
    unary("softplus", lambda x: np.log1p(np.exp(x))),
    unary("softsign", lambda x: x / (1 + np.abs(x))),
    unary("sqrt", np.sqrt, 0, 9),
    unary("square", np.square),
    unary("tan", np.tan, -1, 1),
    unary("tanh", np.tanh),
    unary("identity", lambda x: x),
    Case(
        "round",
        {"x": np.float32([-1.5, -0.5, 0.5, 1.5, 2.5])},
        lambda x: np.float32([-2, 0, 0, 2, 2]),
        tag="half",
    ),
    Case("sign", {"x": np.float32([-2, 0, 3])}, lambda x: np.float32([-1, 0, 1]), tag="zero"),
    Case("abs", {"x": whole(5)}, np.abs, tag="int"),
    Case("logical_not", {"x": bits(2, 5)}, np.logical_not),
    Case("inverse", {"x": real(2, 3, low=0.001, high=1)}, lambda x: 1 / (x + 1e-4)),
    Case(
        "inverse",
        {"x": real(2, 3, low=0.1)},
        lambda x: 1 / (x + 0.5),
        {"epsilon": np.float32(0.5)},
        "epsilon",
    ),
    Case("rsqrt", {"x": np.float32([0, 1e-12, 2])}, lambda x: 1 / np.sqrt(x + 1e-12)),
    Case(
        "rsqrt",
        {"x": np.float32([0, 2])},
        lambda x: 1 / np.sqrt(x + 0.25),
        {"epsilon": np.float32(0.25)},
        "epsilon",
    ),
    Case("log", {"x": real(6, low=0.01)}, np.log),
    Case("log", {"x": real(6, low=0.0)}, lambda x: np.log(x + 0.5), {"epsilon": np.float32(0.5)}, "epsilon"),
    Case(
        "clip", {"x": real(9)}, lambda x: np.clip(x, -1, 2), {"alpha": np.float32(-1), "beta": np.float32(2)}
    ),
    Case("threshold", {"x": real(9)}, lambda x: np.maximum(x, 0.5), {"alpha": np.float32(0.5)}),
    Case("thresholded_relu", {"x": real(9)}, lambda x: np.where(x >= 0.5, x, 0), {"alpha": np.float32(0.5)}),
    Case("gelu", {"x": real(9)}, lambda x: 0.5 * x * (1 + ERF(x / np.sqrt(2)))),
    Case(
        "gelu",
        {"x": real(9)},
        torched(lambda x: F.gelu(x, approximate="tanh")),
        {"mode": "TANH_APPROXIMATION"},
        "tanh",
    ),
    Case(
        "gelu",
        {"x": real(9)},
        lambda x: x / (1 + np.exp(-1.702 * x)),
        {"mode": "SIGMOID_APPROXIMATION"},
        "sigmoid",
    ),
    Case("leaky_relu", {"x": real(9)}, torched(lambda x: F.leaky_relu(x, 0.25)), {"alpha": np.float32(0.25)}),
    Case("elu", {"x": real(9)}, torched(lambda x: F.elu(x, 0.5)), {"alpha": np.float32(0.5)}),
    Case(
        "clamped_relu",
        {"x": real(9)},
        lambda x: np.minimum(np.where(x >= 0, x, 0.5 * x), 1),
        {"alpha": np.float32(0.5), "beta": np.float32(1)},
    ),
    Case(
        "linear_activation",
        {"x": real(9)},
        lambda x: 2 * x + 3,
        {"alpha": np.float32(2), "beta": np.float32(3)},
    ),
    Case(
        "scaled_tanh",
        {"x": real(9)},
        lambda x: 2 * np.tanh(0.5 * x),
        {"alpha": np.float32(2), "beta": np.float32(0.5)},
    ),
    Case(
        "sigmoid_hard",
        {"x": real(9)},
        lambda x: np.clip(0.2 * x + 0.5, 0, 1),
        {"alpha": np.float32(0.2), "beta": np.float32(0.5)},
    ),
    Case(
        "prelu",
        {"x": real(1, 3, 2, 2)},
        lambda x: np.where(x > 0, x, x * np.float32([0.1, 0.2, 0.3])[:, None, None]),
        {"alpha": np.float32([0.1, 0.2, 0.3])},
    ),
    binary("add", np.add),
    binary("sub", np.subtract),
    binary("mul", np.multiply),
    binary("real_div", np.divide),
    binary("floor_div", np.floor_divide),
    binary("mod", np.mod),
    binary("maximum", np.maximum),
    binary("minimum", np.minimum),
    binary("less", np.less),
    binary("greater", np.greater),
    Case("pow", {"x": real(2, 1, 4, low=0.1), "y": real(3, 1)}, np.power),
    Case(
        "floor_div",
        {"x": np.int32([-7, 7, -7]), "y": np.int32([2, -2, -2])},
        lambda x, y: np.int32([-4, -4, 3]),
        tag="int",
    ),
    Case(
        "mod",
        {"x": np.int32([-7, 7, -7]), "y": np.int32([3, -3, -3])},
        lambda x, y: np.int32([2, -2, -1]),
        tag="int",
    ),
    Case(
        "add",
        {"x": np.int32([2**31 - 1]), "y": np.int32([1])},
        lambda x, y: np.int32([-(2**31)]),
        tag="wraps",
    ),
    *(
        Case(op, {"x": whole(3, 1, low=0, high=3), "y": whole(4, low=0, high=3)}, function, tag="int")
        for op, function in {
            "equal": np.equal,
            "not_equal": np.not_equal,
            "less_equal": np.less_equal,
            "greater_equal": np.greater_equal,
            "mul": np.multiply,
            "maximum": np.maximum,
        }.items()
    ),
    *(
        Case(op, {"x": bits(3, 1), "y": bits(1, 4)}, function)
        for op, function in {
            "logical_and": np.logical_and,
            "logical_or": np.logical_or,
            "logical_xor": np.logical_xor,
        }.items()
    ),
    Case("select", {"cond": bits(3, 4), "a": real(3, 4), "b": real(3, 4)}, np.where),
    Case(
        "cast",
        {"x": np.float32([-2.7, -0.5, 0.5, 2.7])},
        lambda x: np.int32([-2, 0, 0, 2]),
        {"dtype": "int32"},
    ),
    Case(
        "cast",
        {"x": np.float32([-1, 0, 2])},
        lambda x: np.array([True, False, True]),
        {"dtype": "bool"},
        "bool",
    ),
    Case("cast", {"x": bits(7)}, lambda x: x.astype(np.float32), {"dtype": "fp32"}, "bool-fp32"),
    Case("cast", {"x": np.int32([-3, 7])}, lambda x: np.float32([-3, 7]), {"dtype": "fp32"}, "int-fp32"),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_an_op(case, evaluate):
    check(case, evaluate)


@pytest.mark.parametrize("case", [case for case in CASES if case.inferred], ids=str)
def test_coremltools_agrees(case):
    check_inference(case)


@pytest.mark.parametrize(("kind", "low", "high"), [("int8", -128, 127), ("uint8", 0, 255)])
@pytest.mark.parametrize("axis", [None, 1, -1])
def test_quantize_and_dequantize(evaluate, kind, low, high, axis):
    from coremltools.converters.mil import Builder as mb

    x = real(2, 3, 3, low=-40, high=40)
    shape = {None: (), 1: (3, 1), -1: (3,)}[axis]
    scale = np.float32(0.25) if axis is None else real(3, low=0.1, high=0.3)
    zero = whole(*(() if axis is None else (3,)), low=3, high=9).astype(kind)
    extra = {} if axis is None else {"axis": axis}

    def body(x):
        codes = mb.quantize(input=x, scale=scale, zero_point=zero, output_dtype=kind, **extra)
        back = mb.dequantize(input=codes, scale=scale, zero_point=zero, **extra)
        plain = mb.quantize(input=x, scale=scale, output_dtype=kind, **extra)
        return mb.cast(x=codes, dtype="int32"), back, mb.dequantize(input=plain, scale=scale, **extra)

    codes, back, plain = evaluate(body, [x])
    wide, point = np.reshape(scale, shape), np.reshape(zero.astype(np.float32), shape)
    expected = np.clip(np.round(x / wide) + point, low, high)
    np.testing.assert_array_equal(codes, expected)
    np.testing.assert_allclose(back, wide * (expected - point), rtol=1e-6)
    np.testing.assert_allclose(plain, wide * np.clip(np.round(x / wide), low, high), rtol=1e-6)
