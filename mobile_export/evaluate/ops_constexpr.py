"""Compile-time ops: compressed weights to dense ones, on numpy arrays, fp32 where the output is floating.

Formulas: coremltools' reference of the iOS 16 and iOS 18 `constexpr_` ops.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy import ndarray


def blockwise_shift_scale(data: ndarray, scale: ndarray, offset: ndarray | None = None) -> ndarray:
    """`scale * (data - offset)`; `scale` and `offset` have data's rank, one value a block."""
    result = data.astype(np.float32)
    blocks = result.reshape(_interleave(scale.shape, _per_block(data.shape, scale.shape)))
    if offset is not None:
        blocks -= offset.astype(np.float32).reshape(_interleave(scale.shape))
    blocks *= scale.astype(np.float32).reshape(_interleave(scale.shape))
    return result


def affine_dequantize(quantized_data: ndarray, zero_point: ndarray, scale: ndarray, axis: ndarray) -> ndarray:
    """`scale * (data - zero_point)`, each a scalar or a vector along `axis`."""
    shape = [1] * quantized_data.ndim
    shape[int(axis)] = -1
    result = quantized_data.astype(np.float32)
    result -= zero_point.astype(np.float32).reshape(shape)
    result *= scale.astype(np.float32).reshape(shape)
    return result


def lut_to_dense(
    indices: ndarray, lut: ndarray, shape: ndarray | None = None, vector_axis: ndarray | None = None
) -> ndarray:
    """Look every index up. With `shape`, the iOS 16 form: indices packed in bytes and one flat table.

    Else the iOS 18 form: indices [d0, ...], lut [g0, ..., palettes, vector]; g_i tables along
    dimension i; a vector longer than 1 is laid out along `vector_axis`.
    """
    if shape is not None:
        bits = int(lut.size).bit_length() - 1
        return _float(lut)[_packed(indices, bits, math.prod(shape.tolist()))].reshape(shape.tolist())
    groups, (palettes, vector) = lut.shape[:-2], lut.shape[-2:]
    first = np.arange(math.prod(groups), dtype=np.intp).reshape(_interleave(groups)) * palettes
    blocks = indices.reshape(_interleave(groups, _per_block(indices.shape, groups)))
    rows = (blocks + first).reshape(indices.shape)
    table = _float(lut).reshape(-1, vector)
    if vector == 1:
        return table[:, 0][rows]
    axis = int(vector_axis) % indices.ndim  # type: ignore[arg-type]
    spread = np.moveaxis(table[rows], -1, axis + 1)
    dense = list(indices.shape)
    dense[axis] *= vector
    return spread.reshape(dense)


def sparse_to_dense(nonzero_data: ndarray, mask: ndarray, shape: ndarray | None = None) -> ndarray:
    """Values where the mask's bits are set, zero elsewhere. With `shape`, the mask is packed in bytes."""
    if shape is not None:
        mask = _packed(mask, 1, math.prod(shape.tolist())).reshape(shape.tolist())
    data = _float(nonzero_data)
    result = np.zeros(mask.shape, data.dtype)
    result[mask != 0] = data
    return result


def lut_to_sparse(
    indices_mask: ndarray, indices_nonzero_data: ndarray, lut: ndarray, vector_axis: ndarray | None = None
) -> tuple[ndarray, ndarray]:
    """(mask, values) of a sparse tensor whose values are indices into a table."""
    dense = lut_to_dense(sparse_to_dense(indices_nonzero_data, indices_mask), lut, vector_axis=vector_axis)
    mask = indices_mask
    if lut.shape[-1] > 1:
        mask = np.repeat(mask, lut.shape[-1], axis=int(vector_axis))  # type: ignore[arg-type]
    return mask, dense[mask != 0]


def sparse_blockwise_shift_scale(
    data_mask: ndarray, nonzero_data: ndarray, scale: ndarray, offset: ndarray | None = None
) -> tuple[ndarray, ndarray]:
    """(mask, values) of a sparse tensor whose values are quantized block by block."""
    dense = blockwise_shift_scale(sparse_to_dense(nonzero_data, data_mask), scale, offset)
    return data_mask, dense[data_mask != 0]


def cast(source_val: ndarray, output_dtype: str) -> ndarray:
    """fp16 to fp32, the only cast that the format knows."""
    if output_dtype != "fp32":
        raise ValueError(f"no cast to {output_dtype}")
    return source_val.astype(np.float32)


CONSTEXPR: dict[str, Any] = {
    f"constexpr_{run.__name__}": run
    for run in (
        blockwise_shift_scale,
        affine_dequantize,
        lut_to_dense,
        sparse_to_dense,
        lut_to_sparse,
        sparse_blockwise_shift_scale,
        cast,
    )
}


def _per_block(shape: tuple[int, ...], blocks: tuple[int, ...]) -> list[int]:
    if len(shape) != len(blocks) or any(size % count for size, count in zip(shape, blocks, strict=True)):
        raise ValueError(f"{blocks} blocks do not divide {shape}")
    return [size // count for size, count in zip(shape, blocks, strict=True)]


def _interleave(blocks: tuple[int, ...], inner: list[int] | None = None) -> list[int]:
    """(blocks of dimension 0, its block size, blocks of dimension 1, ...); block size 1 by default."""
    inner = inner or [1] * len(blocks)
    return [size for pair in zip(blocks, inner, strict=True) for size in pair]


def _float(array: ndarray) -> ndarray:
    return array.astype(np.float32) if array.dtype.kind == "f" else array


def _packed(data: ndarray, bits: int, count: int) -> ndarray:
    """Values of `bits` bits each, from the lowest bit of the first byte up."""
    single = np.unpackbits(data, count=count * bits, bitorder="little").reshape(count, bits)
    return single @ (1 << np.arange(bits, dtype=np.uint8))
