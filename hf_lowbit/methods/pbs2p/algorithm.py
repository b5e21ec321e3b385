"""PBS²P: one linear layer. Tensors in, a packed ``binary`` weight with an N:M mask out.

Per block of columns: partition into groups (as ARB-LLM does, on the unpruned block), ranks of the weights in their
groups of M, dense start by alternating refinement, pruning in steps (:mod:`hf_lowbit.methods.pbs2p.spbo`),
compensation of the columns to the right. What both methods need is in :mod:`hf_lowbit.numerics`.

======  =============  =================================================================
paper   here           meaning
======  =============  =================================================================
W       weight         (n, m); a block carries the compensation of those before it
S       moment         (k, k), Σ x xᵀ up to a factor, of the block's columns
d       spread         (k,), diagonal of the upper Cholesky factor of (H + λI)⁻¹
E       score          (n, k), W² / d²: what a weight's removal costs (optimal brain surgeon)
N:M     n, m           kept of each group of neighbouring columns of a row
======  =============  =================================================================

Source: PBS²P (arXiv 2502.01705): abstract, overview figures, tables, public reviews; its body and code were not to be
had. Groups, dense start and block loop: ARB-LLM (arXiv 2410.03129) by the same authors.
Differs: see :mod:`~hf_lowbit.methods.pbs2p.spbo` and :mod:`~hf_lowbit.methods.pbs2p.search`. Salient columns are
pruned like all others. A layer with N = M has no mask: it is ARB-X with all groups solved together.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hf_lowbit.formats.binary import SCALE_DTYPES, BinaryFormat, BinarySpec
from hf_lowbit.methods.pbs2p import search, spbo
from hf_lowbit.methods.pbs2p.options import PBS2PConfig
from hf_lowbit.numerics import binary, partition
from hf_lowbit.numerics.blocks import BlockFit, most_salient, sweep, unpacked_parts

Trace = list[dict[str, Any]] | None
# groups option -> groups of the plain columns, of the salient columns
_GROUPS = {"cgb": (2, 2), "billm": (2, 1), "none": (1, 0)}


def quantize(
    weight: Tensor, second_moment: Tensor | None, options: PBS2PConfig, where: str, trace: Trace = None
) -> BinaryFormat:
    """Prune and binarize one linear layer.

    Args:
        weight: (n, m), floating; not modified. Blocks are solved in float64.
        second_moment: (m, m), any positive multiple of Σ x xᵀ over the layer's inputs, or None for a run without data.
        options: see :class:`PBS2PConfig`; ``where`` decides which N of ``options.layers`` holds.
        where: name of the layer.
        trace: receives one row per block: salient columns, and the error of every pruning step.

    Returns:
        The packed weight; ``unpack()`` is exactly what the compensation saw.

    Raises:
        ValueError: weight or second moment hold NaN or infinity, or their shapes disagree; the layer is in no block
            that ``options.layers`` gives an N for.
    """
    blocks, _ = quantize_blocks(weight, second_moment, options, where, trace)
    groups, halves = _GROUPS[options.groups]
    parts = unpacked_parts(blocks, groups, halves)
    salient = 0 if parts["salient"] is None else len(parts["salient"])
    return BinaryFormat.pack(_spec(weight.shape, salient, options, where), **parts)


def largest_spec(shape: tuple[int, int], options: PBS2PConfig, where: str) -> BinarySpec:
    """Return how a layer of shape (n, m) would be stored if every block had as many salient columns as it may."""
    halves = _GROUPS[options.groups][1]
    salient = most_salient(shape[1], options.block_size, options.max_salient_per_block) if halves else 0
    return _spec(shape, salient, options, where)


def _spec(shape: Sequence[int], salient: int, options: PBS2PConfig, where: str) -> BinarySpec:
    """How a layer of shape (n, m) with this many salient columns is stored; with N = M there is no mask."""
    groups, halves = _GROUPS[options.groups]
    n = options.n_of(where)
    return BinarySpec(
        out_features=shape[0],
        in_features=shape[1],
        block_size=options.block_size,
        groups=groups,
        salient=salient,
        salient_groups=halves if salient else 0,
        shift=True,
        scale_dtype=options.scale_dtype,
        keep_n=n if n < options.m else 0,
        keep_m=options.m if n < options.m else 0,
    )


def quantize_blocks(
    weight: Tensor, second_moment: Tensor | None, options: PBS2PConfig, where: str, trace: Trace = None
) -> tuple[list[BlockFit], Tensor]:
    """Fit all blocks, left to right.

    Returns:
        The fits and their dense form Q, (n, m), in the computing dtype: float32, or float64 if the weight is float64.
    """
    n = options.n_of(where)

    def fit_block(columns: Tensor, start: int, spread: Tensor | None, moment: Tensor | None) -> BlockFit:
        return _fit_block(columns, start, spread, moment, n, options, trace)

    return sweep(
        weight,
        second_moment,
        fit_block,
        block_size=options.block_size,
        damping=options.damping,
        compensation=options.compensation,
        scale_dtype=SCALE_DTYPES[options.scale_dtype],
        where=where,
    )


def _fit_block(
    columns: Tensor,
    start: int,
    spread: Tensor | None,
    moment: Tensor | None,
    n: int,
    options: PBS2PConfig,
    trace: Trace,
) -> BlockFit:
    """Partition a block, fit it dense, prune it."""
    block = _partitioned(columns, start, spread, moment, options)
    ranks = search.prune_ranks(_score(columns, spread, moment, options), options.m)
    targets = range(options.m - 1, n - 1, -1) if options.stepwise else ([n] if n < options.m else [])
    masks = [search.keep_mask(ranks, target, options.m) for target in targets]
    if options.fit != "spbo":
        return _prune_first(block, columns, masks[-1] if masks else None, options)
    for number in range(_total_groups(block, options)):
        index, chosen, _ = block.members(number)
        order = 2 if number < block.salient_groups else 1
        block.fits.append(binary.alternating(columns[:, index], chosen, order, options.iterations))
    if moment is None:
        moment = torch.eye(columns.shape[1], dtype=columns.dtype, device=columns.device)
    steps: list[dict[str, Any]] | None = None if trace is None else []
    block = spbo.prune(
        block,
        columns,
        moment,
        masks,
        iterations=options.solver_iterations if options.solver == "alternating" else 0,
        refresh=options.refresh_signs,
        trace=steps,
    )
    if trace is not None:
        trace.append({"block": start, "salient": len(block.salient), "steps": steps})
    return block


def _total_groups(block: BlockFit, options: PBS2PConfig) -> int:
    return block.salient_groups + _GROUPS[options.groups][0]


def _partitioned(
    columns: Tensor, start: int, spread: Tensor | None, moment: Tensor | None, options: PBS2PConfig
) -> BlockFit:
    """Salient columns and groups of an unpruned block, without fits."""
    if options.groups == "none":
        every = torch.arange(columns.shape[1], device=columns.device)
        code = torch.zeros(columns.shape, dtype=torch.uint8, device=columns.device)
        return BlockFit(start, every[:0], every, code, [], 0)
    plain_groups, halves = _GROUPS[options.groups]
    salient, plain, code = partition.groups_of_block(
        columns if spread is None else (columns / spread).square(),
        limit=options.max_salient_per_block,
        splits=plain_groups - 1,
        halves=halves,
        thresholds=options.quantiles,
        judge=moment if options.fit == "spbo" else None,
    )
    return BlockFit(start, salient, plain, code, [], halves if len(salient) else 0)


def _score(columns: Tensor, spread: Tensor | None, moment: Tensor | None, options: PBS2PConfig) -> Tensor:
    """What decides which weights of a group are kept, (n, k), >= 0."""
    if options.score == "hessian" and spread is not None:
        return (columns / spread).square()
    if options.score == "wanda" and moment is not None:
        return columns.abs() * moment.diagonal().sqrt()
    return columns.abs()


def _prune_first(block: BlockFit, columns: Tensor, keep: Tensor | None, options: PBS2PConfig) -> BlockFit:
    """The baselines: every group is fitted to what is left of it after pruning, once, without the inputs."""
    for number in range(_total_groups(block, options)):
        index, chosen, _ = block.members(number)
        mask = chosen if keep is None else chosen & keep[:, index]
        order = 2 if number < block.salient_groups else 1
        if options.fit == "plain":
            block.fits.append(binary.residual_binarization(columns[:, index], mask, order))
        else:
            block.fits.append(binary.alternating(columns[:, index], mask, order, options.iterations))
    block.keep = keep
    return block
