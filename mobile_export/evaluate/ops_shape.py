"""Shape and place: slices, joins, reshapes, fills.

Each function is an op of the MIL reference, parameters by their names there.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Masks = list[bool] | None


def slice_by_index(
    x: Tensor,
    begin: list[int],
    end: list[int],
    stride: list[int] | None = None,
    begin_mask: Masks = None,
    end_mask: Masks = None,
    squeeze_mask: Masks = None,
) -> Tensor:
    """`x[begin:end:stride, ...]` as numpy reads it; a squeezed dimension is indexed at `begin`."""
    index, flipped = _index(x, begin, end, stride, begin_mask, end_mask, squeeze_mask)
    return x[index].flip(flipped) if flipped else x[index]


def slice_update(
    x: Tensor,
    update: Tensor,
    begin: list[int],
    end: list[int],
    stride: list[int] | None = None,
    begin_mask: Masks = None,
    end_mask: Masks = None,
    squeeze_mask: Masks = None,
) -> Tensor:
    """A copy of `x` with that slice replaced, `update` of exactly the slice's shape."""
    return slice_update_in_place(x.clone(), update, begin, end, stride, begin_mask, end_mask, squeeze_mask)


def slice_update_in_place(
    x: Tensor,
    update: Tensor,
    begin: list[int],
    end: list[int],
    stride: list[int] | None = None,
    begin_mask: Masks = None,
    end_mask: Masks = None,
    squeeze_mask: Masks = None,
) -> Tensor:
    """`slice_update` that writes into `x` itself, where `reuse.plan` allows it."""
    index, flipped = _index(x, begin, end, stride, begin_mask, end_mask, squeeze_mask)
    if x[index].shape != update.shape:
        raise ValueError(f"an update of {list(update.shape)} for a slice of {list(x[index].shape)}")
    x[index] = update.flip(flipped) if flipped else update
    return x


def _index(
    x: Tensor,
    begin: list[int],
    end: list[int],
    stride: list[int] | None,
    begin_mask: Masks,
    end_mask: Masks,
    squeeze_mask: Masks,
) -> tuple[tuple[Any, ...], list[int]]:
    """An index with steps above zero only, and the dimensions of its result to flip after it."""
    off = [False] * x.ndim
    parts = zip(
        x.shape,
        begin,
        end,
        stride or [1] * x.ndim,
        begin_mask or off,
        end_mask or off,
        squeeze_mask or off,
        strict=True,
    )
    index: list[Any] = []
    flipped: list[int] = []
    rank = 0
    for size, first, last, step, from_start, to_end, squeezed in parts:
        if squeezed:
            index.append(0 if from_start else first)
            continue
        whole = slice(None if from_start else first, None if to_end else last, step)
        if step < 0:
            places = range(*whole.indices(size))
            whole = slice(places[-1], places[0] + 1, -step) if places else slice(0, 0)
            flipped.append(rank)
        index.append(whole)
        rank += 1
    return tuple(index), flipped


def slice_by_size(x: Tensor, begin: list[int], size: list[int]) -> Tensor:
    """From `begin`, `size` elements; -1 takes what is left."""
    for axis, (first, count) in enumerate(zip(begin, size, strict=True)):
        first = first % x.shape[axis] if first < 0 else first
        x = x.narrow(axis, first, x.shape[axis] - first if count == -1 else count)
    return x


def concat(values: list[Tensor], axis: int, interleave: bool = False) -> Tensor:
    parts = [value.reshape(1) if value.ndim == 0 else value for value in values]
    if not interleave:
        return torch.cat(parts, axis)
    axis %= parts[0].ndim
    return torch.stack(parts, axis + 1).flatten(axis, axis + 1)


