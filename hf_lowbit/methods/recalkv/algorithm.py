"""ReCalKV: factors of one key or value projection, in the paper's order.

======  ============  ====================================================================================
paper   here          meaning
======  ============  ====================================================================================
W       weight        of the projection, (heads · rows, m)
X       inputs        known by their second moment ``Σ x xᵀ``
S       –             root of that second moment, which whitens; never formed for the factors
s       group size    heads that share a latent
L, R    down, up      factors, ``W_h ≈ up_h · down``; the output of ``down`` is what a cache holds
======  ============  ====================================================================================

Source: ReCalKV (arXiv 2505.24357): head-wise similarity and reordering, grouped decomposition, calibration of values;
Palu (arXiv 2407.21118) for the whitened decomposition of grouped heads.
Differs: the whitened decomposition comes from the eigenvectors of W G Wᵀ, which needs no inverse and no positive
definite G (:func:`hf_lowbit.numerics.low_rank.truncate`). Heads keep their order: each has its own rows of the
up-projection, so nothing is permuted and biases stay where they are. The alternating calibration of values is replaced
by the minimum it converges to: started from the whitened decomposition *of the same inputs* it changes nothing, so
what matters is which inputs, and that is the option ``ocmf``.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hf_lowbit.formats.latent import LatentFormat
from hf_lowbit.formats.low_rank import FACTOR_DTYPES
from hf_lowbit.methods.recalkv.options import ReCalKVConfig
from hf_lowbit.numerics import grouping, low_rank, ranks
from hf_lowbit.numerics.rotation import spreading
from hf_lowbit.registry import Projection

logger = logging.getLogger(__name__)
# Of the largest energy of a direction: below this it is none, and scaling it up would only bring in rounding errors.
_LEAST_ENERGY = 1e-8
_ALIKE = 0.02  # below this spread, similarities say nothing: a few directions of the inputs dominate all heads


@dataclasses.dataclass(frozen=True)
class Inputs:
    """Second moments of what a projection receives; each (m, m), float64, None where it was not gathered.

    Attributes:
        dense: Σ x xᵀ with the dense model's inputs.
        compressed: Σ x' x'ᵀ with what the compressed blocks before it produce.
        cross: Σ x x'ᵀ over the same tokens.
        gradients: (heads · rows, heads · rows), Σ g gᵀ with the gradients g of the loss with respect to the outputs.
    """

    dense: Tensor | None = None
    compressed: Tensor | None = None
    cross: Tensor | None = None
    gradients: Tensor | None = None


def factorize(
    weight: Tensor,
    projection: Projection,
    inputs: Inputs,
    options: ReCalKVConfig,
    trace: list[dict[str, Any]] | None = None,
) -> LatentFormat:
    """Factorize one projection.

    Args:
        weight: (heads · rows, m), floating; not modified. Computed in float64.
        projection: what it is part of.
        inputs: see :class:`Inputs`.
        options: see :class:`ReCalKVConfig`.
        trace: receives one row: groups, ranks, and the spread of the heads' similarity where it decides.

    Returns:
        The packed weight.

    Raises:
        ValueError: weight or moments hold NaN or infinity, shapes disagree, or rank and groups do not fit.
    """
    where = projection.name
    dtype = weight.dtype if options.factor_dtype == "auto" else FACTOR_DTYPES[options.factor_dtype]
    weight = weight.double()
    fit = options.fit_of(projection.part)
    moment = _moment(inputs.dense if fit == "off" else inputs.compressed, options, where)
    cross = _moment(inputs.cross, options, where) if fit == "cross" else None
    if not bool(torch.isfinite(weight).all()):
        raise ValueError(f"{where}: weight holds NaN or infinity")
    row: dict[str, Any] = {}
    metric = output_metric(inputs.gradients, projection, options, weight.device)
    groups = group_heads(weight, moment, projection, options, metric, row)
    group_ranks = ranks_of_groups(projection, groups, options)
    ups, downs = [], []
    for group, rank in zip(groups, group_ranks, strict=True):
        block = weight[rows_of(group, projection)]
        up, down = _factors(block, moment, cross, block_of(metric, group, projection), rank, options)
        if options.latent_bits < 16 and options.rotation:
            up, down = spread(up, down, moment)
        ups.append(up.unflatten(0, (len(group), -1)))
        downs.append(down)
    if trace is not None:
        trace.append({"groups": groups, "ranks": group_ranks, **row})
    return LatentFormat.pack(groups, ups, downs, dtype if dtype in FACTOR_DTYPES.values() else torch.float32)


def _factors(
    block: Tensor,
    moment: Tensor | None,
    cross: Tensor | None,
    metric: Tensor | None,
    rank: int,
    options: ReCalKVConfig,
) -> tuple[Tensor, Tensor]:
    """Best factors of the rows of one group; at full rank the rows themselves, which no rounding can change."""
    if rank == len(block) and cross is None:
        return torch.eye(rank, dtype=block.dtype, device=block.device), block
    root, inverse = (None, None) if metric is None else low_rank.metric_roots(metric, options.gradient_damping)
    weighted = block if root is None else root @ block
    if cross is not None and moment is not None:
        up, down = low_rank.regress(weighted, cross, moment, rank, options.damping)
    else:
        up, down = low_rank.truncate(weighted, moment, rank)
    return up if inverse is None else inverse @ up, down


def spread(up: Tensor, down: Tensor, moment: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return factors of the same product whose latents suffer least from being rounded on one scale per token.

    Rounding adds noise of the same size to every number of a latent, in proportion to the size of the whole. Scaled by
    ``a_i``, direction i of energy ``λ_i`` takes the noise ``Σ_j a_j² λ_j / a_i²``; the sum over i is least at
    ``a_i = λ_i^(-1/4)``, where it is ``(Σ √λ)²`` instead of ``r Σ λ``. Then all directions are mixed, so that none of
    the numbers stands out.

    Source: ReCalKV (arXiv 2505.24357) and Palu (arXiv 2407.21118) for the rotation; the scaling is ours.

    Args:
        up: (n, r), with columns that matter alike.
        down: (r, m).
        moment: (m, m), of the inputs, or None for the identity.
    """
    energy = (down * (down if moment is None else down @ moment)).sum(1)
    scale = energy.clamp(min=_LEAST_ENERGY * float(energy.max())).pow(-0.25) if bool(energy.any()) else energy + 1.0
    mix = spreading(len(down)).to(down.device)
    return (up / scale) @ mix.T, mix @ (scale[:, None] * down)


