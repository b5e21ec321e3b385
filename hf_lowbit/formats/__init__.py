"""Storage formats: how the numbers of a method are held in memory and on disk."""

from hf_lowbit.formats.base import FORMATS, Format, Spec, register_format
from hf_lowbit.formats.binary import BinaryFormat, BinarySpec

__all__ = ["FORMATS", "BinaryFormat", "BinarySpec", "Format", "Spec", "register_format"]
