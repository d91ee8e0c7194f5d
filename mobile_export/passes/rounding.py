"""Two ways from a weight to codes: each to the nearest, or each making up for those before it.

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
INT8, INT4 = (-127, 127), (-8, 7)
"""Least and largest code."""
_SHRINK = (1.0, 0.94, 0.88, 0.82, 0.76, 0.7)
"""Parts of a group's full range that its codes may cover instead: what lies outside is cut."""
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


def quantize_per_group(weight: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """int4 of a weight fp32 [N, K] in groups of `size` columns: codes int8 [N, K] in [-8, 7], scales
    fp32 [N, K / size].

    A scale may be negative: code -8 is for the weight of largest magnitude, or for a smaller one where
    cutting what exceeds it loses less of the group's squared error.
    """
    import torch

    scales = _group_scales(weight, size)
    steps = weight / scales.repeat_interleave(size, 1)
    return _codes(steps, INT4).to(torch.int8), scales


def compensated(
    weight: Tensor, factors: Sequence[Factor | None], group: int | None = None
) -> tuple[Tensor, Tensor]:
    """As `quantize_per_channel`, or with `group` as `quantize_per_group`: same scales, but rounded for the
    least error of the output.

    `factors` are of the column blocks that `blocks` gives; a block without one is rounded to nearest.
    """
    import torch

    scales = _group_scales(weight, group) if group else _scales(weight)
    codes = torch.empty_like(weight, dtype=torch.int8)
    for rows in range(0, len(weight), _ROWS):
        part = slice(rows, rows + _ROWS)
        sizes = scales[part].repeat_interleave(group, 1) if group else scales[part, None]
        for columns, factor in zip(blocks(weight.shape[1]), factors, strict=True):
            if group is None:  # in units of the row's scale, so that each code is one unit
                values, units, limits = weight[part, columns] / sizes, torch.ones(1, 1), INT8
            else:
                values, units, limits = weight[part, columns], sizes[:, columns], INT4
            made = _codes(values / units, limits) if factor is None else _swept(values, units, factor, limits)
            codes[part, columns] = made.to(torch.int8)
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


def _group_scales(weight: Tensor, size: int) -> Tensor:
    """fp32 [N, K / size], never 0: of each group the one among `_SHRINK` that rounds it best to nearest."""
    import torch

    groups = weight.unflatten(1, (-1, size))
    largest = groups.gather(2, groups.abs().argmax(2, keepdim=True))[..., 0] / INT4[0]
    largest = torch.where(largest == 0, torch.ones_like(largest), largest)
    found, least = largest.clone(), torch.full_like(largest, torch.inf)
    for part in _SHRINK:
        scales = largest * part
        errors = _codes(groups / scales[..., None], INT4).mul_(scales[..., None]).sub_(groups)
        lost = errors.square_().sum(2)
        better = lost < least
        found, least = torch.where(better, scales, found), torch.where(better, lost, least)
    return found


def _codes(steps: Tensor, limits: tuple[int, int] = INT8) -> Tensor:
    return steps.round().clamp_(*limits)


def _swept(weight: Tensor, steps: Tensor, factor: Factor, limits: tuple[int, int]) -> Tensor:
    """Codes fp32 [N, K] of weights fp32 [N, K], one code further is `steps` [N, K] (or [1, 1]) further."""
    import torch

    order, upper = factor
    wanted, steps = weight.T[order], steps.expand(-1, len(order)).T[order]
    codes, errors = torch.empty_like(wanted), torch.empty_like(wanted)
    for first in range(0, len(order), _PANEL):
        panel = slice(first, first + _PANEL)
        owed = wanted[panel] + upper[:first, panel].T @ errors[:first]
        for row, target in enumerate(owed, first):
            target.addmv_(errors[first:row].T, upper[first:row, row])
            codes[row] = _codes(target / steps[row], limits)
            errors[row] = wanted[row] - codes[row] * steps[row]
    result = torch.empty_like(weight)
    result[:, order] = codes.T
    return result
