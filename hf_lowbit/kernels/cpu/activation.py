"""Products with an ``integer`` weight of activations that are rounded to integers, on a processor.

Two calls of the compiled library: rows are divided, rotated by sums and differences and rounded, all in one pass over
a token; then codes are multiplied by codes, with AMX for many tokens and else as
:mod:`hf_lowbit.kernels.cpu.integer` does. Sums within a scale are exact, so results differ from the definition by the
order of a sum in float32, and where a rotated value lies so close to the middle between two codes that the last digit
of float32 decides.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import torch
from torch import Tensor

from hf_lowbit.kernels.cpu import integer
from hf_lowbit.kernels.cpu.library import DTYPES
from hf_lowbit.kernels.hadamard import core_entries, core_of

# From so many tokens AMX pays; measured with `python -m benchmarks.kernels.integer`.
LEAST_TOKENS_TILES = 8


class Transform(ctypes.Structure):
    """``hfli_transform`` of ``csrc/integer.h``."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("columns", "order", "core", "bits", "group_size")),
        *((name, ctypes.c_void_p) for name in ("core_matrix", "divisor")),
    )


def unsupported(parts: integer.Parts, sizes: Any) -> str | None:
    """Return why activations cannot be rounded and multiplied here, None if they can.

    Args:
        parts: packed, scale and zero_point.
        sizes: :class:`hf_lowbit.kernels.activation.Sizes`, of modes token and token_group.
    """
    lane = integer.LANE_COLUMNS.get(sizes.bits, 1)
    if 0 < sizes.act_group_size < sizes.in_features and sizes.act_group_size % lane:
        return f"activations in groups of {sizes.act_group_size} columns, not a multiple of {lane}"
    stretch = min(size for size in (sizes.in_features, sizes.group_size, sizes.act_group_size) if size)
    if stretch >= 2**16:
        return f"{stretch} columns with one scale: sums of products may leave 32 bits"
    return integer.unsupported(torch.float32, parts, (sizes.in_features, sizes.bits, sizes.group_size))


@functools.cache
def _core(order: int) -> Tensor | None:
    """Return the factor of a Hadamard matrix that is no power of two, transposed, as the library wants it."""
    core = core_of(order) or 1
    return None if core == 1 else torch.tensor(core_entries(core), dtype=torch.float32).T.contiguous()


def round_rows(x: Tensor, smooth: Tensor | None, signs: Tensor | None, sizes: Any) -> tuple[Tensor, Tensor] | None:
    """Divide, rotate and round rows: the fused form of ``transform`` and ``quantize_activation``.

    Args:
        x: (tokens, columns), contiguous, float32, float16 or bfloat16.
        smooth: (columns,) or None.
        signs: (columns,), +1 and -1, or None.
        sizes: rotation, act_bits, and act_group_size or 0 for one scale a token.

    Returns:
        Codes (tokens, columns), int8, and scales (tokens, groups), float32; None where a value is not finite.
    """
    tokens, columns = x.shape
    divisor = smooth.float() if smooth is not None else None
    if signs is not None:  # dividing by a sign is multiplying by it
        divisor = signs.float() if divisor is None else divisor * signs
    divisor = None if divisor is None else divisor.contiguous()  # kept under a name while the library reads it
    group = min(sizes.act_group_size or columns, columns)
    order = sizes.rotation or 1
    matrix = _core(order)
    how = Transform(
        columns=columns,
        order=order,
        core=1 if matrix is None else matrix.shape[0],
        bits=sizes.act_bits,
        group_size=group,
        core_matrix=None if matrix is None else matrix.data_ptr(),
        divisor=None if divisor is None else divisor.data_ptr(),
    )
    codes = torch.empty((tokens, columns), dtype=torch.int8)
    scale = torch.empty((tokens, -(-columns // group)))
    library, isa = integer.load()
    failed = library.hfli_round(
        ctypes.byref(how), x.data_ptr(), DTYPES[x.dtype], tokens, codes.data_ptr(), scale.data_ptr(),
        integer.ISAS.index(isa), torch.get_num_threads(),
    )  # fmt: skip
    if failed == 2:
        raise MemoryError("integer_act_linear: no memory for a scratch buffer")
    return None if failed else (codes, scale)


def product(
    codes: Tensor,
    act_scale: Tensor,
    group_size: int,
    parts: integer.Parts,
    bias: Tensor | None,
    sizes: integer.Sizes,
    dtype: torch.dtype,
) -> Tensor:
    """Multiply codes by codes.

    Args:
        codes: (tokens, columns), int8.
        act_scale: (tokens, groups), float32.
        group_size: columns of an activation's group, 0 for all.
        parts: packed, scale and zero_point of the weight.
        bias: (out_features,) or None.
        sizes: in_features, bits, group_size of the weight.
        dtype: of the result.

    Returns:
        (tokens, out_features).
    """
    weight, kept = integer.weight_of(parts, sizes)
    tokens, shared = codes.shape[0], group_size or codes.shape[1]
    bias = None if bias is None else bias.to(dtype).contiguous()
    out = torch.empty((tokens, weight.rows), dtype=dtype)
    job = integer.Job(ctypes.pointer(weight), None if bias is None else bias.data_ptr(), out.data_ptr())
    library, isa = integer.load()
    given = (ctypes.byref(job), codes.data_ptr(), act_scale.data_ptr(), shared, DTYPES[dtype], tokens)
    failed, threads = integer.CANNOT, torch.get_num_threads()
    if tokens >= LEAST_TOKENS_TILES and isa == integer.ISAS[-1] and integer.has_amx():
        failed = library.hfli_product_amx(*given, threads)
    if failed == integer.CANNOT:
        failed = library.hfli_product(*given, integer.ISAS.index(isa), threads)
    if failed:
        raise MemoryError("integer_act_linear: no memory for a scratch buffer")
    del kept
    return out


def linear(x: Tensor, tensors: tuple[Any, ...], sizes: Any) -> Tensor | None:
    """Transform, round and multiply, as the op does for modes token and token_group.

    Args:
        x: (..., in_features).
        tensors: packed, scale, zero_point, bias, smooth, signs.
        sizes: :class:`hf_lowbit.kernels.activation.Sizes`.

    Returns:
        (..., out_features), dtype of ``x``; None where a value is not finite, which integers cannot hold.
    """
    packed, scale, zero, bias, smooth, signs = tensors[:6]
    rows = x.reshape(-1, sizes.in_features).contiguous()
    made = round_rows(rows, smooth, signs, sizes)
    if made is None:
        return None
    weight = (packed, scale, zero)
    own = (sizes.in_features, sizes.bits, sizes.group_size)
    return product(*made, sizes.act_group_size, weight, bias, own, x.dtype).view(*x.shape[:-1], packed.shape[0])
