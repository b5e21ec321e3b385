"""Format ``integer`` on CUDA and ROCm devices: what is supported, how it is launched.

:mod:`hf_lowbit.kernels.integer` and :mod:`hf_lowbit.kernels.activation` are the definitions,
:mod:`hf_lowbit.kernels.triton.integer_kernels` holds the device code. Tile sizes and the number of pieces that
K is cut into come from :mod:`hf_lowbit.kernels.tuning`.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor

from hf_lowbit.kernels.hadamard import core_of, hadamard
from hf_lowbit.kernels.triton.binary import (
    BLOCK,
    FUSED,
    INTERPRETED,
    LIMIT,
    TYPES,
    device_names,
    reduce_arguments,
    unsupported_device,
)
from hf_lowbit.kernels.triton.binary_kernels import reduce_kernel
from hf_lowbit.kernels.triton.integer_kernels import codes_kernel, integer_kernel, round_kernel
from hf_lowbit.kernels.tuning import Settings, choose, split_count

Parts = tuple[Tensor, Tensor, Tensor | None]  # packed, scale, zero_point
UNIT = {2: (4, 1), 3: (8, 3), 4: (2, 1), 8: (1, 1)}  # codes and bytes of a unit, by bits
_TILE = 128  # columns, at most, of a tile whose values are made before the product
_MOST_BLOCK = 256  # columns that a program rounds, at most: Hadamard blocks and groups lie within


def unsupported(dtype: torch.dtype, parts: Parts, sizes: tuple[int, ...]) -> str | None:
    """Return why a weight cannot be multiplied with an input of ``dtype`` on its device, or None if it can.

    Args:
        dtype: of ``x``.
        parts: packed, scale and zero_point.
        sizes: in_features, bits, group_size.
    """
    packed, scale, zero = parts
    in_features, bits, group_size = sizes
    reason = None if packed.device.type == "meta" else unsupported_device(packed.device)
    if reason is not None:
        return reason
    if dtype not in TYPES or scale.dtype not in TYPES:
        return f"x of {dtype} and scales of {scale.dtype}"
    if bits not in UNIT:
        return f"codes of {bits} bits"
    rows, groups = packed.shape[0], -(-in_features // group_size) if group_size else 1
    if packed.numel() >= LIMIT or rows * groups >= LIMIT:
        return f"{rows} × {in_features} weights; tables of at most {LIMIT - 1} elements are addressed"
    for name, part, shape, kind in (
        ("packed", packed, (rows, -(-in_features * bits // 8)), torch.uint8),
        ("scale", scale, (rows, groups), scale.dtype),
        ("zero_point", zero, (rows, -(-groups * bits // 8)), torch.uint8),
    ):
        if part is None:
            continue
        if tuple(part.shape) != shape or part.dtype != kind:
            return f"{name} is {part.dtype} {tuple(part.shape)}, expected {kind} {shape}"
        if part.device != packed.device:
            return f"{name} is on {part.device}, packed on {packed.device}"
        if not part.is_contiguous():
            return f"{name} is not contiguous"
    return None


def units_of(bits: int, in_features: int, group_size: int) -> tuple[int, bool]:
    """Return the units of a tile of the product with floats, and whether all of its columns have one scale."""
    per_unit = UNIT[bits][0]
    widest = _TILE // 2 if bits == 8 else _TILE  # 128 codes of a row's part in registers spill on sm_100
    for columns in (widest, widest // 2, widest // 4):
        if columns // per_unit >= 16 and (not group_size or group_size >= in_features or group_size % columns == 0):
            return columns // per_unit, True
    return max(16, 64 // per_unit), False


def linear(x: Tensor, parts: Parts, bias: Tensor | None, sizes: tuple[int, ...]) -> Tensor:
    """Multiply by an ``integer`` weight on a GPU; arguments and result are those of the op.

    The compute type is the dtype of ``x``, sums are float32.
    """
    return run(x, parts, bias, sizes)


def run(
    x: Tensor,
    parts: Parts,
    bias: Tensor | None,
    sizes: tuple[int, ...],
    settings: Settings | None = None,
    splits: int | None = None,
    compute: torch.dtype | None = None,
    result: torch.dtype | None = None,
) -> Tensor:
    """Launch; what is not given is chosen.

    Args:
        x: (..., in_features), any strides.
        parts: packed, scale and zero_point.
        bias: (out_features,) or None.
        sizes: in_features, bits, group_size.
        settings: for tests and tuning.
        splits: into how many pieces K is cut.
        compute: compute type; default the dtype of ``x``.
        result: dtype of the result; default the dtype of ``x``.

    Returns:
        (..., out_features).
    """
    compute = compute or x.dtype
    rows, columns = parts[0].shape[0], sizes[0]
    tokens = x.numel() // columns
    out = x.new_empty((*x.shape[:-1], rows), dtype=result)
    if not tokens:
        return out
    settings, cores = _settings(x, 8 * compute.itemsize, tokens, rows, columns, settings)
    units, _ = units_of(sizes[1], columns, sizes[2])
    steps = -(-columns // (units * UNIT[sizes[1]][0]))
    with torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext():
        flat = x.reshape(tokens, columns)
        flat = flat if flat.stride(1) == 1 else flat.contiguous()
        given = {"x": flat, "parts": parts, "sizes": sizes, "settings": settings, "compute": compute}
        _launch(integer_kernel, kernel_arguments, given, bias, out, steps, cores, settings, splits, compute)
    return out


def _settings(
    x: Tensor, bits: int, tokens: int, rows: int, columns: int, settings: Settings | None
) -> tuple[Settings, int]:
    devices, cores = device_names(x.device)
    return settings or choose("integer", devices, bits, tokens, rows, columns), cores


def _launch(
    kernel: Any,
    arguments: Any,
    given: dict[str, Any],
    bias: Tensor | None,
    out: Tensor,
    steps: int,
    cores: int,
    settings: Settings,
    splits: int | None,
    compute: torch.dtype,
) -> None:
    """Launch a product, cut into pieces of its ``steps``, and add the pieces."""
    rows = out.shape[-1]
    tokens = out.numel() // rows
    tiles = -(-rows // settings.block_n) * -(-tokens // settings.block_m)
    splits = splits or split_count(tiles, steps, cores, settings.programs_per_core)
    bias = None if bias is None else bias.contiguous()
    sums = out if splits == 1 else out.new_empty((splits, tokens, rows), dtype=torch.float32)
    found = arguments(**given, bias=bias if splits == 1 else None, out=sums, per_split=-(-steps // splits))
    kernel[(tiles, splits)](**found, num_warps=settings.num_warps, num_stages=settings.num_stages, **FUSED)
    if splits > 1:
        reduce_kernel[(-(-out.numel() // BLOCK),)](**reduce_arguments(sums, bias, out, compute), **FUSED)


def kernel_arguments(
    x: Tensor,
    parts: Parts,
    bias: Tensor | None,
    out: Tensor,
    per_split: int,
    sizes: tuple[int, ...],
    settings: Settings,
    compute: torch.dtype,
) -> dict[str, Any]:
    """Return the arguments of the product with floats by name; tensors may be on ``meta``."""
    units, wide = units_of(sizes[1], sizes[0], sizes[2])
    return {
        **_weight_arguments(parts, sizes, units),
        "x_ptr": x,
        "bias_ptr": bias,
        "out_ptr": out,
        "M": x.shape[0],
        "K": sizes[0],
        "x_stride": x.stride(0),
        "per_split": per_split,
        "WIDE": wide,
        "DT": TYPES[compute],
        "BLOCK_N": settings.block_n,
        "BLOCK_M": settings.block_m,
    }


def _weight_arguments(parts: Parts, sizes: tuple[int, ...], units: int) -> dict[str, Any]:
    packed, scale, zero = parts
    in_features, bits, group_size = sizes
    return {
        "packed_ptr": packed,
        "scale_ptr": scale,
        "zero_ptr": zero,
        "N": packed.shape[0],
        "row_bytes": packed.shape[1],
        "zero_bytes": 0 if zero is None else zero.shape[1],
        "groups": scale.shape[1],
        "group_size": group_size if scale.shape[1] > 1 else in_features,
        "BITS": bits,
        "V": UNIT[bits][0],
        "UNIT": UNIT[bits][1],
        "UNITS": units,
    }


# Rounded activations ---------------------------------------------------------------------------------------------

ROUNDING_WARPS = 8  # with four the product with the Hadamard matrix spills
UNITS = 32  # columns of a product of bytes, at least, and units of a tile that is made of parts


def per_unit(sizes: Any) -> int:
    """Return how many columns apart the codes of a part of a tile lie: 1 where groups are shorter than a tile."""
    tile = UNITS * UNIT[sizes.bits][0]
    groups = (size for size in (sizes.group_size, sizes.act_group_size) if 0 < size < sizes.in_features)
    return 1 if any(size % tile for size in groups) else UNIT[sizes.bits][0]


def unsupported_codes(parts: Parts, sizes: Any) -> str | None:
    """Return why codes cannot be multiplied by codes, None if they can.

    Args:
        parts: packed, scale and zero_point.
        sizes: :class:`hf_lowbit.kernels.activation.Sizes`, of modes token and token_group.
    """
    reason = unsupported(torch.float32, parts, sizes[:3])
    if reason is not None:
        return reason
    if sizes.bits == 8 and parts[2] is not None:
        return "codes of 8 bits with zero points do not fit into signed bytes"
    if sizes.in_features >= 2**16:
        return f"{sizes.in_features} columns: sums of products may leave 32 bits"
    for name, size in (("", sizes.group_size), ("activations in ", sizes.act_group_size)):
        if 0 < size < sizes.in_features and size % UNITS:
            return f"{name}groups of {size} columns, not a multiple of {UNITS}"
    own, other = sizes.group_size or sizes.in_features, sizes.act_group_size or sizes.in_features
    small, large = min(own, other), max(own, other)
    if small < sizes.in_features and large < sizes.in_features and large % small:
        return f"groups of {own} and {other} columns, of which none is a multiple of the other"
    return None


def fuses(sizes: Any) -> bool:
    """Return whether rotation and rounding of these rows go in one pass."""
    order, group = sizes.rotation or 1, sizes.act_group_size
    if not 16 <= group <= _MOST_BLOCK or group & (group - 1) or (order > 1 and core_of(order) != 1):
        return False
    return order == 1 or 16 <= order <= _MOST_BLOCK


def tile_width(sizes: Any) -> int:
    """Return the columns of codes of a token, filled up to whole tiles and blocks."""
    block = block_of(sizes) if fuses(sizes) else UNITS * per_unit(sizes)
    return -(-sizes.in_features // block) * block


def block_of(sizes: Any) -> int:
    """Return the columns that a program of the fused kernel rounds."""
    return max(sizes.rotation or 1, sizes.act_group_size, UNITS * per_unit(sizes))


def round_rows(x: Tensor, smooth: Tensor | None, signs: Tensor | None, sizes: Any) -> tuple[Tensor, Tensor]:
    """Divide, rotate and round rows in one pass; :func:`fuses` says for which.

    Args:
        x: (tokens, columns), rows with neighbouring columns next to each other.
        smooth: (columns,) or None.
        signs: (columns,), +1 and -1, or None.
        sizes: :class:`hf_lowbit.kernels.activation.Sizes`.

    Returns:
        Codes (tokens, width), int8, in the order that the product reads, and scales (tokens, groups), float32.
    """
    tokens = x.shape[0]
    codes = x.new_empty((tokens, tile_width(sizes)), dtype=torch.int8)
    scale = x.new_empty((tokens, -(-sizes.in_features // sizes.act_group_size)), dtype=torch.float32)
    divisor = None if smooth is None else smooth.float()
    if signs is not None:  # dividing by a sign is multiplying by it
        divisor = signs.float() if divisor is None else divisor * signs
    divisor = None if divisor is None else divisor.contiguous()
    found = round_arguments(x, divisor, codes, scale, sizes, torch.version.hip is None)
    grid = (-(-tokens // found["BLOCK_M"]), codes.shape[1] // found["BLOCK_K"])
    with torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext():
        round_kernel[grid](**found, num_warps=ROUNDING_WARPS, **FUSED)
    return codes, scale


def round_arguments(
    x: Tensor, divisor: Tensor | None, codes: Tensor, scale: Tensor, sizes: Any, nvidia: bool
) -> dict[str, Any]:
    """Return the arguments of the kernel that rounds by name; tensors may be on ``meta``."""
    order = sizes.rotation or 1
    matrix = None
    if order > 1:
        matrix = hadamard(order, torch.float32).sign().to(x.device)
    return {
        "x_ptr": x,
        "divisor_ptr": divisor,
        "matrix_ptr": matrix,
        "codes_ptr": codes,
        "act_ptr": scale,
        "M": x.shape[0],
        "K": sizes.in_features,
        "x_stride": x.stride(0),
        "width": codes.shape[1],
        "act_groups": scale.shape[1],
        "norm": order**-0.5,
        "most": float(2 ** (sizes.act_bits - 1) - 1),
        "ORDER": order,
        "GROUP": sizes.act_group_size,
        "V": per_unit(sizes),
        "UNITS": UNITS,
        # ±1 is exact in few digits, so three products of a value's pieces are as good as float32
        "PRECISION": "tf32x3" if nvidia and not INTERPRETED else "ieee",
        "BLOCK_M": 16,
        "BLOCK_K": block_of(sizes),
    }


def in_parts(codes: Tensor, sizes: Any) -> Tensor:
    """Bring codes (tokens, columns) into the order that the product reads, (tokens, width)."""
    filled = torch.nn.functional.pad(codes, (0, tile_width(sizes) - codes.shape[1]))
    return filled.unflatten(1, (-1, UNITS, per_unit(sizes))).transpose(2, 3).flatten(1).contiguous()


def product(
    codes: Tensor,
    act_scale: Tensor,
    parts: Parts,
    bias: Tensor | None,
    sizes: Any,
    result: torch.dtype,
    settings: Settings | None = None,
    splits: int | None = None,
) -> Tensor:
    """Multiply codes by codes.

    Args:
        codes: (tokens, width), int8, in the order of :func:`in_parts`.
        act_scale: (tokens, groups), float32.
        parts: packed, scale and zero_point of the weight.
        bias: (out_features,) or None.
        sizes: :class:`hf_lowbit.kernels.activation.Sizes`.
        result: dtype of the result, and what the bias is rounded to.
        settings: for tests and tuning.
        splits: into how many pieces K is cut.

    Returns:
        (tokens, out_features).
    """
    tokens, rows = codes.shape[0], parts[0].shape[0]
    out = torch.empty((tokens, rows), dtype=result, device=codes.device)
    if not tokens:
        return out
    settings, cores = _settings(codes, 8, tokens, rows, sizes.in_features, settings)
    given: dict[str, Any] = {"codes": codes, "act_scale": act_scale, "parts": parts, "sizes": sizes}
    given |= {"settings": settings, "compute": result}
    steps = stretches(sizes)[1]
    with torch.cuda.device(codes.device) if codes.is_cuda else contextlib.nullcontext():
        _launch(codes_kernel, codes_arguments, given, bias, out, steps, cores, settings, splits, result)
    return out


def stretches(sizes: Any) -> tuple[int, int]:
    """Return the tiles of a stretch of columns that has one scale on both sides, and how many stretches there are."""
    tile = UNITS * per_unit(sizes)
    columns = min(sizes.group_size or sizes.in_features, sizes.act_group_size or sizes.in_features, sizes.in_features)
    columns = -(-columns // tile) * tile
    return columns // tile, -(-sizes.in_features // columns)


def codes_arguments(
    codes: Tensor,
    act_scale: Tensor,
    parts: Parts,
    bias: Tensor | None,
    out: Tensor,
    per_split: int,
    sizes: Any,
    settings: Settings,
    compute: torch.dtype,
) -> dict[str, Any]:
    """Return the arguments of the product of codes by name; tensors may be on ``meta``."""
    tiles, count = stretches(sizes)
    return {
        **_weight_arguments(parts, sizes[:3], UNITS),
        "x_ptr": codes,
        "act_ptr": act_scale,
        "bias_ptr": bias,
        "out_ptr": out,
        "M": codes.shape[0],
        "width": codes.shape[1],
        "act_groups": act_scale.shape[1],
        "act_group_size": sizes.act_group_size if act_scale.shape[1] > 1 else sizes.in_features,
        "per_split": per_split,
        "stretches": count,
        "ORDERED": per_unit(sizes) != UNIT[sizes.bits][0],
        "TILES": tiles,
        "DT": TYPES[compute],
        "BLOCK_N": settings.block_n,
        "BLOCK_M": settings.block_m,
    }
