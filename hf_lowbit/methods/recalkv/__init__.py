"""ReCalKV: a key-value cache of latents, through low-rank key and value projections (arXiv 2505.24357)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from hf_lowbit.formats import LatentFormat
from hf_lowbit.methods.recalkv.algorithm import Inputs, block_of, factorize, group_heads, output_metric, rows_of
from hf_lowbit.methods.recalkv.options import ReCalKVConfig
from hf_lowbit.numerics import low_rank, ranks
from hf_lowbit.registry import LinearUnit, Method, Projection, register

__all__ = ["ReCalKVConfig"]


def _compress(unit: LinearUnit, stats: Any, options: ReCalKVConfig) -> LatentFormat:
    if unit.projection is None:
        raise ValueError(f"{unit.name}: recalkv compresses key and value projections of an attention only")
    inputs = Inputs()
    if stats is not None:
        seen = [stats.dense, stats.compressed]
        dense, compressed = (None if one is None else one.second_moment(torch.float64) for one in seen)
        # the same scale as the other two: see LinearStats.second_moment
        scale = 2.0 / seen[1].sequences if stats.cross is not None else 1.0
        inputs = Inputs(dense, compressed, None if stats.cross is None else stats.cross * scale, stats.gradients)
    return factorize(unit.weight, unit.projection, inputs, options, unit.trace)


def _check(projections: Sequence[Projection], options: ReCalKVConfig) -> list[str]:
    """Return what stands against a run: groups that do not fit, ranks that vanish."""
    found = []
    for projection in projections:
        try:
            options.rank_of(projection) if options.layers is not None else options.uniform_rank(projection)
        except ValueError as error:
            found.append(str(error))
    return found


def _allocate(projections: Sequence[Projection], options: ReCalKVConfig, measures: Any) -> dict[str, int]:
    """Return the rank of every projection under one budget; nothing where all have the same ratio, or are given."""
    if options.layers is not None or options.rank_allocation == "uniform":
        return {}
    budget = math.floor(options.ratio * sum(projection.shape[0] for projection in projections) + 1e-6)
    names = [projection.name for projection in projections]
    gradients: dict[str, Any] = {}
    if options.rank_allocation == "fisher_uniform" or options.weighting != "none":
        gradients = measures.gradients(names, options.gradient_samples, options.gradient_length, options.returning)
    if options.rank_allocation == "fisher_uniform":
        shares = [gradients[name].fisher for name in names]
    else:
        energies = _energies(projections, options, measures, gradients)
        shares = [float(count) for count in ranks.above_threshold(energies, budget)]
    least, most, steps = zip(*(options.limits(projection) for projection in projections), strict=True)
    return dict(zip(names, ranks.allocate(shares, most, budget, steps, least), strict=True))


def _energies(
    projections: Sequence[Projection], options: ReCalKVConfig, measures: Any, gradients: Mapping[str, Any]
) -> list[list[float]]:
    """Return for every projection what each further rank gains, falling; over all its groups.

    Weighed by the loss, gains of different projections compare; all outputs alike, their shares of the whole do.
    """
    by_name = {projection.name: projection for projection in projections}
    found: dict[str, list[float]] = {}
    for name, weight, stats in measures.dense_inputs(list(by_name)):
        projection, weight = by_name[name], weight.double()
        moment = stats.second_moment(torch.float64) if options.whiten else None
        products = gradients[name].second_moment if gradients else None
        metric = output_metric(products, projection, options, weight.device)
        parts = []
        for group in group_heads(weight, moment, projection, options, metric):
            own = block_of(metric, group, projection)
            block = weight[rows_of(group, projection)]
            if own is not None:
                block = low_rank.metric_roots(own, options.gradient_damping)[0] @ block
            parts.append(low_rank.output_energies(block, moment))
        values = torch.cat(parts).sort(descending=True).values
        if metric is None:
            scale = 1 / total if (total := float(values.sum())) > 0 else 1.0
        else:
            scale = float(gradients[name].second_moment.diagonal().mean())  # which output_metric has divided by
        found[name] = (values * scale).tolist()
    return [found[projection.name] for projection in projections]


register(
    Method(
        name="recalkv",
        title="ReCalKV",
        summary="a cache of latents: low-rank key and value projections, fitted to the loss, ranks under one budget",
        paper="2505.24357",
        config=ReCalKVConfig,
        unit="attention",
        needs="tokens",
        format="latent",
        status="works: grouped keys, values in sequence, errors weighed by the loss or alike, three ways to ranks",
        compress=_compress,
        allocate=_allocate,
        check=_check,
    )
)
