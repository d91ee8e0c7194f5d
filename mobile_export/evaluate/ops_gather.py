"""Values chosen by index: gathers, scatters, sorting.

Each function is an op of the MIL reference, parameters by their names there. A negative index
counts from the end; one outside the dimension is an error.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

Mode = Literal["update", "add", "sub", "mul", "div", "max", "min"]


def gather(
    x: Tensor, indices: Tensor, axis: int = 0, batch_dims: int = 0, validate_indices: bool = False
) -> Tensor:
    """x [batch, ..., n (axis), ...], indices [batch, *N] -> [batch, ..., *N, ...]."""
    axis %= x.ndim
    places = _places(indices, x.shape[axis])
    shape = [*x.shape[:axis], *indices.shape[batch_dims:], *x.shape[axis + 1 :]]
    if batch_dims == 0:
        return x.index_select(axis, places.reshape(-1)).reshape(shape)
    batch = x.shape[:batch_dims]
    rows = x.reshape(-1, *x.shape[batch_dims:])
    chosen = places.reshape(rows.shape[0], -1)
    parts = [row.index_select(axis - batch_dims, one) for row, one in zip(rows, chosen, strict=True)]
    return torch.stack(parts).reshape([*batch, *shape[batch_dims:]])


def gather_along_axis(x: Tensor, indices: Tensor, axis: int = 0, validate_indices: bool = False) -> Tensor:
    return x.gather(axis, _places(indices, x.shape[axis]))


def gather_nd(x: Tensor, indices: Tensor, batch_dims: int = 0, validate_indices: bool = False) -> Tensor:
    """The last dimension of `indices` addresses the dimensions of x after the batch."""
    rank = indices.ndim - 1
    batch = [
        torch.arange(size).reshape([-1 if at == axis else 1 for at in range(rank)])
        for axis, size in enumerate(x.shape[:batch_dims])
    ]
    return x[(*batch, *_columns(x, indices, batch_dims))]


def scatter(
    data: Tensor,
    indices: Tensor,
    updates: Tensor,
    axis: int = 0,
    mode: Mode = "add",
    validate_indices: bool = False,
) -> Tensor:
    axis %= data.ndim
    places = _places(indices, data.shape[axis])
    view = [1] * data.ndim
    view[axis] = -1
    return _scatter(data, places.reshape(view).expand(updates.shape), updates, axis, mode)


def scatter_along_axis(
    data: Tensor,
    indices: Tensor,
    updates: Tensor,
    axis: int = 0,
    mode: Mode = "add",
    validate_indices: bool = False,
) -> Tensor:
    return _scatter(data, _places(indices, data.shape[axis]), updates, axis % data.ndim, mode)


def scatter_nd(
    data: Tensor, indices: Tensor, updates: Tensor, mode: Mode = "add", validate_indices: bool = False
) -> Tensor:
    depth = indices.shape[-1]
    sizes = torch.tensor([*data.shape[:depth], 1])
    steps = sizes.flip(0).cumprod(0).flip(0)[1:]
    columns = _columns(data, indices, 0)
    rows = sum((column * step for column, step in zip(columns, steps, strict=True)), torch.zeros(()).long())
    flat = data.reshape(-1, *data.shape[depth:])
    values = updates.reshape(-1, *data.shape[depth:])
    return scatter(flat, rows.reshape(-1).int(), values, 0, mode).reshape(data.shape)


def _scatter(data: Tensor, places: Tensor, updates: Tensor, axis: int, mode: str) -> Tensor:
    if mode == "update":
        return data.scatter(axis, places, updates)
    if mode == "sub":
        return data.scatter_add(axis, places, -updates)
    if mode == "div":
        mode, updates = "mul", updates.reciprocal()
    how = {"add": "sum", "mul": "prod", "max": "amax", "min": "amin"}[mode]
    return data.scatter_reduce(axis, places, updates, how)


def _places(indices: Tensor, size: int) -> Tensor:
    return torch.where(indices < 0, indices + size, indices).long()


def _columns(x: Tensor, indices: Tensor, batch_dims: int) -> list[Tensor]:
    return [_places(one, size) for one, size in zip(indices.unbind(-1), x.shape[batch_dims:], strict=False)]


def one_hot(
    indices: Tensor,
    one_hot_vector_size: int,
    axis: int = -1,
    on_value: Tensor | None = None,
    off_value: Tensor | None = None,
) -> Tensor:
    on, off = (torch.tensor(1) if on_value is None else on_value, off_value)
    hot = indices.unsqueeze(-1) == torch.arange(one_hot_vector_size)
    off = torch.zeros_like(on) if off is None else off
    return torch.where(hot, on, off).movedim(-1, axis)


def argsort(x: Tensor, axis: int = -1, ascending: bool = False) -> Tensor:
    return x.argsort(dim=axis, descending=not ascending, stable=True)


def topk(
    x: Tensor,
    k: int = 1,
    axis: int = -1,
    ascending: bool = False,
    sort: bool = True,
    return_indices: bool = True,
    output_indices_dtype: Literal["int32", "uint16"] = "int32",
) -> Any:
    """The k largest (smallest when ascending), in order; the first of equal values."""
    values, places = x.sort(dim=axis, descending=not ascending, stable=True)
    chosen = values.narrow(axis, 0, k), places.narrow(axis, 0, k)
    return chosen if return_indices else chosen[0]


def non_zero(x: Tensor) -> Tensor:
    return x.nonzero()


NAMED: tuple[Callable[..., Any], ...] = (
    gather,
    gather_along_axis,
    gather_nd,
    scatter,
    scatter_along_axis,
    scatter_nd,
    one_hot,
    argsort,
    topk,
    non_zero,
)

OPS = {function.__name__: function for function in NAMED}
