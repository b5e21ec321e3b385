"""What the package offers at its top for whichever library is there: registration, and compression in memory."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from typing import Any

from torch import nn

from hf_lowbit.compress import RunReport
from hf_lowbit.config import LowBitConfig
from hf_lowbit.hf import transformers as of_transformers

_TABLE_OF_DIFFUSERS = "diffusers.quantizers.auto"


def register() -> None:
    """Make transformers know the package, and diffusers if its quantizers are loaded; again does nothing.

    diffusers is never imported here: programs without pipelines need not wait for it, and it may not be installed.
    Where it is loaded later, the module that waits for it (``_hf_lowbit_autoload``) calls this again.
    """
    of_transformers.register()
    # a module is listed while it is still being executed; then its table is not there yet
    if hasattr(sys.modules.get(_TABLE_OF_DIFFUSERS), "AUTO_QUANTIZATION_CONFIG_MAPPING"):
        from hf_lowbit.hf import diffusers as of_diffusers

        of_diffusers.register()


def known_to_diffusers() -> bool | None:
    """Return whether diffusers knows the package once its quantizers are loaded, which this does; None without it."""
    if importlib.util.find_spec("diffusers") is None:
        return None
    table = importlib.import_module(_TABLE_OF_DIFFUSERS)
    return of_transformers.NAME in table.AUTO_QUANTIZER_MAPPING


def quantize(model: Any, config: LowBitConfig) -> RunReport:
    """Compress a model of transformers or diffusers that is already in memory, in place.

    Args:
        model: a dense ``PreTrainedModel``, or a dense ``ModelMixin`` of diffusers (not a pipeline).
        config: a method's config or a recipe; for diffusers one without calibration.

    Returns:
        The report of the run; the model can be saved with ``save_pretrained`` afterwards.

    Raises:
        TypeError: ``config`` is no config of this package, or ``model`` no model.
        ValueError: the model is quantized already; and all that :func:`hf_lowbit.compress.compress_model` raises.
    """
    if not isinstance(config, LowBitConfig):
        raise TypeError(f"config must be a config of hf_lowbit, such as ARBConfig, got {type(config).__name__}")
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model must be a model of transformers or diffusers, got {type(model).__name__}; of a pipeline, pass "
            "one of its models, such as pipeline.transformer"
        )
    if getattr(model, "hf_quantizer", None) is not None:
        raise ValueError(f"{type(model).__name__} is quantized already; load the dense checkpoint instead")
    mixin = getattr(sys.modules.get("diffusers.models.modeling_utils"), "ModelMixin", None)
    if mixin is not None and isinstance(model, mixin):
        from hf_lowbit.hf import diffusers as of_diffusers

        return of_diffusers.quantize(model, config)
    return of_transformers.quantize(model, config)
