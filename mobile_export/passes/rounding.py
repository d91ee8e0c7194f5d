"""Two ways from a weight to int8 codes: each to the nearest, or each making up for those before it.

The second is GPTQ (arXiv 2210.17323) in its triangular form, Babai's nearest plane (arXiv
2507.18553): with H = U U^T (U upper triangular) the output error of a row is |(w - codes) U|^2, and
column by column each code is chosen so that its own term is least, whatever the earlier left over.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

BLOCK = 1280
"""Most columns that make up for one another: the cost of a factor grows with its cube."""
_ROWS = 8192
_PANEL = 128


class Factor(NamedTuple):
    """What a block of columns needs to know of its inputs."""

    order: Tensor
    """int64 [K]: columns by falling input power, ties by position; the first find most others to help."""
    upper: Tensor
    """fp32 [K, K]: U of the ordered, damped moments, each column divided by its diagonal."""


def quantize_per_channel(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric int8 of a weight fp32 [N, K]: codes int8 [N, K] in [-127, 127], scales fp32 [N].

    scale = max|row| / 127 (a row of zeros gets scale 1); codes = round half to even.
    """
    import torch

    scales = _scales(weight)
    codes = torch.empty_like(weight, dtype=torch.int8)
    for rows in range(0, len(weight), _ROWS):  # in slices: the whole in fp32 would double peak memory
        part = slice(rows, rows + _ROWS)
        codes[part] = _codes(weight[part] / scales[part, None]).to(torch.int8)
    return codes, scales


def compensated(weight: Tensor, factors: Sequence[Factor | None]) -> tuple[Tensor, Tensor]:
    """As `quantize_per_channel`, same scales, but rounded for the least error of the output.

    `factors` are of the column blocks that `blocks` gives; a block without one is rounded to nearest.
    """
    import torch

    scales = _scales(weight)
    codes = torch.empty_like(weight, dtype=torch.int8)
    for rows in range(0, len(weight), _ROWS):
        part = slice(rows, rows + _ROWS)
        for columns, factor in zip(blocks(weight.shape[1]), factors, strict=True):
            steps = weight[part, columns] / scales[part, None]
            codes[part, columns] = (_codes(steps) if factor is None else _swept(steps, factor)).to(torch.int8)
    return codes, scales


def blocks(columns: int) -> list[slice]:
    """Columns in the fewest equal parts of at most BLOCK."""
    parts = -(-columns // BLOCK)
    width = -(-columns // parts)
    return [slice(first, min(first + width, columns)) for first in range(0, columns, width)]


def factor(moments: Tensor, damping: float) -> Factor | None:
    """Of the sum of x x^T over inputs x, fp32 [K, K]; None when that is zero or not finite.

    `damping` times the mean power is added to each input's own, so that the codes do not learn the
    calibration text by heart.
    """
    import torch

    power = moments.diagonal()
    level = float(power.mean())
    if not 0 < level < float("inf"):
        return None
    order = power.argsort(descending=True, stable=True)
    damped = moments[order][:, order]
    damped.diagonal().add_(damping * level)
    # The Cholesky factor of the matrix read backwards is U read backwards.
    upper = torch.linalg.cholesky(damped.flip(0, 1)).flip(0, 1)
    return Factor(order, upper / upper.diagonal())


def _scales(weight: Tensor) -> Tensor:
    import torch

    scales = weight.abs().amax(dim=1) / 127
    return torch.where(scales == 0, torch.ones_like(scales), scales)  # NaN stays: the check sees it


def _codes(steps: Tensor) -> Tensor:
    return steps.round().clamp_(-127, 127)


def _swept(steps: Tensor, factor: Factor) -> Tensor:
    """Codes fp32 [N, K] of weights in steps of their scales, fp32 [N, K]."""
    import torch

    order, upper = factor
    wanted = steps.T[order]
    codes, errors = torch.empty_like(wanted), torch.empty_like(wanted)
    for first in range(0, len(order), _PANEL):
        panel = slice(first, first + _PANEL)
        owed = wanted[panel] + upper[:first, panel].T @ errors[:first]
        for row, target in enumerate(owed, first):
            target.addmv_(errors[first:row].T, upper[first:row, row])
            codes[row] = _codes(target)
            errors[row] = wanted[row] - codes[row]
    result = torch.empty_like(steps)
    result[:, order] = codes.T
    return result
