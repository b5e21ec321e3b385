"""DVD-Quant: data-free W4A4 to W4A8 for video diffusion transformers (arXiv 2505.18663)."""

from __future__ import annotations

from typing import Any

import torch

from hf_lowbit.formats import IntegerFormat, IntegerSpec
from hf_lowbit.methods.dvd_quant.algorithm import quantize, spec_of
from hf_lowbit.methods.dvd_quant.options import DVDQuantConfig
from hf_lowbit.methods.dvd_quant.places import cannot_take, reason_to_leave, rounds_activations
from hf_lowbit.registry import LinearUnit, Method, register

__all__ = ["DVDQuantConfig"]


def _compress(unit: LinearUnit, stats: Any, options: DVDQuantConfig) -> IntegerFormat:
    moment = None if stats is None else stats.second_moment(torch.float64)
    return quantize(unit.weight, options, unit.name, rounds_activations(unit.name, options), moment)


def _largest(name: str, shape: tuple[int, int], options: DVDQuantConfig, dtype: Any) -> IntegerSpec:
    return spec_of(shape, options, rounds_activations(name, options))


register(
    Method(
        name="dvd_quant",
        title="DVD-Quant",
        summary="integer weights and activations without data: rotation, searched grids, bits that follow the steps",
        paper="2505.18663",
        config=DVDQuantConfig,
        unit="linear",
        needs="none",
        format="integer",
        status="works: BGR, block and full rotation, four scales of activations, balance; W4A16 to W4A4",
        compress=_compress,
        largest=_largest,
        leaves_dense=reason_to_leave,
        cannot_take=cannot_take,
    )
)
