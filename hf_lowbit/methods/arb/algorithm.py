"""ARB-LLM: one linear layer, in the paper's order. Tensors in, a packed ``binary`` weight out.

Per block of 128 columns: saliency, salient columns, groups, fit, compensation of the columns to the right. The fits
and searches are in :mod:`hf_lowbit.numerics`, shared with PBS²P.

======  =============  ======================================================
paper   here           meaning
======  =============  ======================================================
W       weight         (n, m); ``current`` carries the compensation
H, S    second_moment  (m, m), Σ x xᵀ up to a factor; S is its block diagonal
U, d    factor         upper Cholesky factor of (H + λI)⁻¹ and its diagonal
T       saliency       (n, k), W² / d² in a block
======  =============  ======================================================

Source: ARB-LLM (arXiv 2410.03129), Algorithm 1 and Eq. 2-14, and its release code; block loop from BiLLM
(arXiv 2402.04291) and GPTQ (arXiv 2210.17323).
Differs: ``compensation="exact"`` by default (see :func:`hf_lowbit.numerics.inverse.compensate`); scales are rounded to
their storage dtype *before* compensation, which then absorbs the rounding; columns that saw no input keep their
weights, since a zero does not survive binarization; sgn(0) = +1.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from hf_lowbit.formats.binary import SCALE_DTYPES, BinaryFormat, BinarySpec
from hf_lowbit.methods.arb.options import ARBConfig
from hf_lowbit.numerics import binary, partition
from hf_lowbit.numerics.binary import BinaryFit
from hf_lowbit.numerics.inverse import compensate, inverse_factor

Trace = list[dict[str, Any]] | None


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
    """

    start: int
    salient: Tensor
    plain: Tensor
    code: Tensor
    fits: list[BinaryFit]
    salient_groups: int

    def dense(self) -> Tensor:
        """Return the approximation of the block, (n, k)."""
        out = torch.zeros(self.code.shape, dtype=self.fits[-1].row_scale.dtype, device=self.code.device)
        for number, fit in enumerate(self.fits):
            in_salient = number < self.salient_groups
            columns = self.salient if in_salient else self.plain
            group = number if in_salient else number - self.salient_groups
            chosen = self.code[:, columns]
            if in_salient and self.salient_groups == 1:
                chosen = torch.zeros_like(chosen)
            out[:, columns] = torch.where(chosen == group, fit.dense(), out[:, columns])
        return out


def quantize(
    weight: Tensor, second_moment: Tensor | None, options: ARBConfig, where: str, trace: Trace = None
) -> BinaryFormat:
    """Binarize one linear layer.

    Args:
        weight: (n, m), floating; not modified. Computed in float32, or float64 if it is float64.
        second_moment: (m, m), any positive multiple of Σ x xᵀ over the layer's inputs, or None for a run without data.
        options: see :class:`ARBConfig`.
        where: name of the layer, for messages.
        trace: receives one row per block: errors of the fits by iteration, salient columns.

    Returns:
        The packed weight; ``unpack()`` is exactly what the compensation saw.

    Raises:
        ValueError: weight or second moment hold NaN or infinity, or their shapes disagree.
    """
    blocks, _ = quantize_blocks(weight, second_moment, options, where, trace)
    return pack(blocks, weight.shape[1], options)


def quantize_blocks(
    weight: Tensor, second_moment: Tensor | None, options: ARBConfig, where: str, trace: Trace = None
) -> tuple[list[BlockFit], Tensor]:
    """Fit all blocks, left to right.

    Returns:
        The fits and their dense form Q, (n, m), in the computing dtype.
    """
    _check(weight, second_moment, where)
    current = weight.detach().to(weight.dtype if weight.dtype == torch.float64 else torch.float32, copy=True)
    moment = None if second_moment is None else second_moment.to(current.dtype)
    plain_rounding = options.variant == "rtn"
    factor = None
    if second_moment is not None and not plain_rounding:
        factor = inverse_factor(second_moment, options.damping, where).to(current.dtype)
    quantized, blocks = torch.empty_like(current), []
    for start in range(0, current.shape[1], options.block_size):
        end = min(start + options.block_size, current.shape[1])
        columns = current[:, start:end]
        own_moment = None if moment is None else moment[start:end, start:end]
        if plain_rounding:
            block = _one_group(columns, start)
        else:
            spread = None if factor is None else factor.diagonal()[start:end]
            try:
                block = _fit_block(columns, start, spread, own_moment, options, where, trace)
            except ValueError as failure:  # a search that overflows knows no layer
                raise ValueError(f"{where}: {failure}") from failure
        dtype = SCALE_DTYPES[options.scale_dtype]
        block.fits = [fit.canonical().rounded(dtype) for fit in block.fits]
        quantized[:, start:end] = block.dense()
        if not bool(torch.isfinite(quantized[:, start:end]).all()):
            raise ValueError(f"{where}: a scale leaves the range of {options.scale_dtype}; use scale_dtype='float32'")
        if factor is not None and options.compensation != "none" and end < current.shape[1]:
            error = columns - quantized[:, start:end]
            current[:, end:] -= compensate(error, factor, start, end, options.compensation == "exact")
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


