"""ReCalKV: a key-value cache of latents, through low-rank key and value projections (arXiv 2505.24357)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from hf_lowbit.formats import LatentFormat
from hf_lowbit.methods.recalkv.algorithm import Inputs, factorize, group_heads
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
        inputs = Inputs(dense, compressed, None if stats.cross is None else stats.cross * scale)
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
    if options.rank_allocation == "fisher_uniform":
        found = measures.fisher([p.name for p in projections], options.fisher_samples, options.fisher_length)
        shares = [found[projection.name] for projection in projections]
    else:
        shares = [float(count) for count in ranks.above_threshold(_energies(projections, options, measures), budget)]
    least, most, steps = zip(*(options.limits(projection) for projection in projections), strict=True)
    found = ranks.allocate(shares, most, budget, steps, least)
    return {projection.name: rank for projection, rank in zip(projections, found, strict=True)}


def _energies(projections: Sequence[Projection], options: ReCalKVConfig, measures: Any) -> list[list[float]]:
    """Return for every projection the energies of its outputs, falling, as shares of the whole; by group, if any."""
    by_name = {projection.name: projection for projection in projections}
    found: dict[str, list[float]] = {}
    for name, weight, stats in measures.dense_inputs(list(by_name)):
        moment = stats.second_moment(torch.float64) if options.whiten else None
        weight = weight.double()
        heads = weight.unflatten(0, (by_name[name].heads, -1))
        groups = group_heads(weight, moment, by_name[name], options)
        parts = [low_rank.output_energies(heads[group].flatten(0, 1), moment) for group in groups]
        values = torch.cat(parts).sort(descending=True).values
        total = float(values.sum())
        found[name] = (values / total if total > 0 else values).tolist()
    return [found[projection.name] for projection in projections]


register(
    Method(
        name="recalkv",
        title="ReCalKV",
        summary="a cache of latents: low-rank key and value projections, ranks by gradients under one budget",
        paper="2505.24357",
        config=ReCalKVConfig,
        unit="attention",
        needs="tokens",
        format="latent",
        status="works: groups by energy or similarity, ranks by gradients, energy or uniform, values in sequence",
        compress=_compress,
        allocate=_allocate,
        check=_check,
    )
)
