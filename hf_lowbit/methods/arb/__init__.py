"""ARB-LLM: 1-bit weights by alternating refined binarization (arXiv 2410.03129)."""

from __future__ import annotations

from typing import Any

from hf_lowbit.formats import BinaryFormat, BinarySpec
from hf_lowbit.methods.arb.algorithm import largest_spec, quantize
from hf_lowbit.methods.arb.options import ARBConfig
from hf_lowbit.registry import LinearUnit, Method, register

__all__ = ["ARBConfig"]


def _compress(unit: LinearUnit, stats: Any, options: ARBConfig) -> BinaryFormat:
    moment = None if stats is None else stats.second_moment()
    return quantize(unit.weight, moment, options, unit.name, unit.trace)


def _largest(name: str, shape: tuple[int, int], options: ARBConfig, dtype: Any) -> BinarySpec:
    return largest_spec(shape, options)


register(
    Method(
        name="arb",
        title="ARB-LLM",
        summary="1-bit weights: alternating refined binarization with row and column scales and salient columns",
        paper="2410.03129",
        config=ARBConfig,
        unit="linear",
        needs="tokens",
        format="binary",
        status="works: rc, x, arb, baselines billm and rtn; reference kernel only",
        compress=_compress,
        largest=_largest,
    )
)
