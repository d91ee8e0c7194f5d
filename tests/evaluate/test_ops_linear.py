"""Products, attention, reductions and norms against numpy and torch."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cases import Case, check, check_inference, real, torched, whole

WEIGHT, BIAS = real(4, 5), real(4)
GAMMA, BETA, MEAN, VARIANCE = (torch.rand(size) for size in (4, 4, 3, 3))
POINT, POINT_BIAS, CAUSAL_KERNEL, KERNEL = (
    torch.rand(3, 5, 1, 1),
    torch.rand(3),
    torch.rand(4, 1, 3),
    torch.rand(3, 2, 2, 3),
)
REDUCTIONS = {
    "sum": np.sum,
    "mean": np.mean,
    "max": np.max,
    "min": np.min,
    "prod": np.prod,
    "l1_norm": lambda x, **k: np.abs(x).sum(**k),
    "l2_norm": lambda x, **k: np.sqrt((x**2).sum(**k)),
    "sum_square": lambda x, **k: (x**2).sum(**k),
    "log_sum": lambda x, **k: np.log(x.sum(**k)),
    "log_sum_exp": lambda x, **k: np.log(np.exp(x).sum(**k)),
}
CASES = [
    Case("linear", {"x": real(2, 3, 5)}, lambda x: x @ WEIGHT.T + BIAS, {"weight": WEIGHT, "bias": BIAS}),
    Case("linear", {"x": real(3, 5)}, lambda x: x @ WEIGHT.T, {"weight": WEIGHT}, "no-bias"),
    Case("matmul", {"x": real(10, 4, 3), "y": real(5, 10, 3, 2)}, np.matmul),
    Case(
        "matmul",
        {"x": real(2, 3, 4), "y": real(2, 5, 3)},
        lambda x, y: x.swapaxes(1, 2) @ y.swapaxes(1, 2),
        {"transpose_x": True, "transpose_y": True},
        "transposed",
    ),
    Case("matmul", {"x": real(4), "y": real(4, 2)}, np.matmul, tag="vector"),
    Case(
        "einsum",
        {"values": (real(2, 3, 4, 5), real(2, 5, 4, 6))},
        lambda x, y: (x.transpose(0, 2, 1, 3) @ y.transpose(0, 2, 1, 3)).transpose(0, 2, 1, 3),
        {"equation": "nchw,nwhu->nchu"},
    ),
    Case("softmax", {"x": real(2, 3, 4)}, torched(lambda x: x.softmax(-1))),
    Case("softmax", {"x": real(2, 3, 4)}, torched(lambda x: x.softmax(1)), {"axis": 1}, "axis"),
    Case(
        "layer_norm",
        {"x": real(2, 3, 4)},
        torched(lambda x: F.layer_norm(x, (4,), GAMMA, BETA, 1e-3)),
        {"axes": [-1], "gamma": GAMMA.numpy(), "beta": BETA.numpy(), "epsilon": np.float32(1e-3)},
    ),
    Case(
        "layer_norm",
        {"x": real(2, 3, 4)},
        torched(lambda x: F.layer_norm(x, (3, 4))),
        {"axes": [1, 2]},
        "two-axes",
    ),
    Case(
        "batch_norm",
        {"x": real(2, 3, 4)},
        torched(lambda x: F.batch_norm(x, MEAN, VARIANCE)),
        {"mean": MEAN.numpy(), "variance": VARIANCE.numpy()},
        inferred=False,
    ),
    Case("instance_norm", {"x": real(2, 3, 4)}, torched(F.instance_norm), inferred=False),
    Case(
        "l2_norm", {"x": real(2, 3, 4, 5)}, lambda x: x / np.sqrt((x**2).sum((1, 2, 3), keepdims=True) + 1e-6)
    ),
    Case(
        "conv",
        {"x": real(1, 5, 1, 7)},
        torched(lambda x: F.conv2d(x, POINT, POINT_BIAS)),
        {"weight": POINT.numpy(), "bias": POINT_BIAS.numpy()},
        inferred=False,
    ),
    Case(
        "conv",
        {"x": real(1, 4, 9)},
        torched(lambda x: F.conv1d(F.pad(x, (2, 0)), CAUSAL_KERNEL, stride=2, groups=4)),
        {"weight": CAUSAL_KERNEL.numpy(), "strides": [2], "pad_type": "custom", "pad": [2, 0], "groups": 4},
        "causal",
        inferred=False,
    ),
    Case(
        "conv",
        {"x": real(1, 2, 6, 7)},
        torched(lambda x: F.conv2d(F.pad(x, (3, 4, 1, 2)), KERNEL, dilation=(1, 2))),
        {"weight": KERNEL.numpy(), "dilations": [1, 2], "pad_type": "custom", "pad": [1, 2, 3, 4]},
        "padded",
        inferred=False,
    ),
    Case("reduce_argmax", {"x": real(3, 4)}, lambda x: x.argmax(-1)),
    Case("reduce_argmin", {"x": real(3, 4)}, lambda x: x.argmin(0)[None], {"axis": 0, "keep_dims": True}),
    Case("cumsum", {"x": real(3, 4)}, lambda x: x.cumsum(1), {"axis": 1}),
    Case("cumsum", {"x": whole(4)}, lambda x: np.cumsum(x[::-1])[::-1], {"reverse": True}, "reverse"),
    Case(
        "cumsum",
        {"x": whole(4)},
        lambda x: np.cumsum(x) - x,
        {"exclusive": True},
        "exclusive",
        inferred=False,
    ),
    *(
        Case(
            f"reduce_{op}",
            {"x": real(2, 3, 4, low=0.1)},
            lambda x, f=function: f(x, axis=(0, 2), keepdims=True),
            {"axes": [0, -1], "keep_dims": True},
        )
        for op, function in REDUCTIONS.items()
    ),
    Case("reduce_sum", {"x": real(2, 3)}, np.sum, tag="all"),
    Case("reduce_mean", {"x": real(2, 3)}, lambda x: x.mean(1), {"axes": [1]}, "dropped"),
]


def attention(q, k, v, mask=None):
    scores = q @ k.swapaxes(-1, -2) / np.sqrt(q.shape[-1])
    if mask is not None:
        scores = np.where(mask, scores, -np.inf) if mask.dtype == bool else scores + mask
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True) @ v


QKV = {"query": real(1, 2, 3, 8), "key": real(1, 2, 5, 8), "value": real(1, 2, 5, 4)}
CAUSAL = np.tril(np.ones((3, 5), bool), 2)
CASES += [
    Case("scaled_dot_product_attention", QKV, attention),
    Case("scaled_dot_product_attention", {**QKV, "attn_mask": CAUSAL}, attention, tag="bool"),
    Case("scaled_dot_product_attention", {**QKV, "attn_mask": real(1, 1, 3, 5)}, attention, tag="float"),
    Case(
        "scaled_dot_product_attention",
        {**QKV, "attn_mask": np.where(CAUSAL, 0, -np.inf).astype(np.float32)},
        attention,
        tag="infinite",
    ),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_an_op(case, evaluate):
    check(case, evaluate)


@pytest.mark.parametrize("case", [case for case in CASES if case.inferred], ids=str)
def test_coremltools_agrees(case):
    check_inference(case)
