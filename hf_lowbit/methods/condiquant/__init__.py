"""CondiQuant: 2 to 4-bit weights and activations for image super-resolution (arXiv 2502.15478)."""

from __future__ import annotations

from typing import Any

from hf_lowbit.formats import IntegerFormat
from hf_lowbit.formats.integer import IntegerSpec
from hf_lowbit.methods.condiquant.algorithm import fit
from hf_lowbit.methods.condiquant.model import attach, detach, finish
from hf_lowbit.methods.condiquant.options import CondiQuantConfig
from hf_lowbit.registry import LinearUnit, Method, register

__all__ = ["CondiQuantConfig"]

# Runs once for a table of positions, not for every pixel; what it gains would be lost in the scores of attention.
POSITIONS = "continuous_position_bias_mlp"


def _compress(unit: LinearUnit, stats: Any, options: CondiQuantConfig) -> IntegerFormat:
    found = fit(unit.weight, stats, options, unit.name, unit.trace)
    unit.changed = found.weight
    rows, columns = unit.weight.shape
    rounds = options.act_mode != "none"
    spec = IntegerSpec(
        out_features=rows,
        in_features=columns,
        bits=options.weight_bits,
        parts=len(found.bounds),
        activation=options.act_mode,
        act_bits=options.act_bits if rounds else IntegerSpec.act_bits,
    )
    return IntegerFormat.pack(spec, found.codes, bounds=found.bounds, act_bounds=found.act_bounds)


def _leaves_dense(name: str, shape: tuple[int, int], options: CondiQuantConfig) -> str | None:
    return "makes a table of positions" if POSITIONS in name.split(".") else None


register(
    Method(
        name="condiquant",
        title="CondiQuant",
        summary="2 to 4-bit weights and activations for super-resolution, weights conditioned before they are rounded",
        paper="2502.15478",
        config=CondiQuantConfig,
        unit="linear",
        needs="images",
        format="integer",
        status="works: W2A2 to W8A8, static or dynamic grids, attention of Swin2SR; grids learned on demand",
        compress=_compress,
        leaves_dense=_leaves_dense,
        finish=finish,
        attach=attach,
        detach=detach,
    )
)