def rows_of(group: Sequence[int], projection: Projection) -> Tensor:
    """Return the indices of the rows of some heads."""
    rows = projection.rows
    return torch.cat([torch.arange(head * rows, (head + 1) * rows) for head in group])


def block_of(metric: Tensor | None, group: Sequence[int], projection: Projection) -> Tensor | None:
    """Return the part of a metric of outputs that is for some heads; None where it is zero, which says nothing."""
    if metric is None:
        return None
    index = rows_of(group, projection)
    block = metric[index][:, index]
    return block if bool(block.any()) else None


def output_metric(
    gradients: Tensor | None, projection: Projection, options: ReCalKVConfig, device: torch.device
) -> Tensor | None:
    """Return how much errors of the outputs matter: the loss's gradients squared, with mean 1, or None for all alike.

    To second order and for the loss's own distribution, an error ``e`` of the outputs for a token costs ``eᵀ F e / 2``
    with the Fisher matrix F of the outputs; ``Σ g gᵀ`` estimates it, and with inputs and gradients taken as
    independent the cost of factors is ``Tr(F E G Eᵀ)``.

    Source: K-FAC (arXiv 1503.05671) for that form; the paper weighs all outputs alike, which is ``weighting="none"``.

    Args:
        gradients: (n, n), Σ g gᵀ, or None.
        projection: whose heads stand apart for ``weighting="loss_by_head"``.
        options: ``weighting``.
        device: of the result.

    Raises:
        ValueError: it holds NaN or infinity.
    """
    if gradients is None or options.weighting == "none":
        return None
    found = gradients.to(device, torch.float64)
    if not bool(torch.isfinite(found).all()):
        raise ValueError(f"{projection.name}: second moment of its gradients holds NaN or infinity")
    if options.weighting == "loss_by_head":
        found = by_head(found, projection)
    mean = found.diagonal().mean()
    return found / mean if float(mean) > 0 else None


def by_head(metric: Tensor, projection: Projection) -> Tensor:
    """Return a matrix over all rows without its entries between different heads."""
    heads = torch.arange(projection.shape[0], device=metric.device) // projection.rows
    return torch.where(heads[:, None] == heads, metric, 0.0)


def group_heads(
    weight: Tensor,
    moment: Tensor | None,
    projection: Projection,
    options: ReCalKVConfig,
    metric: Tensor | None = None,
    row: dict[str, Any] | None = None,
) -> list[list[int]]:
    """Choose which heads share a latent; only keys are regrouped.

    Args:
        weight: (heads · rows, m), float64.
        moment: (m, m), float64, or None.
        projection: the weight's.
        options: ``grouping`` and the group sizes.
        metric: how much errors of the outputs matter, see :func:`output_metric`; energies are weighed by it.
        row: receives ``similarity_spread`` where similarity decides.

    Returns:
        Heads of each group, rising.

    Source: ReCalKV (arXiv 2505.24357), head-wise similarity-aware reordering; ``energy`` is ours.
    """
    sizes = options.group_sizes(projection)
    in_order = grouping.contiguous(projection.heads, sizes[0])
    if projection.part != "key" or len(sizes) == 1 or max(sizes) == 1 or options.grouping == "contiguous":
        return in_order
    similarity = grouping.head_similarity(weight, moment, projection.heads)
    by_similarity = grouping.greedy(similarity, sizes)
    if options.grouping == "energy":
        if metric is not None:
            weight = low_rank.metric_roots(by_head(metric, projection), options.gradient_damping)[0] @ weight
        gram = low_rank.output_gram(weight, moment)
        group_ranks = ranks_of_groups(projection, in_order, options)
        return grouping.least_loss(gram, projection.heads, [in_order, by_similarity], group_ranks)
    off_diagonal = similarity[~torch.eye(projection.heads, dtype=torch.bool, device=similarity.device)]
    spread = float(off_diagonal.max() - off_diagonal.min())
    if row is not None:
        row["similarity_spread"] = spread
    if spread < _ALIKE:
        logger.info(
            "%s: similarities of its heads differ by %.4f only, groups by cka are close to chance; grouping='energy' "
            "looks at the error itself",
            projection.name,
            spread,
        )
    return by_similarity


def ranks_of_groups(projection: Projection, groups: Sequence[Sequence[int]], options: ReCalKVConfig) -> list[int]:
    """Divide the rank of a projection among its groups, in proportion to their heads."""
    return ranks.split(
        options.rank_of(projection), [len(group) for group in groups], options.most_of_groups(projection)
    )


def _moment(found: Tensor | None, options: ReCalKVConfig, where: str) -> Tensor | None:
    """Return a second moment to fit to, None where weights are fitted.

    Raises:
        ValueError: it holds NaN or infinity.
    """
    if found is None or not options.whiten:
        return None
    if not bool(torch.isfinite(found).all()):
        raise ValueError(f"{where}: second moment holds NaN or infinity")
    return found.double() if bool(found.any()) else None
