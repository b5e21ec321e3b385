"""AdaSVD: low-rank weights with adaptive compensation and adaptive ratios (arXiv 2502.01403)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from hf_lowbit.formats import LowRankFormat, LowRankSpec
from hf_lowbit.methods.adasvd.algorithm import factorize, largest_spec
from hf_lowbit.methods.adasvd.options import AdaSVDConfig, stays_dense
from hf_lowbit.methods.adasvd.ratios import filled, highest_factored, ratios_within_budget
from hf_lowbit.numerics.importance import importance_of
from hf_lowbit.registry import BlockUnit, LinearUnit, Method, register

__all__ = ["AdaSVDConfig"]


def _compress(unit: LinearUnit, stats: Any, options: AdaSVDConfig) -> LowRankFormat:
    moment = None if stats is None else stats.second_moment(torch.float64)
    tokens = None if stats is None else stats.tokens
    cross = getattr(stats, "cross", None)  # experts have none
    if cross is not None:
        cross = cross * (2.0 / stats.seen.sequences)  # as the second moment is
    stacked = getattr(stats, "stacked", None)
    return factorize(unit.weight, moment, options, unit.name, tokens, unit.trace, cross, stacked)


def _plan(
    blocks: list[BlockUnit], options: AdaSVDConfig, similarity: Callable[[], dict[str, float]]
) -> dict[str, Any]:
    """Return the ratio of every block; nothing where the same holds for all, or the config gives them."""
    known = options.layers or {}
    missing = [block for block in blocks if block.name not in known]
    if not missing:
        return {}
    if len(missing) < len(blocks):
        lacking = ", ".join(block.name for block in missing[:10])
        raise ValueError(f"layers gives a ratio for some blocks only; it lacks {lacking}")
    if options.importance == "uniform" or options.floor >= options.ratio or len(missing) == 1:
        return {block.name: options.ratio for block in missing} if known else {}
    cosines = similarity()
    importance = importance_of([cosines[block.name] for block in missing], options.importance)
    sizes, shapes = [block.weights for block in missing], [block.shapes for block in missing]
    high = 1.0
    if options.factors != "float":  # a dense layer would take several times the bytes of such factors
        high = max(options.ratio, highest_factored(shapes, options.rank_multiple))
    ratios = ratios_within_budget(importance, sizes, options.ratio, options.floor, high)
    ratios = filled(ratios, shapes, options.ratio * sum(sizes), options.rank_multiple, high)
    return dict(zip((block.name for block in missing), ratios, strict=True))


def _leaves_dense(name: str, shape: tuple[int, int], options: AdaSVDConfig) -> str | None:
    ratio = options.ratio_of(name)
    return (
        f"factors would save nothing at ratio {ratio:.4g}"
        if stays_dense(shape, ratio, options.rank_multiple)
        else None
    )


def _largest(name: str, shape: tuple[int, int], options: AdaSVDConfig, dtype: torch.dtype) -> LowRankSpec:
    return largest_spec(shape, options, name, dtype)


register(
    Method(
        name="adasvd",
        title="AdaSVD",
        summary="low-rank weights: two factors that keep the outputs, a ratio for each decoder block",
        paper="2502.01403",
        config=AdaSVDConfig,
        unit="linear",
        needs="tokens",
        format="low_rank",
        status="works: whitened truncation, adaComp, adaCR, baseline svd; factors plain, integer or of another method",
        compress=_compress,
        plan=_plan,
        largest=_largest,
        leaves_dense=_leaves_dense,
    )
)
