"""Products with an ``integer`` weight on a processor, straight from the packed codes.

Few tokens: the compiled library multiplies bytes, codes by activations. Activations are integers, too: of one byte
where the layer rounds them (:mod:`hf_lowbit.kernels.activation`), and else of three bytes for float32 (relative error
about 1e-7), two for bfloat16 and float16 (2e-5) or one (6e-3, the opt-in fast mode), with one scale for 128 columns.
With AMX and some more tokens the same bytes go through tiles. Many tokens: some rows at a time are unpacked to the
dtype of the activations and multiplied there by torch.

Nothing is copied or kept beside the stored tensors.
"""

from __future__ import annotations

import ctypes
import functools
import logging
from typing import Any

import torch
from torch import Tensor

from hf_lowbit.kernels.cpu.calls import DIGITS, Call
from hf_lowbit.kernels.cpu.library import DTYPES, open_library
from hf_lowbit.kernels.cpu.scratch import multiply_unpacked

logger = logging.getLogger(__name__)
ABI = 1
ISAS = ("portable", "avx2", "avx512")
# Above so many tokens tiles pay, and above how many unpacking, with tiles (by dtype) and without; measured with
# `python -m benchmarks.kernels.integer`.
LEAST_TOKENS_TILES, MOST_TOKENS = 4, 16
MOST_TOKENS_TILES = {torch.float32: 256, torch.float16: 64, torch.bfloat16: 64}
CANNOT = 3  # of the library: these groups do not go through tiles
# Neighbouring columns whose products the library adds before it looks at a scale, by the bits of a code.
LANE_COLUMNS = {2: 16, 3: 4, 4: 8, 8: 4}
Parts = tuple[Tensor, Tensor, Tensor | None]  # packed, scale, zero_point
Sizes = tuple[int, ...]  # in_features, bits, group_size


class Weight(ctypes.Structure):
    """``hfli_weight`` of ``csrc/integer.h``."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("rows", "columns", "bits", "group_size", "groups", "row_bytes")),
        *((name, ctypes.c_int64) for name in ("zero_bytes", "scale_dtype")),
        *((name, ctypes.c_void_p) for name in ("codes", "scale", "zero")),
    )


class Job(ctypes.Structure):
    """``hfli_job`` of ``csrc/integer.h``."""

    _fields_ = (("weight", ctypes.POINTER(Weight)), ("bias", ctypes.c_void_p), ("y", ctypes.c_void_p))


@functools.cache
def load() -> tuple[Any, str]:
    """Return the library and the name of the processor's instruction set, or None and why there is none."""
    library, reason = open_library("_integer", "hfli_abi", ABI)
    if library is None:
        return None, reason
    pointer, integer = ctypes.c_void_p, ctypes.c_int64
    for name, types in {
        "isa": [],
        "linear": [ctypes.POINTER(Job), integer, pointer, *[integer] * 5],
        "product": [ctypes.POINTER(Job), pointer, pointer, *[integer] * 5],
        "product_amx": [ctypes.POINTER(Job), pointer, pointer, *[integer] * 4],
        "linear_amx": [ctypes.POINTER(Job), pointer, *[integer] * 4],
        "round": [pointer, pointer, integer, integer, pointer, pointer, integer, integer],
        "dequantize": [ctypes.POINTER(Weight), integer, integer, pointer, integer, integer, integer],
        "has_amx": [],
    }.items():
        function = getattr(library, f"hfli_{name}")
        function.restype, function.argtypes = ctypes.c_int, types
    return library, ISAS[library.hfli_isa()]


@functools.cache
def has_amx() -> bool:
    """Return whether the processor multiplies tiles of bytes and the system lets us use them."""
    library, _ = load()
    return library is not None and bool(library.hfli_has_amx())


