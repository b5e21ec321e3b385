"""The loop over blocks of columns that binary methods share: fit a block, round its scales, carry its error on.

What happens inside a block is the method's own: it passes a function. ARB-LLM and PBS²P use this loop; how their
results are stored, ``formats`` decides from the parts that :func:`unpacked_parts` assembles.

Source: block loop of BiLLM (arXiv 2402.04291) and GPTQ (arXiv 2210.17323).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hf_lowbit.numerics.binary import BinaryFit
from hf_lowbit.numerics.inverse import compensate, inverse_factor


@dataclasses.dataclass
class BlockFit:
    """One block of columns.

    Attributes:
        start: first column.
        salient: (c,), int64, ascending, positions of the salient columns within the block.
        plain: (k - c,), int64, positions of the others.
        code: (n, k), uint8, group of every entry.
        fits: fit of each group, in storage order: salient groups, then plain groups. A salient fit covers the salient
            columns only, a plain fit the others.
        salient_groups: how many of the fits are of salient columns.
        keep: (n, k), bool, False where a weight is pruned; None if none is.
    """

    start: int
    salient: Tensor
    plain: Tensor
    code: Tensor
    fits: list[BinaryFit]
    salient_groups: int
    keep: Tensor | None = None

    def members(self, number: int) -> tuple[Tensor, Tensor, int]:
        """Return columns (w,), entries (n, w; bool) and group code of the fit of this number."""
        in_salient = number < self.salient_groups
        columns = self.salient if in_salient else self.plain
        group = number if in_salient else number - self.salient_groups
        chosen = self.code[:, columns] == group
        if in_salient and self.salient_groups == 1:
            chosen = torch.ones_like(chosen)
        return columns, chosen, group

    def dense(self) -> Tensor:
        """Return the approximation of the block, (n, k)."""
        out = torch.zeros(self.code.shape, dtype=self.fits[-1].row_scale.dtype, device=self.code.device)
        for number, fit in enumerate(self.fits):
            columns, chosen, _ = self.members(number)
            out[:, columns] = torch.where(chosen, fit.dense(), out[:, columns])
        return out if self.keep is None else out * self.keep


def most_salient(columns: int, block_size: int, limit: int) -> int:
    """Return how many columns can be salient if each block may have fewer than ``limit`` and leaves two plain."""
    sizes = [min(block_size, columns - start) for start in range(0, columns, block_size)]
    return sum(max(0, min(limit - 1, size - 2)) for size in sizes)


FitBlock = Callable[[Tensor, int, Tensor | None, Tensor | None], BlockFit]


def sweep(
    weight: Tensor,
    second_moment: Tensor | None,
    fit_block: FitBlock,
    *,
    block_size: int,
    damping: float | None,
    compensation: str,
    scale_dtype: torch.dtype,
    where: str,
) -> tuple[list[BlockFit], Tensor]:
    """Fit all blocks, left to right; what a block leaves is made up for by the columns after it.

    Args:
        weight: (n, m), floating; not modified. Computed in float32, or float64 if it is float64.
        second_moment: (m, m), any positive multiple of Σ x xᵀ over the layer's inputs, or None for a run without data.
        fit_block: ``(columns, start, spread, moment) -> BlockFit``: (n, k), the block with what earlier blocks left;
            its first column; (k,), diagonal of the inverse factor; (k, k), its own second moment; the last two None
            where there are no data.
        block_size: columns in a block; the last one may be narrower.
        damping: of the second moment before it is inverted; None for no factor and no compensation at all.
        compensation: "exact", "reference" or "none", see :func:`hf_lowbit.numerics.inverse.compensate`.
        scale_dtype: storage dtype of scales and shifts, which are rounded to it *before* the compensation.
        where: name of the layer, for messages.

    Returns:
        The fits, with scales >= 0, and their dense form Q, (n, m), in the computing dtype.

    Raises:
        ValueError: weight or second moment hold NaN or infinity, or their shapes disagree; a search or a scale
            overflows.
    """
    _check(weight, second_moment, where)
    current = weight.detach().to(weight.dtype if weight.dtype == torch.float64 else torch.float32, copy=True)
    moment = None if second_moment is None else second_moment.to(current.dtype)
    factor = None
    if second_moment is not None and damping is not None:
        factor = inverse_factor(second_moment, damping, where).to(current.dtype)
    quantized, blocks = torch.empty_like(current), []
    for start in range(0, current.shape[1], block_size):
        end = min(start + block_size, current.shape[1])
        columns = current[:, start:end]
        own_moment = None if moment is None else moment[start:end, start:end]
        spread = None if factor is None else factor.diagonal()[start:end]
        try:
            block = fit_block(columns, start, spread, own_moment)
        except ValueError as failure:  # a search that overflows knows no layer
            raise ValueError(f"{where}: {failure}") from failure
        block.fits = [fit.canonical().rounded(scale_dtype) for fit in block.fits]
        quantized[:, start:end] = block.dense()
        if not bool(torch.isfinite(quantized[:, start:end]).all()):
            name = str(scale_dtype).removeprefix("torch.")
            raise ValueError(f"{where}: a scale leaves the range of {name}; use scale_dtype='float32'")
        if factor is not None and compensation != "none" and end < current.shape[1]:
            error = columns - quantized[:, start:end]
            current[:, end:] -= compensate(error, factor, start, end, compensation == "exact")
        blocks.append(block)
    return blocks, quantized


def _check(weight: Tensor, second_moment: Tensor | None, where: str) -> None:
    if weight.dim() != 2 or not weight.is_floating_point():
        raise ValueError(f"{where}: weight must be a floating-point matrix, got {weight.dtype} {tuple(weight.shape)}")
    if not bool(torch.isfinite(weight).all()):
        raise ValueError(f"{where}: weight holds NaN or infinity")
    if second_moment is None:
        return
    if tuple(second_moment.shape) != (weight.shape[1], weight.shape[1]):
        raise ValueError(
            f"{where}: second moment has shape {tuple(second_moment.shape)}, weight has {weight.shape[1]} columns"
        )
    if not bool(torch.isfinite(second_moment).all()):
        raise ValueError(f"{where}: second moment holds NaN or infinity")


def unpacked_parts(blocks: list[BlockFit], groups: int, salient_groups: int) -> dict[str, Any]:
    """Assemble the blocks of one layer into the parts that a ``binary`` weight is packed from.

    Args:
        blocks: all blocks, left to right, with scales >= 0.
        groups: G, groups of the plain columns.
        salient_groups: S of a block that has salient columns; blocks without leave their salient scales at 0.

    Returns:
        ``sign``, ``row_scale``, ``code``, ``row_shift``, ``col_scale``, ``salient``, ``sign2``, ``col_scale2`` and
        ``mask`` as ``BinaryFormat.pack`` takes them, None where the layer has no such part. Second signs of pruned
        weights are False, so that equal weights give equal bytes.
    """
    first = blocks[0].fits[-1]
    rows, device, dtype = blocks[0].code.shape[0], blocks[0].code.device, first.row_scale.dtype
    columns = blocks[-1].start + blocks[-1].code.shape[1]
    salient = torch.cat([block.salient + block.start for block in blocks])
    halves = salient_groups if len(salient) else 0

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=device)

    sign = torch.zeros((rows, columns), dtype=torch.bool, device=device)
    sign2 = torch.zeros((rows, len(salient)), dtype=torch.bool, device=device)
    row_scale, row_shift = zeros(2 * halves + groups, len(blocks), rows), zeros(halves + groups, len(blocks), rows)
    col_scale, col_scale2 = zeros(max(groups, halves), columns), zeros(max(halves, 1), len(salient))
    done = 0  # salient columns of the blocks so far
    for b, block in enumerate(blocks):
        missing = halves - block.salient_groups
        span = slice(done, done + len(block.salient))
        for number, fit in enumerate(block.fits):
            local, chosen, group = block.members(number)
            at = local + block.start
            sign[:, at] = torch.where(chosen, fit.sign > 0, sign[:, at])
            row_scale[number + missing, b] = fit.row_scale[:, 0]
            if fit.shift is not None:
                row_shift[number + missing, b] = fit.shift[:, 0]
            if fit.col_scale is not None:
                col_scale[group, at] = fit.col_scale[0]
            if fit.sign2 is not None:
                sign2[:, span] = torch.where(chosen, fit.sign2 > 0, sign2[:, span])
                row_scale[halves + groups + group, b] = fit.row_scale2[:, 0]
                if fit.col_scale2 is not None:
                    col_scale2[group, span] = fit.col_scale2[0]
        if block.keep is not None:
            sign2[:, span] &= block.keep[:, block.salient]
        done = span.stop
    has_columns = first.col_scale is not None
    if has_columns and halves == 1:
        col_scale[:, salient] = col_scale[0, salient]  # one group: both entries equal, whichever code is read
    masks = [torch.ones_like(block.code).bool() if block.keep is None else block.keep for block in blocks]
    return {
        "sign": sign,
        "row_scale": row_scale,
        "code": torch.cat([block.code for block in blocks], dim=1) if groups > 1 else None,
        "row_shift": row_shift if first.shift is not None else None,
        "col_scale": col_scale if has_columns else None,
        "salient": salient if len(salient) else None,
        "sign2": sign2 if len(salient) else None,
        "col_scale2": col_scale2 if has_columns and len(salient) else None,
        "mask": torch.cat(masks, dim=1) if any(block.keep is not None for block in blocks) else None,
    }
