"""PBS²P: 1-bit weights with N:M sparsity (arXiv 2502.01705)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hf_lowbit.formats import BinaryFormat, BinarySpec
from hf_lowbit.methods.pbs2p.algorithm import largest_spec, quantize
from hf_lowbit.methods.pbs2p.options import PBS2PConfig
from hf_lowbit.methods.pbs2p.search import counts_within_budget
from hf_lowbit.numerics.importance import importance_of
from hf_lowbit.registry import BlockUnit, LinearUnit, Method, register

__all__ = ["PBS2PConfig"]


def _compress(unit: LinearUnit, stats: Any, options: PBS2PConfig) -> BinaryFormat:
    moment = None if stats is None else stats.second_moment()
    return quantize(unit.weight, moment, options, unit.name, unit.trace)


def _largest(name: str, shape: tuple[int, int], options: PBS2PConfig, dtype: Any) -> BinarySpec:
    return largest_spec(shape, options, name)


def _plan(blocks: list[BlockUnit], options: PBS2PConfig, similarity: Callable[[], dict[str, float]]) -> dict[str, int]:
    """Return N of every block; nothing where the same N holds for all, or the config gives them."""
    known = options.layers or {}
    missing = [block.name for block in blocks if block.name not in known]
    if not missing:
        return {}
    if len(missing) < len(blocks):
        raise ValueError(f"layers gives N for some blocks only; it lacks {', '.join(missing[:10])}")
    if options.importance == "uniform" or options.limits == (options.n, options.n):
        return dict.fromkeys(missing, options.n) if known else {}
    cosines = similarity()
    importance = importance_of([cosines[name] for name in missing], options.importance)
    counts = counts_within_budget(importance, [block.weights for block in blocks], options.n, options.limits)
    return dict(zip(missing, counts, strict=True))


register(
    Method(
        name="pbs2p",
        title="PBS²P",
        summary="sparse 1-bit weights: N of every M kept, pruned in steps with scales solved anew after each",
        paper="2502.01705",
        config=PBS2PConfig,
        unit="linear",
        needs="tokens",
        format="binary",
        status="works: any N:M up to 16, own N per decoder block; baselines arb, plain",
        compress=_compress,
        plan=_plan,
        largest=_largest,
    )
)