def _one_group(columns: Tensor, start: int) -> BlockFit:
    """Plain rounding of a block."""
    everything = torch.ones_like(columns, dtype=torch.bool)
    none = torch.empty(0, dtype=torch.int64, device=columns.device)
    every = torch.arange(columns.shape[1], device=columns.device)
    fit = binary.residual_binarization(columns, everything, order=1, shifted=False)
    return BlockFit(start, none, every, everything.to(torch.uint8) * 0, [fit], 0)


def _fit_block(
    columns: Tensor,
    start: int,
    spread: Tensor | None,
    moment: Tensor | None,
    options: ARBConfig,
    where: str,
    trace: Trace,
) -> BlockFit:
    """Partition a block and fit each group (steps 8-12 of the block loop)."""
    saliency = columns
    if spread is not None and options.salient_metric == "hessian":
        saliency = (columns / spread).square()
    judge = moment if options.variant == "x" else None
    salient = partition.salient_columns(saliency, options.max_salient_per_block)
    is_plain = torch.ones(columns.shape[1], dtype=torch.bool, device=columns.device)
    is_plain[salient] = False
    plain = is_plain.nonzero().squeeze(1)
    code = torch.zeros(columns.shape, dtype=torch.uint8, device=columns.device)
    code[:, plain] = _plain_groups(saliency, plain, judge, options)
    salient_groups = 0
    if len(salient):
        salient_groups = options.salient_groups
        if salient_groups > 1:
            code[:, salient] = _salient_halves(saliency, salient, options).to(torch.uint8)
    fits = []
    row: dict[str, Any] = {"block": start, "salient": len(salient)}
    for number in range(salient_groups + options.group_splits + 1):
        in_salient = number < salient_groups
        index = salient if in_salient else plain
        group = number if in_salient else number - salient_groups
        mask = (
            code[:, index] == group if not in_salient or salient_groups > 1 else torch.ones_like(code[:, index]).bool()
        )
        steps: list[float] | None = None if trace is None else []
        own = None if moment is None else moment[index][:, index]
        fits.append(_fit_group(columns[:, index], mask, own, 2 if in_salient else 1, options, steps))
        row[f"{'salient' if in_salient else 'plain'}_{group}"] = steps
    if trace is not None:
        trace.append(row)
    return BlockFit(start, salient, plain, code, fits, salient_groups)


def _levels(options: ARBConfig, like: Tensor) -> Tensor:
    return torch.linspace(0.1, 0.9, options.quantiles, dtype=torch.float64, device=like.device)


def _plain_groups(saliency: Tensor, plain: Tensor, judge: Tensor | None, options: ARBConfig) -> Tensor:
    """Group code, (n, k - c), of the columns that are not salient; the highest code is the first split's sparse group.

    With ``judge`` (ARB-X) the residual of the whole block counts, that of the salient columns included.
    """
    # Quantiles are taken over the whole block with everything already placed at zero, as in the release code.
    left = torch.zeros_like(saliency, dtype=torch.bool)
    left[:, plain] = True
    rest = None if judge is None else partition.split_residual(saliency, (~left,), order=2)
    code = torch.zeros(saliency.shape, dtype=torch.uint8, device=saliency.device)
    for group in range(options.group_splits, 0, -1):
        candidates = partition.quantiles((saliency * left).abs(), _levels(options, saliency))
        if judge is None and group == options.group_splits:  # everything is left: the quick search applies
            sparse = torch.zeros_like(left)
            sparse[:, plain] = partition.split_by_magnitude(saliency[:, plain], candidates, order=1)
        else:
            sparse = partition.split_by_magnitude(saliency, candidates, 1, left, judge, rest)
        code[sparse] = group
        left = left & ~sparse
        rest = None if rest is None else rest + partition.split_residual(saliency, (sparse,), order=1)
    return code[:, plain]


