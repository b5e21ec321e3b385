"""Which layers of a model DVD-Quant rounds, told by their names alone.

In diffusion transformers of diffusers the repeated blocks are called ``blocks``, ``transformer_blocks``,
``single_transformer_blocks`` or ``temporal_transformer_blocks``, in some ``layers`` or other names that a number
follows. The modulation inside them is ``norm…linear``, ``…modulation…`` or ``img_mod`` and ``txt_mod``. What lies
outside takes part in every token of every step (embedders, token refiners, the projections at both ends, the
modulation of time) and is small; it stays dense.

Source: the paper's Figure 3 names layers of HunyuanVideo's blocks, modulation among them, and no exclusions. Its
memory of 3.68 times less follows if all linear layers inside the blocks are packed and those outside are not.
"""

from __future__ import annotations

import re

from hf_lowbit.methods.dvd_quant.options import DVDQuantConfig
from hf_lowbit.numerics.rotation import full_order

# Rotations, groups and packed rows start at multiples of it.
COLUMNS = 16
_DIFFUSION = re.compile(r"(^|\.)((single_|temporal_)?transformer_)?blocks\.\d+\.")
_REPEATED = re.compile(r"(^|\.)[^.\d][^.]*\.\d+\.")
_MODULATION = re.compile(
    r"(^|\.)(norm[^.]*\.linear(_\d)?|[^.]*modulation[^.]*(\.[^.]+)?|(img|txt)_mod\.\d+)$", re.IGNORECASE
)
_OUTSIDE = re.compile(
    r"(^|\.)[^.]*(refiner|embed|caption_projection|time_proj|adaln_single|norm_out)[^.]*\.|(^|\.)(proj_in|proj_out)$"
)


def is_modulation(name: str) -> bool:
    """Return whether a layer makes shifts and scales of a block from the time embedding."""
    return bool(_REPEATED.search(name) and _MODULATION.search(name))


def outside(name: str) -> bool:
    """Return whether a layer lies outside the repeated blocks, or in the embedding of another input."""
    found = _DIFFUSION.search(name)
    before = name[: found.start()] + "." if found else name
    if _OUTSIDE.search(before):
        return True
    return found is None and _REPEATED.search(name) is None


def rounds_activations(name: str, options: DVDQuantConfig) -> bool:
    """Return whether the inputs of a layer are rounded, too."""
    return options.modulation == "full" or not is_modulation(name)


def reason_to_leave(name: str, shape: tuple[int, int], options: DVDQuantConfig) -> str | None:
    """Return why a layer stays dense, None if it does not.

    Args:
        name: full name of the module.
        shape: (out_features, in_features).
        options: of the method.
    """
    if options.layers == "blocks" and outside(name):
        return "outside the repeated blocks"
    if options.modulation == "skip" and is_modulation(name):
        return "modulation='skip'"
    return None


def cannot_take(name: str, shape: tuple[int, int], options: DVDQuantConfig) -> str | None:
    """Return why a layer that should be rounded cannot be, None if it can or should not; arguments as before."""
    if reason_to_leave(name, shape, options) is not None:
        return None
    if shape[1] % COLUMNS:
        return f"in_features {shape[1]} is not a multiple of {COLUMNS}"
    if options.rotation == "full" and not full_order(shape[1]):
        return f"no Hadamard matrix of order {shape[1]} is known here; rotation='block' needs none"
    return None
