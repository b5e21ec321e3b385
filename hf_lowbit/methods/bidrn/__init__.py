"""BiDRN: convolutions with 1-bit weights and activations, and full-precision residuals (arXiv 2311.14323)."""

from __future__ import annotations

from typing import Any

from hf_lowbit.formats import BinaryConvFormat
from hf_lowbit.methods.bidrn.blocks import BiDRB, DownSample, DownScale, FusionDecrease, FusionIncrease, UpSample
from hf_lowbit.methods.bidrn.modules import BinaryConv2d, BinaryConvTranspose2d, BinaryUnit
from hf_lowbit.methods.bidrn.options import PLAIN, BiDRNConfig, UnitOptions
from hf_lowbit.registry import Method, register

__all__ = [
    "PLAIN",
    "BiDRB",
    "BiDRNConfig",
    "BinaryConv2d",
    "BinaryConvTranspose2d",
    "DownSample",
    "DownScale",
    "FusionDecrease",
    "FusionIncrease",
    "UnitOptions",
    "UpSample",
]


def _pack(unit: BinaryUnit, stats: Any, options: BiDRNConfig) -> BinaryConvFormat:
    return unit.packed(options.side_dtype)


register(
    Method(
        name="bidrn",
        title="BiDRN",
        summary="1-bit weights and activations in convolutions, trained, with residuals in full precision",
        paper="2311.14323",
        config=BiDRNConfig,
        unit="conv2d",
        needs="training",
        format="binary_conv",
        status="works: units, block, converter, the body-mesh network; the paper's module wiring is not public",
        compress=_pack,
    )
)
