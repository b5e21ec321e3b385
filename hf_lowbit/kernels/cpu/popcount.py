"""Convolutions of signs on a processor: XOR and popcount of packed bits (``csrc/popcount*``).

Activations are packed along channels first, and the kernel then reads words of the taps that lie inside the image: no
patch is ever copied. Weights are put into the order in which they are read (64 channels of a tap to a word, eight
outputs side by side) once per weight, and kept as long as it lives, never saved.
"""

from __future__ import annotations

import ctypes
import functools
import logging
from typing import Any

import torch
from torch import Tensor

from hf_lowbit.kernels.cpu.library import DTYPES, open_library
from hf_lowbit.kernels.geometry import MOST_TAPS, ConvGeometry
from hf_lowbit.kernels.planes import unpack_plane
from hf_lowbit.kernels.triton.forms import Derived

logger = logging.getLogger(__name__)
ABI = 1
ISAS = ("portable", "avx2", "avx512")
_WORD, _LANES = 64, 8
# Fewer pairs of bits per thread than this are not worth starting threads for.
_PER_THREAD = 1 << 24
_DERIVED = Derived()


class _Signs(ctypes.Structure):
    """``hflb_pop_signs`` of ``csrc/popcount.h``."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("batch", "channels", "pixels", "groups", "words", "dtype")),
        *((name, ctypes.c_void_p) for name in ("x", "gain", "bias", "out")),
    )


_NUMBERS = (
    *("batch", "channels", "height", "width", "outs", "out_height", "out_width", "kernel_h", "kernel_w", "stride_h"),
    *("stride_w", "pad_h", "pad_w", "dilation_h", "dilation_w", "groups", "transposed", "words", "lanes"),
)


class _Conv(ctypes.Structure):
    """``hflb_pop_conv`` of ``csrc/popcount.h``."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in _NUMBERS),
        *((name, ctypes.c_void_p) for name in ("weight", "packed", "affine", "act", "y")),
    )


@functools.cache
def load() -> tuple[Any, str]:
    """Return the library and the name of the processor's instruction set, or None and why there is none."""
    library, reason = open_library("_popcount", "hflb_pop_abi", ABI)
    if library is None:
        return None, reason
    library.hflb_pop_pack.restype = library.hflb_pop_convolve.restype = None
    library.hflb_pop_pack.argtypes = [ctypes.POINTER(_Signs), ctypes.c_int64, ctypes.c_int64]
    library.hflb_pop_convolve.argtypes = [ctypes.POINTER(_Conv), ctypes.c_int64, ctypes.c_int64]
    library.hflb_pop_isa.restype = ctypes.c_int
    isa = ISAS[library.hflb_pop_isa()]
    if isa == "portable":
        logger.warning("this processor has no AVX2; convolutions of signs run through plain C++, which is slow")
    return library, isa


def unsupported(dtype: torch.dtype, device: str, geometry: ConvGeometry) -> str | None:
    """Return why this kernel cannot convolve, None if it can."""
    if device != "cpu":
        return f"tensors on {device}"
    library, reason = load()
    if library is None:
        return f"no compiled library: {reason}"
    if dtype not in DTYPES:
        return f"activations of {dtype}"
    if max(geometry.kernel) > MOST_TAPS:
        return f"a kernel of more than {MOST_TAPS} rows or columns"
    return None


