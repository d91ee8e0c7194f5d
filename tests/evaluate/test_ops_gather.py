"""Gathers, scatters and sorting against numpy."""

import numpy as np
import pytest
from cases import Case, check, check_inference, real, whole

X = real(2, 3, 4)
CASES = [
    Case(
        "gather", {"x": X, "indices": np.int32([[0, 2], [1, -1]])}, lambda x, i: np.take(x, i, 1), {"axis": 1}
    ),
    Case("gather", {"x": X, "indices": np.int32(1)}, lambda x, i: x[1], tag="scalar"),
    Case(
        "gather",
        {"x": X, "indices": np.int32([[2, 0], [1, 1]])},
        lambda x, i: np.stack([x[0][[2, 0]], x[1][[1, 1]]]),
        {"axis": 1, "batch_dims": 1},
        "batch",
    ),
    Case(
        "gather",
        {"x": X, "indices": np.int32([[2, 0], [1, 1]])},
        lambda x, i: np.stack([x[0][:, [2, 0]], x[1][:, [1, 1]]]),
        {"axis": 2, "batch_dims": 1},
        "batch-later-axis",
    ),
    Case(
        "gather_along_axis",
        {"x": X, "indices": whole(2, 5, 4, low=-3, high=3)},
        lambda x, i: np.take_along_axis(x, i, 1),
        {"axis": 1},
    ),
    Case(
        "gather_nd",
        {"x": X, "indices": np.int32([[0, 1], [1, -1], [1, 0]])},
        lambda x, i: x[i[:, 0], i[:, 1]],
        inferred=False,
    ),
    Case(
        "gather_nd",
        {"x": X, "indices": np.int32([[[2], [0]], [[1], [1]]])},
        lambda x, i: np.stack([x[0][[2, 0]], x[1][[1, 1]]]),
        {"batch_dims": 1},
        "batch",
        inferred=False,
    ),
    Case("argsort", {"x": real(3, 7)}, lambda x: np.argsort(-x, -1)),
    Case(
        "argsort", {"x": real(3, 7)}, lambda x: np.argsort(x, 0), {"axis": 0, "ascending": True}, "ascending"
    ),
    Case("topk", {"x": real(3, 7)}, lambda x: [-np.sort(-x)[:, :2], np.argsort(-x)[:, :2]], {"k": 2}),
    Case(
        "topk",
        {"x": real(3, 7)},
        lambda x: [np.sort(x, 0)[:2], np.argsort(x, 0)[:2]],
        {"k": 2, "axis": 0, "ascending": True},
        "ascending",
    ),
    Case(
        "one_hot",
        {"indices": np.int32([2, 0])},
        lambda i: np.float32([[1, 1, 5], [5, 1, 1]]),
        {"one_hot_vector_size": 3, "on_value": np.float32(5), "off_value": np.float32(1)},
        inferred=False,
    ),
    Case(
        "one_hot",
        {"indices": np.int32([2, 0])},
        lambda i: np.int32([[0, 1], [0, 0], [1, 0]]),
        {"one_hot_vector_size": 3, "axis": 0},
        "axis",
        inferred=False,
    ),
    Case("non_zero", {"x": np.int32([[0, 3], [1, 0]])}, lambda x: np.argwhere(x)),
]


def scattered(mode, data, places, updates):
    data = data.copy()
    for place, update in zip(places, updates, strict=True):
        old = data[place]
        data[place] = {
            "update": update,
            "add": old + update,
            "sub": old - update,
            "mul": old * update,
            "div": old / update,
            "max": np.maximum(old, update),
            "min": np.minimum(old, update),
        }[mode]
    return data


CASES += [
    *(
        Case(
            "scatter",
            {"data": real(4, 3), "indices": np.int32([2, 0, -1]), "updates": real(3, 3, low=1)},
            lambda d, i, u, m=mode: scattered(m, d, i, u),
            {"axis": 0, "mode": mode},
            mode,
            inferred=False,
        )
        for mode in ("update", "add", "sub", "mul", "div", "max", "min")
    ),
    Case(
        "scatter",
        {"data": real(4, 3), "indices": np.int32([2, 2]), "updates": real(4, 2)},
        lambda d, i, u: scattered("add", d.T, i, u.T).T,
        {"axis": 1, "mode": "add"},
        "twice",
        inferred=False,
    ),
    Case(
        "scatter_nd",
        {"data": real(4, 3, 2), "indices": np.int32([[2, 1], [0, 0]]), "updates": real(2, 2)},
        lambda d, i, u: scattered("update", d, [(2, 1), (0, 0)], u),
        {"mode": "update"},
        inferred=False,
    ),
    Case(
        "scatter_along_axis",
        {"data": real(4, 3), "indices": np.int32([[3, 0, 1]]), "updates": real(1, 3)},
        lambda d, i, u: scattered("update", d, [(3, 0), (0, 1), (1, 2)], u[0]),
        {"axis": 0, "mode": "update"},
    ),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_an_op(case, evaluate):
    check(case, evaluate)


@pytest.mark.parametrize("case", [case for case in CASES if case.inferred], ids=str)
def test_coremltools_agrees(case):
    check_inference(case)
