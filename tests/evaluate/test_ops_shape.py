"""Slices, joins, reshapes and fills against numpy."""

import numpy as np
import pytest
from cases import Case, check, check_inference, compare, real

X = real(2, 3, 4)
CASES = [
    Case(
        "slice_by_index",
        {"x": X},
        lambda x: x[:, 1:3, ::2],
        {"begin": [0, 1, 0], "end": [2, 3, 4], "stride": [1, 1, 2]},
    ),
    Case(
        "slice_by_index",
        {"x": X},
        lambda x: x[1, -2:, :2],
        {
            "begin": [1, -2, 1],
            "end": [0, 0, -2],
            "begin_mask": [False, False, True],
            "end_mask": [False, True, False],
            "squeeze_mask": [True, False, False],
        },
        "masks",
    ),
    Case(
        "slice_by_index",
        {"x": X},
        lambda x: x[::-1, 2:0:-1, 3],
        {
            "begin": [0, 2, 3],
            "end": [0, 0, 0],
            "stride": [-1, -1, 1],
            "begin_mask": [True, False, False],
            "end_mask": [True, False, False],
            "squeeze_mask": [False, False, True],
        },
        "backwards",
    ),
    Case(
        "slice_by_index",
        {"x": X, "begin": np.int32([0, 1, 0])},
        lambda x, b: x[0:2, 1:3],
        {"end": [2, 3, 4]},
        "moving",
    ),
    Case("slice_by_size", {"x": X}, lambda x: x[1:2, 1:, 1:3], {"begin": [1, 1, 1], "size": [1, -1, 2]}),
    Case(
        "slice_by_size",
        {"x": X, "begin": np.int32([0, -2, 1])},
        lambda x, b: x[0:1, 1:3, 1:4],
        {"size": [1, 2, 3]},
        "moving",
    ),
    Case(
        "slice_update",
        {"x": real(2, 6), "update": real(2, 3)},
        lambda x, u: np.concatenate([x[:, :2], u, x[:, 5:]], 1),
        {"begin": [0, 2], "end": [2, 5]},
    ),
    Case(
        "slice_update",
        {"x": real(2, 6), "update": real(3)},
        lambda x, u: np.stack([x[0], np.ravel([[u[2], x[1][1]], [u[1], x[1][3]], [u[0], x[1][5]]])]),
        {
            "begin": [1, 4],
            "end": [0, 0],
            "stride": [1, -2],
            "end_mask": [False, True],
            "squeeze_mask": [True, False],
        },
        "backwards",
    ),
    Case(
        "slice_update",
        {"x": real(2, 6), "update": real(2, 2), "begin": np.int32([0, 3]), "end": np.int32([2, 5])},
        lambda x, u, b, e: np.concatenate([x[:, :3], u, x[:, 5:]], 1),
        tag="moving",
    ),
    Case("reshape", {"x": X}, lambda x: x.reshape(6, 4), {"shape": [-1, 4]}),
    Case("reshape", {"x": X}, lambda x: x.reshape(2, 4, 3), {"shape": [0, 4, -1]}, "zero"),
    Case("reshape", {"x": X, "shape": np.int32([4, 6])}, lambda x, s: x.reshape(4, 6), tag="moving"),
    Case("flatten2d", {"x": X}, lambda x: x.reshape(6, 4), {"axis": -1}),
    Case("transpose", {"x": X}, lambda x: x.transpose(2, 0, 1), {"perm": [-1, 0, 1]}),
    Case("expand_dims", {"x": X}, lambda x: x[:, None, :, :, None], {"axes": [-1, 1]}),
    Case("squeeze", {"x": real(1, 3, 1, 2)}, lambda x: x[0], {"axes": [0]}),
    Case("squeeze", {"x": real(1, 3, 1, 2)}, lambda x: x[0, :, 0], tag="all"),
    Case(
        "squeeze", {"x": real(1, 3, 1, 2)}, lambda x: x[:, :, 0], {"axes": [1, 2]}, "not-one", inferred=False
    ),
    Case("reverse", {"x": X}, lambda x: x[:, ::-1, ::-1], {"axes": [1, 2]}),
    Case("tile", {"x": X}, lambda x: np.tile(x, (2, 1, 3)), {"reps": [2, 1, 3]}),
    Case("concat", {"values": (X, real(2, 1, 4))}, lambda a, b: np.concatenate([a, b], 1), {"axis": 1}),
    Case(
        "concat",
        {"values": (X, real(2, 3, 4))},
        lambda a, b: np.stack([a, b], 2).reshape(2, 6, 4),
        {"axis": -2, "interleave": True},
        "interleaved",
        inferred=False,
    ),
    Case("stack", {"values": (X, real(2, 3, 4))}, lambda a, b: np.stack([a, b], -1), {"axis": -1}),
    Case("split", {"x": X}, lambda x: np.split(x, 2, 2), {"num_splits": 2, "axis": -1}),
    Case(
        "split", {"x": X}, lambda x: [x[:, :, :1], x[:, :, 1:]], {"split_sizes": [1, 3], "axis": 2}, "sizes"
    ),
    Case(
        "pad",
        {"x": X},
        lambda x: np.pad(x, [(0, 0), (1, 0), (2, 3)], constant_values=7),
        {"pad": [1, 0, 2, 3], "constant_val": np.float32(7)},
    ),
    Case(
        "pad",
        {"x": X},
        lambda x: np.pad(x, [(0, 0), (2, 1), (1, 2)], "reflect"),
        {"pad": [2, 1, 1, 2], "mode": "reflect"},
        "reflect",
    ),
    Case(
        "pad",
        {"x": X},
        lambda x: np.pad(x, [(0, 0), (2, 1), (1, 2)], "edge"),
        {"pad": [2, 1, 1, 2], "mode": "replicate"},
        "replicate",
    ),
    Case("shape", {"x": X}, lambda x: np.int32([2, 3, 4])),
    Case("fill", {"shape": np.int32([2, 3])}, lambda s: np.full((2, 3), 5, np.int32), {"value": 5}),
    Case("fill_like", {"ref_tensor": X}, lambda x: np.full(x.shape, 2, np.float32), {"value": np.float32(2)}),
    Case(
        "range_1d",
        {"end": np.int32(9)},
        lambda e: np.arange(2, 9, 3, dtype=np.int32),
        {"start": 2, "step": 3},
    ),
    Case(
        "range_1d",
        {"end": np.float32(2)},
        lambda e: np.arange(0.5, 2, 0.5, dtype=np.float32),
        {"start": np.float32(0.5), "step": np.float32(0.5)},
        "real",
    ),
    Case("band_part", {"x": real(2, 4, 5)}, lambda x: np.tril(x), {"lower": -1, "upper": 0}),
    Case(
        "band_part", {"x": real(4, 5)}, lambda x: np.triu(np.tril(x, 2), -1), {"lower": 1, "upper": 2}, "both"
    ),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_an_op(case, evaluate):
    check(case, evaluate)


@pytest.mark.parametrize("case", [case for case in CASES if case.inferred], ids=str)
def test_coremltools_agrees(case):
    check_inference(case)


def test_reshape_like(evaluate):
    from coremltools.converters.mil import Builder as mb

    x, other = real(2, 12), real(5, 3, 4)
    (found,) = evaluate(
        lambda x, other: mb.reshape_like(
            x=x, ref_tensors=(other, x), begins=(1, 0), ends=(0, 1), end_masks=(True, False)
        ),
        [x, other],
    )
    compare([found], x.reshape(3, 4, 2))
