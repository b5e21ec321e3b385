"""Storage formats: how the numbers of a method are held in memory and on disk."""

from hf_lowbit.formats.base import FORMATS, Format, Spec, register_format
from hf_lowbit.formats.binary import BinaryFormat, BinarySpec
from hf_lowbit.formats.binary_conv import BinaryConvFormat, BinaryConvSpec
from hf_lowbit.formats.integer import IntegerFormat, IntegerSpec
from hf_lowbit.formats.latent import LatentFormat, LatentSpec
from hf_lowbit.formats.low_rank import LowRankFormat, LowRankSpec

__all__ = [
    "FORMATS",
    "BinaryConvFormat",
    "BinaryConvSpec",
    "BinaryFormat",
    "BinarySpec",
    "Format",
    "IntegerFormat",
    "IntegerSpec",
    "LatentFormat",
    "LatentSpec",
    "LowRankFormat",
    "LowRankSpec",
    "Spec",
    "register_format",
]
