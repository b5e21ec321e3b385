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

from typing import Any

import torch
from torch import Tensor

from hf_lowbit.formats.binary import SCALE_DTYPES, BinaryFormat, BinarySpec
from hf_lowbit.methods.arb.options import ARBConfig
from hf_lowbit.numerics import binary, partition
from hf_lowbit.numerics.binary import BinaryFit
from hf_lowbit.numerics.blocks import BlockFit, most_salient, sweep, unpacked_parts

Trace = list[dict[str, Any]] | None


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
    plain_rounding = options.variant == "rtn"

    def fit_block(columns: Tensor, start: int, spread: Tensor | None, moment: Tensor | None) -> BlockFit:
        if plain_rounding:
            return _one_group(columns, start)
        return _fit_block(columns, start, spread, moment, options, where, trace)

    return sweep(
        weight,
        second_moment,
        fit_block,
        block_size=options.block_size,
        damping=None if plain_rounding else options.damping,
        compensation=options.compensation,
        scale_dtype=SCALE_DTYPES[options.scale_dtype],
        where=where,
    )


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
    salient, plain, code = partition.groups_of_block(
        saliency,
        limit=options.max_salient_per_block,
        splits=options.group_splits,
        halves=options.salient_groups,
        thresholds=options.quantiles,
        judge=judge,
    )
    block = BlockFit(start, salient, plain, code, [], options.salient_groups if len(salient) else 0)
    row: dict[str, Any] = {"block": start, "salient": len(salient)}
    for number in range(block.salient_groups + options.group_splits + 1):
        in_salient = number < block.salient_groups
        index, mask, group = block.members(number)
        steps: list[float] | None = None if trace is None else []
        own = None if moment is None else moment[index][:, index]
        block.fits.append(_fit_group(columns[:, index], mask, own, 2 if in_salient else 1, options, steps))
        row[f"{'salient' if in_salient else 'plain'}_{group}"] = steps
    if trace is not None:
        trace.append(row)
    return block


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


def largest_spec(shape: tuple[int, int], options: ARBConfig) -> BinarySpec:
    """Return how a layer of shape (n, m) would be stored if every block had as many salient columns as it may."""
    plain = options.variant == "rtn"
    salient = 0 if plain else most_salient(shape[1], options.block_size, options.max_salient_per_block)
    return BinarySpec(
        out_features=shape[0],
        in_features=shape[1],
        block_size=options.block_size,
        groups=1 if plain else options.group_splits + 1,
        salient=salient,
        salient_groups=options.salient_groups if salient else 0,
        shift=options.variant in ("arb", "x", "billm"),
        col_scales=options.variant == "rc",
        scale_dtype=options.scale_dtype,
    )


def pack(blocks: list[BlockFit], columns: int, options: ARBConfig) -> BinaryFormat:
    """Assemble the blocks of one layer into a packed weight.

    Args:
        blocks: all blocks, left to right, with scales >= 0.
        columns: m.
        options: the options they were made with.

    Returns:
        The packed weight. Blocks without salient columns leave their salient scales at 0.
    """
    groups = 1 if options.variant == "rtn" else options.group_splits + 1
    parts = unpacked_parts(blocks, groups, options.salient_groups)
    salient = 0 if parts["salient"] is None else len(parts["salient"])
    spec = BinarySpec(
        out_features=blocks[0].code.shape[0],
        in_features=columns,
        block_size=options.block_size,
        groups=groups,
        salient=salient,
        salient_groups=options.salient_groups if salient else 0,
        shift=parts["row_shift"] is not None,
        col_scales=parts["col_scale"] is not None,
        scale_dtype=options.scale_dtype,
    )
    return BinaryFormat.pack(spec, **parts)
