"""Published compression methods behind ``quantization_config``, with packed storage and honest sizes.

>>> import hf_lowbit                                            # registers with transformers and diffusers
>>> from hf_lowbit import ARBConfig
>>> config = ARBConfig(variant="rc", calibration="wikitext2")  # doctest: +SKIP
>>> model = AutoModelForCausalLM.from_pretrained("org/model", quantization_config=config)  # doctest: +SKIP
>>> model.save_pretrained("model-1bit")  # doctest: +SKIP
>>> model = AutoModelForCausalLM.from_pretrained("model-1bit")  # doctest: +SKIP

Importing is quick and silent: names are loaded when they are first used, and the package registers when transformers
or diffusers loads its quantizers, or at once if that has happened already.
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from hf_lowbit.cache import ReCalKVCache
    from hf_lowbit.config import CalibrationRecord, LowBitConfig, RunOptions
    from hf_lowbit.errors import CalibrationError, CheckpointError, HfLowbitError, HubError, UnsupportedModelError
    from hf_lowbit.hf.body_mesh import BiDRNForBodyMesh, BodyMeshConfig
    from hf_lowbit.hf.convs import binarize_convs, pack_convs
    from hf_lowbit.hf.delta_gbs import delta_gbs_report, disable_delta_gbs, enable_delta_gbs, reset_delta_gbs
    from hf_lowbit.hf.entry import quantize, register
    from hf_lowbit.hf.packed import unverified
    from hf_lowbit.hf.quantcache import apply_quantcache, remove_quantcache
    from hf_lowbit.layers import PackedLinear, packed_modules, set_act_bits
    from hf_lowbit.methods.adasvd import AdaSVDConfig
    from hf_lowbit.methods.arb import ARBConfig
    from hf_lowbit.methods.bidrn import BiDRNConfig
    from hf_lowbit.methods.condiquant import CondiQuantConfig
    from hf_lowbit.methods.dvd_quant import DVDQuantConfig
    from hf_lowbit.methods.pbs2p import PBS2PConfig
    from hf_lowbit.methods.quantcache import QuantCacheConfig
    from hf_lowbit.methods.recalkv import ReCalKVConfig
    from hf_lowbit.recipe import LowBitRecipe

_HOMES = {
    "ARBConfig": "methods.arb",
    "AdaSVDConfig": "methods.adasvd",
    "BiDRNConfig": "methods.bidrn",
    "BiDRNForBodyMesh": "hf.body_mesh",
    "BodyMeshConfig": "hf.body_mesh",
    "CalibrationError": "errors",
    "CalibrationRecord": "config",
    "CheckpointError": "errors",
    "CondiQuantConfig": "methods.condiquant",
    "DVDQuantConfig": "methods.dvd_quant",
    "HfLowbitError": "errors",
    "HubError": "errors",
    "LowBitConfig": "config",
    "LowBitRecipe": "recipe",
    "PBS2PConfig": "methods.pbs2p",
    "PackedLinear": "layers",
    "QuantCacheConfig": "methods.quantcache",
    "ReCalKVCache": "cache",
    "ReCalKVConfig": "methods.recalkv",
    "RunOptions": "config",
    "UnsupportedModelError": "errors",
    "apply_quantcache": "hf.quantcache",
    "delta_gbs_report": "hf.delta_gbs",
    "disable_delta_gbs": "hf.delta_gbs",
    "enable_delta_gbs": "hf.delta_gbs",
    "binarize_convs": "hf.convs",
    "pack_convs": "hf.convs",
    "packed_modules": "layers",
    "quantize": "hf.entry",
    "register": "hf.entry",
    "remove_quantcache": "hf.quantcache",
    "reset_delta_gbs": "hf.delta_gbs",
    "set_act_bits": "layers",
    "unverified": "hf.packed",
}

__all__ = [
    "ARBConfig",
    "AdaSVDConfig",
    "BiDRNConfig",
    "BiDRNForBodyMesh",
    "BodyMeshConfig",
    "CalibrationError",
    "CalibrationRecord",
    "CheckpointError",
    "CondiQuantConfig",
    "DVDQuantConfig",
    "HfLowbitError",
    "HubError",
    "LowBitConfig",
    "LowBitRecipe",
    "PBS2PConfig",
    "PackedLinear",
    "QuantCacheConfig",
    "ReCalKVCache",
    "ReCalKVConfig",
    "RunOptions",
    "UnsupportedModelError",
    "apply_quantcache",
    "binarize_convs",
    "delta_gbs_report",
    "disable_delta_gbs",
    "enable_delta_gbs",
    "pack_convs",
    "packed_modules",
    "quantize",
    "register",
    "remove_quantcache",
    "reset_delta_gbs",
    "set_act_bits",
    "unverified",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])


def _register_when_ready() -> None:
    """Register with the libraries that have their quantizers, and with the others as soon as they do."""
    from _hf_lowbit_autoload import LATE, install

    install()
    if any(module in sys.modules for module in LATE):
        __getattr__("register")()


_register_when_ready()
