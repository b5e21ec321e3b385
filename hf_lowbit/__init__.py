"""Eight published compression methods behind ``quantization_config``, with packed storage and honest sizes.

>>> import hf_lowbit                                            # registers with transformers
>>> from hf_lowbit import ARBConfig
>>> config = ARBConfig(variant="rc", calibration="wikitext2")
>>> model = AutoModelForCausalLM.from_pretrained("org/model", quantization_config=config)  # doctest: +SKIP
>>> model.save_pretrained("model-1bit")  # doctest: +SKIP
>>> model = AutoModelForCausalLM.from_pretrained("model-1bit")  # doctest: +SKIP
"""

from __future__ import annotations

__version__ = "0.1.0"

from hf_lowbit.config import CalibrationRecord, LowBitConfig, RunOptions
from hf_lowbit.errors import CalibrationError, CheckpointError, HfLowbitError, UnsupportedModelError
from hf_lowbit.hf.transformers import quantize, register
from hf_lowbit.layers import PackedLinear, packed_modules
from hf_lowbit.methods.arb import ARBConfig
from hf_lowbit.recipe import LowBitRecipe

__all__ = [
    "ARBConfig",
    "CalibrationError",
    "CalibrationRecord",
    "CheckpointError",
    "HfLowbitError",
    "LowBitConfig",
    "LowBitRecipe",
    "PackedLinear",
    "RunOptions",
    "UnsupportedModelError",
    "packed_modules",
    "quantize",
    "register",
]

register()
