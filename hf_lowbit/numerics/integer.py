"""Weights as integers with scales: the grid of a row or group, and codes that make up for each other's rounding.

Codes are unsigned, ``w = scale · (code - zero)``; ``numerics`` returns plain tensors, how they are stored ``formats``
decides. Scales are rounded to their storage dtype before any weight is, so that used and stored scales are the same.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from hf_lowbit.numerics.inverse import compensate, inverse_factor

# Columns whose errors are carried on one by one before the rest of the weight is updated; the result is the same.
BLOCK = 128
# Shares of the full range that are tried for a grid; narrower ones clip the largest weights and round the others less.
SHARES = tuple(1 - 0.025 * step for step in range(17))


@dataclasses.dataclass
class IntegerFit:
    """A weight on integer grids.

    Attributes:
        codes: (n, m), uint8.
        scale: (n, groups), in the storage dtype.
        zero: (n, groups), uint8, None for symmetric grids.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None


def grid(
    weight: Tensor, bits: int, symmetric: bool, scale_dtype: torch.dtype, importance: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Scale and zero point of every row.

    Args:
        weight: (n, k), the columns of one group, floating.
        bits: of a code.
        symmetric: zero point in the middle of the range; else where the range, which always holds 0, puts it.
        scale_dtype: that scales are rounded to.
        importance: (k,), >= 0, weights of the columns' squared errors, for 2 to 4 bits: of the full range and some
            narrower ones the best is taken. None counts all alike. With 8 bits the full range is.

    Returns:
        Scale (n, 1), > 0, and zero point (n, 1), whole numbers, both in the dtype of ``weight``. A row of zeros, or
        one whose scale would vanish in the storage dtype, gets scale 1 and with it zeros.
    """
    low, high = weight.amin(1, keepdim=True).clamp(max=0), weight.amax(1, keepdim=True).clamp(min=0)
    best: tuple[Tensor, Tensor] | None = None
    least: Tensor | None = None
    for share in SHARES if bits < 8 else SHARES[:1]:
        scale, zero = grid_of(low * share, high * share, bits, symmetric, scale_dtype)
        error = (weight - nearest(weight, scale, zero, bits)).square()
        total = (error if importance is None else error * importance).sum(1, keepdim=True)
        if best is None or least is None:
            best, least = (scale, zero), total
        else:
            better = total < least
            best = (torch.where(better, scale, best[0]), torch.where(better, zero, best[1]))
            least = torch.minimum(total, least)
    if best is None:
        raise AssertionError("at least the full range is tried")
    return best


def grid_of(low: Tensor, high: Tensor, bits: int, symmetric: bool, scale_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Scale and zero point of every row from the ends of its range; what :func:`grid` tries several of.

    Args:
        low: (n, 1), lower ends.
        high: (n, 1), upper ends, not below ``low``; the zero point is clamped to a code if 0 is not between them.
        bits: of a code.
        symmetric: zero point in the middle of the range.
        scale_dtype: that scales are rounded to; one that vanishes there becomes 1.

    Returns:
        Scale (n, 1), > 0, and zero point (n, 1), whole numbers, both in the dtype of ``low``.
    """
    most = 2**bits - 1
    middle = (most + 1) // 2
    scale = torch.maximum(-low / middle, high / (middle - 1)) if symmetric else (high - low) / most
    scale = scale.to(scale_dtype).to(low.dtype)
    safe = torch.where(scale > 0, scale, torch.ones_like(scale))
    zero = torch.full_like(low, middle) if symmetric else (-low / safe).round().clamp(0, most)
    return safe, zero


def nearest(weight: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """Return the nearest value on the grid, in the dtype of ``weight``."""
    return scale * (codes_of(weight, scale, zero, bits) - zero)


def codes_of(weight: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """Return the code of the nearest value on the grid, as whole numbers in the dtype of ``weight``."""
    return (weight / scale + zero).round().clamp(0, 2**bits - 1)


def fit(
    weight: Tensor,
    second_moment: Tensor | None,
    *,
    bits: int,
    group_size: int,
    symmetric: bool,
    scale_dtype: torch.dtype,
    damping: float,
    where: str,
) -> IntegerFit:
    """Round a weight to integers, column by column, each column's error made up for by those after it.

    Args:
        weight: (n, m), floating; not modified. Computed in float64.
        second_moment: (m, m), any positive multiple of Σ x xᵀ over the inputs; None rounds every weight by itself.
        bits: of a code.
        group_size: columns that share a scale, 0 for all of a row.
        symmetric: whether the zero is the middle of the range.
        scale_dtype: of the stored scales.
        damping: of the second moment before it is inverted.
        where: name of the layer, for messages.

    Returns:
        Codes, scales and zero points.

    Raises:
        ValueError: a scale leaves the range of its dtype.

    Source: GPTQ (arXiv 2210.17323), Algorithm 1, with grids fixed when their first column is reached.
    Differs: grids are searched for the least squared error, columns weighted as the inputs are.
    """
    current = weight.detach().to(torch.float64, copy=True)
    rows, columns = current.shape
    size = group_size or columns
    factor = None if second_moment is None else inverse_factor(second_moment, damping, where)
    importance = None if second_moment is None else second_moment.diagonal().double()
    codes = torch.empty((rows, columns), dtype=torch.uint8, device=weight.device)
    scales: list[Tensor] = []
    zeros: list[Tensor] = []
    for start in range(0, columns, BLOCK):
        end = min(start + BLOCK, columns)
        before = current[:, start:end].clone()
        rounded = torch.empty_like(before)
        for j in range(start, end):
            if j % size == 0:
                # what other blocks have left is in these columns already; columns of a later block are as they are
                own = slice(j, min(j + size, columns))
                own_importance = None if importance is None else importance[own]
                found = grid(current[:, own], bits, symmetric, scale_dtype, own_importance)
                scales.append(found[0])
                zeros.append(found[1])
            scale, zero = scales[-1], zeros[-1]
            column = current[:, j : j + 1]
            code = codes_of(column, scale, zero, bits)
            codes[:, j] = code[:, 0].to(torch.uint8)
            value = scale * (code - zero)
            rounded[:, j - start] = value[:, 0]
            if factor is not None and j + 1 < end:
                current[:, j + 1 : end] -= (column - value) / factor[j, j] * factor[j, j + 1 : end]
        if factor is not None and end < columns:
            current[:, end:] -= compensate(before - rounded, factor, start, end, exact=True)
    scale, zero = torch.cat(scales, 1), torch.cat(zeros, 1)
    stored = scale.to(scale_dtype)
    if not bool(torch.isfinite(stored).all()):
        name = str(scale_dtype).removeprefix("torch.")
        raise ValueError(f"{where}: a scale leaves the range of {name}")
    return IntegerFit(codes, stored, None if symmetric else zero.to(torch.uint8))
