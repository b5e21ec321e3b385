"""The compiled libraries: how they are found and checked, and that of ``binary`` with its functions' argument types.

They are plain C underneath (no torch, no Python), so one build serves every version of either.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.machinery
import logging
from pathlib import Path
from typing import Any

import torch

logger = logging.getLogger(__name__)
ABI = 5
ISAS = ("portable", "avx2", "avx512", "avx512bf16")
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_NAME = "_binary"


class Weight(ctypes.Structure):
    """``hflb_weight`` of ``csrc/binary.h``."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("rows", "columns", "blocks", "block_size", "runs", "used_runs")),
        *((name, ctypes.c_int64) for name in ("groups", "salient_groups", "scale_dtype")),
        *((name, ctypes.c_void_p) for name in ("sign", "group", "keep", "row_scale", "row_shift", "plain_scale")),
        *(
            (name, ctypes.c_void_p)
            for name in ("run_column", "run_block", "first_scale", "second_scale", "run_planes")
        ),
    )


class Job(ctypes.Structure):
    """``hflb_job`` of ``csrc/binary.h``."""

    _fields_ = (("weight", ctypes.POINTER(Weight)), ("bias", ctypes.c_void_p), ("y", ctypes.c_void_p))


def open_library(name: str, abi: str, version: int) -> tuple[Any, str]:
    """Open a compiled library of this folder.

    Args:
        name: of its file, without the ending.
        abi: function of the library that returns the version of its interface.
        version: that is needed.

    Returns:
        The library and nothing, or None and why there is none.
    """
    folder = Path(__file__).parent
    found = [folder / f"{name}{suffix}" for suffix in importlib.machinery.EXTENSION_SUFFIXES]
    file = next((path for path in found if path.exists()), None)
    if file is None:
        return None, "it was not built: there was no C++ compiler when the package was installed"
    try:
        library = ctypes.CDLL(str(file))
        if getattr(library, abi)() != version:
            return None, "it was built for another version of the package; install the package again"
    except (OSError, AttributeError) as error:
        logger.debug("%s", error)
        return None, f"it cannot be loaded ({type(error).__name__})"  # the message may quote a path
    return library, ""


@functools.cache
def load() -> tuple[Any, str]:
    """Return the library of ``binary`` and the processor's instruction set, or None and why there is none."""
    library, reason = open_library(_NAME, "hflb_abi", ABI)
    if library is None:
        return None, reason
    library.hflb_isa.restype = ctypes.c_int
    pointer, integer = ctypes.c_void_p, ctypes.c_int64
    library.hflb_linear.restype = ctypes.c_int
    library.hflb_linear.argtypes = [
        ctypes.POINTER(Job), integer, pointer, integer, integer, integer, integer, integer,
    ]  # fmt: skip
    library.hflb_dequantize.restype = ctypes.c_int
    library.hflb_dequantize.argtypes = [
        ctypes.POINTER(Weight), integer, integer, pointer, integer, integer, integer, integer,
    ]  # fmt: skip
    library.hflb_has_amx.restype = library.hflb_wide_amx.restype = ctypes.c_int
    library.hflb_wide_amx.argtypes = [ctypes.POINTER(Weight), pointer, integer, pointer, pointer, integer]
    isa = ISAS[library.hflb_isa()]
    if isa == "portable":
        logger.warning("this processor has no AVX2; packed layers run through plain C++, which is slow")
    return library, isa


@functools.cache
def has_amx() -> bool:
    """Return whether the processor multiplies tiles of bfloat16 and the system lets us use them."""
    library, _ = load()
    return library is not None and bool(library.hflb_has_amx())