def unsupported(dtype: torch.dtype, parts: Parts, sizes: Sizes) -> str | None:
    """Return why this kernel cannot multiply, None if it can.

    Looks at shapes and dtypes only, never at contents: every code and zero point is legal.

    Args:
        dtype: of the activations.
        parts: packed, scale and zero_point.
        sizes: in_features, bits, group_size.
    """
    packed, scale, zero = parts
    in_features, bits, group_size = sizes
    library, reason = load()
    if library is None:
        return f"no compiled library: {reason}"
    if dtype not in DTYPES or scale.dtype not in DTYPES:
        return f"activations of {dtype} and scales of {scale.dtype}"
    if bits not in LANE_COLUMNS:
        return f"codes of {bits} bits"
    rows, groups = scale.shape
    if groups > 1 and group_size % LANE_COLUMNS[bits]:
        return f"groups of {group_size} columns, not a multiple of {LANE_COLUMNS[bits]}"
    wanted = {
        "packed": (packed, (rows, -(-in_features * bits // 8)), torch.uint8),
        "scale": (scale, (rows, -(-in_features // group_size) if group_size else 1), scale.dtype),
        "zero_point": (zero, (rows, -(-groups * bits // 8)), torch.uint8),
    }
    for name, (part, shape, kind) in wanted.items():
        if part is not None and (tuple(part.shape) != shape or part.dtype != kind):
            return f"{name} is {part.dtype} {tuple(part.shape)}, expected {kind} {shape}"
    return None


def weight_of(parts: Parts, sizes: Sizes) -> tuple[Weight, Parts]:
    """Return a weight as the library wants it, and the tensors that it points into, which have to be kept alive."""
    packed, scale, zero = (None if part is None else part.contiguous() for part in parts)
    in_features, bits, group_size = sizes
    assert packed is not None and scale is not None  # noqa: S101 - for the type checker
    groups = scale.shape[1]
    found = Weight(
        rows=packed.shape[0],
        columns=in_features,
        bits=bits,
        group_size=group_size if groups > 1 else in_features,
        groups=groups,
        row_bytes=packed.shape[1],
        zero_bytes=0 if zero is None else zero.shape[1],
        scale_dtype=DTYPES[scale.dtype],
        codes=packed.data_ptr(),
        scale=scale.data_ptr(),
        zero=None if zero is None else zero.data_ptr(),
    )
    return found, (packed, scale, zero)


def call(parts: Parts, bias: Tensor | None, sizes: Sizes) -> Call | None:
    """Return a shorter way to :func:`linear` for a few tokens; :func:`unsupported` has nothing against the weight.

    None where the library would need copies of the tensors.
    """
    if not all(part is None or part.is_contiguous() for part in parts):
        return None
    (weight, kept), (library, isa) = weight_of(parts, sizes), load()
    most = LEAST_TOKENS_TILES - 1 if isa == ISAS[-1] and has_amx() else MOST_TOKENS
    tensors = [part for part in (*parts, bias) if part is not None]
    return Call(library.hfli_linear, ISAS.index(isa), Job, weight, sizes[0], most, bias, tensors, [], kept)


def linear(x: Tensor, parts: Parts, bias: Tensor | None, sizes: Sizes, digits: int = 0) -> Tensor:
    """Multiply: ``x @ W.T + bias``, as the op defines it.

    Args:
        x: (..., in_features), on the CPU.
        parts: packed, scale and zero_point; :func:`unsupported` has nothing against them.
        bias: (out_features,) or None.
        sizes: in_features, bits, group_size.
        digits: bytes of an activation; 0 for as many as its dtype needs.

    Returns:
        (..., out_features), in the dtype of ``x``.
    """
    weight, kept = weight_of(parts, sizes)
    x = x.contiguous()
    count = x.numel() // sizes[0]
    bias = None if bias is None else bias.to(x.dtype).contiguous()
    library, isa = load()
    out = torch.empty((*x.shape[:-1], weight.rows), dtype=x.dtype)
    job = Job(ctypes.pointer(weight), None if bias is None else bias.data_ptr(), out.data_ptr())
    given = (x.data_ptr(), DTYPES[x.dtype], count, digits or DIGITS[x.dtype])
    failed, threads = CANNOT, torch.get_num_threads()
    if LEAST_TOKENS_TILES <= count <= MOST_TOKENS_TILES[x.dtype] and isa == ISAS[-1] and has_amx():
        failed = library.hfli_linear_amx(ctypes.byref(job), *given, threads)
    if failed == CANNOT:
        if count > MOST_TOKENS:
            return _unpacking(x, weight, bias)
        failed = library.hfli_linear(ctypes.byref(job), 1, *given, ISAS.index(isa), threads)
    if failed == 1:  # NaN or infinity, which integers cannot hold
        return _unpacking(x, weight, bias)
    if failed:
        raise MemoryError("integer_linear: no memory for a scratch buffer")
    del kept
    return out


def _unpacking(x: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
    out = multiply_unpacked(x.view(-1, x.shape[-1]), weight.rows, functools.partial(unpack_rows, weight))
    out = out.view(*x.shape[:-1], weight.rows)
    return out if bias is None else out.add_(bias)


def unpack_rows(weight: Weight, start: int, end: int, out: Tensor) -> None:
    """Write rows of the dense weight into ``out``, (at least end - start, in_features), contiguous."""
    library, isa = load()
    if library.hfli_dequantize(
        ctypes.byref(weight), start, end, out.data_ptr(), DTYPES[out.dtype], ISAS.index(isa), torch.get_num_threads()
    ):
        raise MemoryError("integer_dequantize: no memory for a scratch buffer")


def dequantize(parts: Parts, sizes: Sizes) -> Tensor:
    """Return the dense weight, (out_features, in_features), float32."""
    weight, kept = weight_of(parts, sizes)
    out = torch.empty(weight.rows, sizes[0])
    unpack_rows(weight, 0, weight.rows, out)
    del kept
    return out