def _salient_halves(saliency: Tensor, salient: Tensor, options: ARBConfig) -> Tensor:
    """Column-group bitmap inside the salient columns, (n, c): True is the sparse half.

    The paper is silent on ARB-X here; the squared error of T decides in every variant.
    """
    values = saliency[:, salient]
    nonzero = values[values != 0].abs()
    if not len(nonzero):
        return torch.zeros_like(values, dtype=torch.bool)
    candidates = partition.quantiles(nonzero, _levels(options, values))
    return partition.split_by_magnitude(values, candidates, order=2)


def _fit_group(
    weight: Tensor, mask: Tensor, moment: Tensor | None, order: int, options: ARBConfig, steps: list[float] | None
) -> BinaryFit:
    if options.variant == "billm":
        return binary.residual_binarization(weight, mask, order)
    if options.variant == "arb":
        return binary.alternating(weight, mask, order, options.iterations, steps)
    if options.variant == "rc":
        return binary.row_column(weight, mask, order, options.iterations, steps)
    if moment is None:
        raise ValueError("variant 'x' needs the second moment of the inputs")
    return binary.alternating_on_inputs(weight, mask, moment, order, options.iterations, options.x_iterations, steps)


def pack(blocks: list[BlockFit], columns: int, options: ARBConfig) -> BinaryFormat:
    """Assemble the blocks of one layer into a packed weight.

    Args:
        blocks: all blocks, left to right, with scales >= 0.
        columns: m.
        options: the options they were made with.

    Returns:
        The packed weight. Blocks without salient columns leave their salient scales at 0.
    """
    rows, device = blocks[0].code.shape[0], blocks[0].code.device
    dtype = blocks[0].fits[-1].row_scale.dtype
    salient = torch.cat([block.salient + block.start for block in blocks])
    groups = 1 if options.variant == "rtn" else options.group_splits + 1
    halves = options.salient_groups if len(salient) else 0
    has_columns, has_shift = options.variant == "rc", options.variant in ("x", "arb", "billm")
    spec = BinarySpec(
        out_features=rows,
        in_features=columns,
        block_size=options.block_size,
        groups=groups,
        salient=len(salient),
        salient_groups=halves,
        shift=has_shift,
        col_scales=has_columns,
        scale_dtype=options.scale_dtype,
    )

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=device)

    sign = torch.zeros((rows, columns), dtype=torch.bool, device=device)
    sign2 = torch.zeros((rows, len(salient)), dtype=torch.bool, device=device)
    row_scale = zeros(2 * halves + groups, len(blocks), rows)
    row_shift = zeros(halves + groups, len(blocks), rows)
    col_scale, col_scale2 = zeros(max(groups, halves), columns), zeros(max(halves, 1), len(salient))
    code = torch.cat([block.code for block in blocks], dim=1)
    done = 0  # salient columns of the blocks so far
    for b, block in enumerate(blocks):
        missing = halves - block.salient_groups
        for number, fit in enumerate(block.fits):
            in_salient = number < block.salient_groups
            local = block.salient if in_salient else block.plain
            group = number if in_salient else number - block.salient_groups
            chosen = block.code[:, local] == group if not in_salient or halves > 1 else slice(None)
            at = local + block.start
            sign[:, at] = _merge(sign[:, at], fit.sign > 0, chosen)
            row_scale[number + missing, b] = fit.row_scale[:, 0]
            if fit.shift is not None:
                row_shift[number + missing, b] = fit.shift[:, 0]
            if fit.col_scale is not None:
                col_scale[group, at] = fit.col_scale[0]
            if fit.sign2 is not None and fit.row_scale2 is not None:
                span = slice(done, done + len(local))
                sign2[:, span] = _merge(sign2[:, span], fit.sign2 > 0, chosen)
                row_scale[halves + groups + group, b] = fit.row_scale2[:, 0]
                if fit.col_scale2 is not None:
                    col_scale2[group, span] = fit.col_scale2[0]
        done += len(block.salient)
    if has_columns and halves == 1:
        col_scale[:, salient] = col_scale[0, salient]  # one group: both entries equal, whichever code is read
    return BinaryFormat.pack(
        spec,
        sign=sign,
        row_scale=row_scale,
        code=code if groups > 1 else None,
        row_shift=row_shift if has_shift else None,
        col_scale=col_scale if has_columns else None,
        salient=salient if len(salient) else None,
        sign2=sign2 if len(salient) else None,
        col_scale2=col_scale2 if has_columns and len(salient) else None,
    )


def _merge(old: Tensor, new: Tensor, chosen: Any) -> Tensor:
    return new if isinstance(chosen, slice) else torch.where(chosen, new, old)