def split(
    x: Tensor, axis: int, num_splits: int | None = None, split_sizes: list[int] | None = None
) -> tuple[Tensor, ...]:
    if split_sizes is not None:
        return x.split(split_sizes, axis)
    if num_splits is None or x.shape[axis] % num_splits:
        raise ValueError(f"{x.shape[axis]} do not split evenly")
    return x.split(x.shape[axis] // num_splits, axis)


def stack(values: list[Tensor], axis: int) -> Tensor:
    return torch.stack(values, axis)


def reshape(x: Tensor, shape: list[int]) -> Tensor:
    """A 0 takes x's size of that dimension, counted from the last; 1 where x has none."""
    shift = x.ndim - len(shape)
    sizes = [
        (x.shape[at + shift] if at + shift >= 0 else 1) if size == 0 else size
        for at, size in enumerate(shape)
    ]
    return x.reshape(sizes)


def reshape_like(
    x: Tensor, ref_tensors: list[Tensor], begins: list[int], ends: list[int], end_masks: list[bool]
) -> Tensor:
    parts = zip(ref_tensors, begins, ends, end_masks, strict=True)
    return x.reshape(
        [size for t, first, last, all_ in parts for size in t.shape[first : None if all_ else last]]
    )


def flatten2d(x: Tensor, axis: int = 1) -> Tensor:
    return x.reshape(math.prod(x.shape[:axis]), math.prod(x.shape[axis:]))


def transpose(x: Tensor, perm: list[int]) -> Tensor:
    return x.permute(perm)


def expand_dims(x: Tensor, axes: list[int]) -> Tensor:
    rank = x.ndim + len(axes)
    for axis in sorted(axis % rank for axis in axes):
        x = x.unsqueeze(axis)
    return x


def squeeze(x: Tensor, axes: list[int] | None = None) -> Tensor:
    """Only dimensions of size 1; others named in `axes` stay."""
    return x.squeeze() if axes is None else x.squeeze(tuple(axes))


def reverse(x: Tensor, axes: list[int] | None = None) -> Tensor:
    return x.flip(list(range(x.ndim)) if axes is None else axes)


def tile(x: Tensor, reps: list[int]) -> Tensor:
    if len(reps) != x.ndim:
        raise ValueError(f"{len(reps)} repetitions for {x.ndim} dimensions")
    return x.repeat(reps)


def pad(
    x: Tensor,
    pad: list[int],
    mode: Literal["constant", "reflect", "replicate"] = "constant",
    constant_val: float = 0.0,
) -> Tensor:
    """`pad` holds (before, after) of the last len(pad) / 2 dimensions, in order."""
    pairs = list(zip(pad[0::2], pad[1::2], strict=True))
    if mode == "constant":
        return F.pad(x, [size for pair in reversed(pairs) for size in pair], value=constant_val)
    for axis, (before, after) in enumerate(pairs, x.ndim - len(pairs)):
        places = torch.arange(-before, x.shape[axis] + after)
        last = x.shape[axis] - 1
        places = places.clamp(0, last) if mode == "replicate" else last - (last - places.abs()).abs()
        x = x.index_select(axis, places)
    return x


def shape(x: Tensor) -> Tensor:
    return torch.tensor(x.shape, dtype=torch.int32)


def fill(shape: list[int], value: Tensor | None = None) -> Tensor:
    return torch.zeros(shape) if value is None else value.reshape(()).repeat(shape)


def fill_like(ref_tensor: Tensor, value: Tensor | None = None) -> Tensor:
    return fill(list(ref_tensor.shape), value)


def range_1d(start: Tensor, end: Tensor, step: Tensor) -> Tensor:
    return torch.arange(start.item(), end.item(), step.item(), dtype=start.dtype)


def band_part(x: Tensor, lower: int = -1, upper: int = -1) -> Tensor:
    """Zero outside `lower` diagonals below and `upper` above the main one; negative keeps all."""
    x = x if upper < 0 else x.tril(upper)
    return x if lower < 0 else x.triu(-lower)


NAMED: tuple[Callable[..., Any], ...] = (
    slice_by_index,
    slice_update,
    slice_by_size,
    concat,
    split,
    stack,
    reshape,
    reshape_like,
    flatten2d,
    transpose,
    expand_dims,
    squeeze,
    reverse,
    tile,
    pad,
    shape,
    fill,
    fill_like,
    range_1d,
    band_part,
)

OPS = {function.__name__: function for function in NAMED}