def kernel_words(sign: Tensor, geometry: ConvGeometry, word: int = _WORD) -> Tensor:
    """Return a sign plane in the order in which kernels read it.

    Args:
        sign: (out_channels, plane_bytes), uint8.
        geometry: of the convolution.
        word: bits of a word, 32 or 64.

    Returns:
        (groups, taps, words, lanes), int32 or int64: bit c of word w is channel ``word · w + c`` of the group; lanes
        are the outputs of the group, rounded up to eight.
    """
    rows = geometry.out_channels // geometry.groups
    bits = unpack_plane(sign, geometry.columns).view(geometry.groups, rows, geometry.group_channels, geometry.taps)
    padding = (-geometry.group_channels % word, -rows % _LANES)
    bits = torch.nn.functional.pad(bits.permute(0, 3, 1, 2), (0, padding[0], 0, padding[1]))  # (groups, taps, rows, c)
    shifts = torch.arange(8, dtype=torch.uint8, device=sign.device)
    packed = (bits.to(torch.uint8).unflatten(-1, (-1, 8)) << shifts).sum(-1, dtype=torch.uint8)
    dtype = torch.int64 if word == _WORD else torch.int32
    return packed.contiguous().view(dtype).transpose(2, 3).contiguous()


def _floats(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach().float().contiguous()


def _pointer(tensor: Tensor | None, row: int = 0) -> int | None:
    return None if tensor is None else tensor.data_ptr() + row * tensor.stride(0) * tensor.element_size()


def pack_activations(
    x: Tensor, shift: Tensor | None, geometry: ConvGeometry, isa: int | None = None, threads: int = 1
) -> Tensor:
    """Return the signs of activations.

    Args:
        x: (batch, channels, height, width), contiguous, float32, float16 or bfloat16.
        shift: (channels,) or (2, channels), float32, or None.
        geometry: of the convolution that reads them.
        isa: index in :data:`ISAS`, at most the processor's; None for that.
        threads: to use.

    Returns:
        (batch, pixels, groups, words), int64.
    """
    library, best = load()
    pixels, words = x.shape[2] * x.shape[3], -(-geometry.group_channels // _WORD)
    out = torch.empty((x.shape[0], pixels, geometry.groups, words), dtype=torch.int64)
    two = shift is not None and shift.dim() == 2
    job = _Signs(
        x.shape[0], x.shape[1], pixels, geometry.groups, words, DTYPES[x.dtype], x.data_ptr(),
        _pointer(shift) if two else None, _pointer(shift, 1 if two else 0), out.data_ptr(),
    )  # fmt: skip
    library.hflb_pop_pack(ctypes.byref(job), ISAS.index(best) if isa is None else isa, threads)
    return out


def binary_conv(
    x: Tensor,
    sign: Tensor,
    shift: Tensor | None,
    affine: Tensor | None,
    act: Tensor | None,
    geometry: ConvGeometry,
    isa: int | None = None,
) -> Tensor:
    """Convolve; arguments and result as in :mod:`hf_lowbit.kernels.conv`, ``isa`` as in :func:`pack_activations`."""
    library, best = load()
    level = ISAS.index(best) if isa is None else min(isa, ISAS.index(best))
    height, width = x.shape[2:]
    out_height, out_width = geometry.output_size(height, width)
    y = torch.empty(
        (x.shape[0], geometry.out_channels, out_height, out_width),
        dtype=torch.int32 if affine is None else torch.float32,
    )
    if not y.numel():
        return y if affine is None else y.to(x.dtype)
    work = y.numel() * geometry.columns
    threads = max(1, min(torch.get_num_threads(), work // _PER_THREAD))
    weight = _DERIVED.get(("words", geometry), (sign,), lambda: kernel_words(sign.detach(), geometry))
    packed = pack_activations(x.detach().contiguous(), _floats(shift), geometry, level, threads)
    scales, slopes = _floats(affine), _floats(act)
    job = _Conv(
        x.shape[0], x.shape[1], height, width, geometry.out_channels, out_height, out_width, *geometry.kernel,
        *geometry.stride, *geometry.padding, *geometry.dilation, geometry.groups, int(geometry.transposed),
        weight.shape[2], weight.shape[3], weight.data_ptr(), packed.data_ptr(), _pointer(scales), _pointer(slopes),
        y.data_ptr(),
    )  # fmt: skip
    library.hflb_pop_convolve(ctypes.byref(job), level, threads)
    return y if affine is None else y.to(x.dtype)
