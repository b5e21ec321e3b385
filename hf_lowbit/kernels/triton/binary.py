"""Format ``binary`` on CUDA and ROCm devices: what is supported, how it is launched.

:mod:`hf_lowbit.kernels.reference` is the definition; :mod:`hf_lowbit.kernels.triton.binary_kernels` holds the device
code and says where its rounding differs. One kernel serves decoding and prefill; tile sizes and the number of pieces
that K is cut into come from :mod:`hf_lowbit.kernels.tuning`.

An N:M mask is read in *compute form* (:func:`hf_lowbit.kernels.triton.forms.compute_form`): the mask plane, with sign
and group planes spread to all columns. :func:`binary_linear` builds it at the first call with a weight and keeps it as
long as the weight lives; it costs one bit per weight and plane beside what is stored.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_lowbit.kernels.planes import GROUP, padded_columns, plane_bytes
from hf_lowbit.kernels.reference import kept_columns, salient_groups
from hf_lowbit.kernels.triton.binary_kernels import binary_kernel, columns_kernel, reduce_kernel
from hf_lowbit.kernels.triton.forms import Derived, compute_form, padded_scale
from hf_lowbit.kernels.tuning import Settings, choose, slug, split_count

TYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}
# TRITON_INTERPRET makes functions of another class: kernels then run on tensors of the CPU.
INTERPRETED = not isinstance(binary_kernel, triton.JITFunction)
LIMIT = 2**31
BLOCK = 512  # elements per program of the small kernels
_DERIVED = Derived()
_PLANE, _SCALE = (torch.uint8,), tuple(TYPES)
_PARTS = {
    "sign": _PLANE,
    "row_scale": _SCALE,
    "group": _PLANE,
    "row_shift": _SCALE,
    "col_scale": _SCALE,
    "salient": (torch.int32,),
    "sign2": _PLANE,
    "col_scale2": _SCALE,
    "mask": _PLANE,
}

Parts = tuple[Tensor | None, ...]
Sizes = tuple[int, int, int, int]


@dataclasses.dataclass(frozen=True)
class Weight:
    """A ``binary`` weight as the kernel reads it; planes cover all columns.

    The tensors are those of the kernel's parameters of the same name; ``groups`` is G, ``salient_groups`` S.
    """

    sign: Tensor
    group: Tensor | None
    keep: Tensor | None
    scale: Tensor
    shift: Tensor | None
    col: Tensor | None
    salient: Tensor | None
    sign2: Tensor | None
    col2: Tensor | None
    in_features: int
    block_size: int
    groups: int
    salient_groups: int
    packed: bool

    @property
    def out_features(self) -> int:
        """Rows."""
        return self.scale.shape[-1]

    @property
    def column_groups(self) -> int:
        """Groups of 128 columns."""
        return padded_columns(self.in_features) // GROUP


def supports(
    x: Tensor,
    sign: Tensor,
    row_scale: Tensor,
    group: Tensor | None,
    row_shift: Tensor | None,
    col_scale: Tensor | None,
    salient: Tensor | None,
    sign2: Tensor | None,
    col_scale2: Tensor | None,
    mask: Tensor | None,
    bias: Tensor | None,
    in_features: int,
    block_size: int,
    keep_n: int,
    keep_m: int,
) -> tuple[bool, str]:
    """Return whether :func:`binary_linear` takes these arguments, and if not, why.

    Looks at devices, dtypes, strides and sizes only, never at contents; the format has validated those.
    """
    parts = (sign, row_scale, group, row_shift, col_scale, salient, sign2, col_scale2, mask)
    reason = unsupported(x.dtype, parts, (in_features, block_size, keep_n, keep_m))
    if reason is None and x.device != sign.device:
        reason = f"x is on {x.device}, sign on {sign.device}"
    if reason is None and bias is not None and bias.device != x.device:
        reason = f"bias is on {bias.device}, x on {x.device}"
    if reason is None and x.numel() // in_features * -(-row_scale.shape[-1] // 16) >= LIMIT:
        reason = f"{x.numel() // in_features} tokens are too many for one launch"
    return reason is None, reason or ""


def unsupported(dtype: torch.dtype, parts: Parts, sizes: Sizes) -> str | None:
    """Return why a weight cannot be multiplied with an input of ``dtype`` on its device, or None if it can.

    Args:
        dtype: of ``x``.
        parts: sign to mask, in the order of the op.
        sizes: in_features, block_size, keep_n, keep_m.
    """
    sign, row_scale, group, _, _, salient, sign2, _, mask = parts
    in_features, block_size, keep_n, keep_m = sizes
    if sign is None or row_scale is None:
        return "sign and row_scale are needed"
    reason = unsupported_device(sign.device)
    if reason is not None:
        return reason
    if dtype not in TYPES:
        return f"x is {dtype}; float16, bfloat16 and float32 are computed"
    if (mask is None) != (not keep_m):
        return f"keep_m is {keep_m}, but there is {'no' if mask is None else 'a'} mask"
    if block_size % 16 and block_size < in_features:
        return f"block_size {block_size} is not a multiple of 16"
    planes = 0 if group is None else group.shape[0]
    if planes > 2:
        return f"{planes} group planes; at most 2 are read"
    entries, _, rows = row_scale.shape
    count = 0 if salient is None else salient.shape[0]
    codes = salient_groups(entries, 2**planes) if count else 0
    if count and sign2 is None:
        return "salient columns without a second plane"
    if codes > 2**planes:
        return f"{codes} groups of salient columns without a group plane"
    if rows * plane_bytes(in_features) * max(planes, 1) >= LIMIT or row_scale.numel() >= LIMIT:
        return f"{rows} × {in_features} weights; tables of at most {LIMIT - 1} elements are addressed"
    shapes = _shapes(rows, planes, entries, codes, count, in_features, block_size, keep_n, keep_m)
    for (name, dtypes), part, shape in zip(_PARTS.items(), parts, shapes, strict=True):
        if part is None:
            continue
        if part.shape != shape:
            return f"{name} has shape {tuple(part.shape)}, expected {shape}"
        if part.dtype not in dtypes:
            return f"{name} is {part.dtype}"
        if part.device != sign.device:
            return f"{name} is on {part.device}, sign on {sign.device}"
        if not part.is_contiguous():
            return f"{name} is not contiguous"
        if part.data_ptr() % 4:
            return f"{name} starts at an address that is no multiple of 4"
    return None


@functools.lru_cache(4096)
def _shapes(
    rows: int,
    planes: int,
    entries: int,
    codes: int,
    count: int,
    in_features: int,
    block_size: int,
    keep_n: int,
    keep_m: int,
) -> tuple[tuple[int, ...], ...]:
    """Shapes of the parts, in their order: what the kernel addresses."""
    blocks = -(-in_features // block_size)
    kept = plane_bytes(kept_columns(in_features, keep_n, keep_m))
    return (
        (rows, kept),
        (entries, blocks, rows),
        (planes, rows, kept),
        (entries - codes, blocks, rows),
        (max(entries - 2 * codes, codes), in_features),
        (count,),
        (rows, plane_bytes(count)),
        (codes, count),
        (rows, plane_bytes(in_features)),
    )


@functools.cache
def unsupported_device(device: torch.device) -> str | None:
    """Return why nothing can be launched on a device, or None if it can."""
    if INTERPRETED:
        return (
            None if device.type == "cpu" else f"TRITON_INTERPRET is set, so tensors must be on the CPU, not {device}"
        )
    if device.type != "cuda":
        return f"needs a CUDA or ROCm device, the weight is on {device}"
    if not torch.cuda.is_available():
        return "torch finds no GPU"
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        major, minor = torch.cuda.get_device_capability(device)
        return f"needs compute capability 8.0, {device} has {major}.{minor}"
    return None


def binary_linear(
    x: Tensor,
    sign: Tensor,
    row_scale: Tensor,
    group: Tensor | None,
    row_shift: Tensor | None,
    col_scale: Tensor | None,
    salient: Tensor | None,
    sign2: Tensor | None,
    col_scale2: Tensor | None,
    mask: Tensor | None,
    bias: Tensor | None,
    in_features: int,
    block_size: int,
    keep_n: int,
    keep_m: int,
) -> Tensor:
    """Multiply by a ``binary`` weight on a GPU.

    Arguments and result are those of :func:`hf_lowbit.kernels.reference.binary_linear`; the compute type is the dtype
    of ``x``, sums are float32.

    Raises:
        NotImplementedError: :func:`supports` says no; the message says why.
    """
    parts = (sign, row_scale, group, row_shift, col_scale, salient, sign2, col_scale2, mask)
    sizes = (in_features, block_size, keep_n, keep_m)
    ok, reason = supports(x, *parts, bias, *sizes)
    if not ok:
        raise NotImplementedError(f"binary_linear in Triton: {reason}")
    return run(x, weight_of(x.dtype, *parts, *sizes), bias)


def weight_of(
    compute: torch.dtype,
    sign: Tensor,
    row_scale: Tensor,
    group: Tensor | None,
    row_shift: Tensor | None,
    col_scale: Tensor | None,
    salient: Tensor | None,
    sign2: Tensor | None,
    col_scale2: Tensor | None,
    mask: Tensor | None,
    in_features: int,
    block_size: int,
    keep_n: int,
    keep_m: int,
) -> Weight:
    """Return the weight as the kernel reads it with compute type ``compute``; what has to be computed is kept."""
    count = 0 if salient is None else salient.shape[0]
    codes = salient_groups(row_scale.shape[0], 2 ** (0 if group is None else group.shape[0])) if count else 0
    if mask is not None:
        stored, sources = (sign, group), (sign, mask) if group is None else (sign, mask, group)
        sign, group = _DERIVED.get(
            ("compute form", in_features, keep_n, keep_m),
            sources,
            lambda: compute_form(*stored, mask, in_features, keep_n, keep_m),
        )
    packed = compute != torch.float32 and (col_scale is None or row_shift is None)
    dtype = compute if packed else torch.float32
    if col_scale is not None and (col_scale.dtype != dtype or in_features % GROUP):
        columns = col_scale
        col_scale = _DERIVED.get(("columns", dtype), (columns,), lambda: padded_scale(columns, dtype))
    if not count:
        salient = sign2 = col_scale2 = None
    return Weight(
        sign=sign,
        group=group,
        keep=mask,
        scale=row_scale,
        shift=row_shift,
        col=col_scale,
        salient=salient,
        sign2=sign2,
        col2=col_scale2,
        in_features=in_features,
        block_size=block_size,
        groups=row_scale.shape[0] - 2 * codes,
        salient_groups=codes,
        packed=packed,
    )


def run(
    x: Tensor,
    weight: Weight,
    bias: Tensor | None,
    settings: Settings | None = None,
    splits: int | None = None,
    compute: torch.dtype | None = None,
    result: torch.dtype | None = None,
) -> Tensor:
    """Launch: choose settings (or take those given), bring ``x`` into the form that the kernel reads, allocate.

    Args:
        x: (..., in_features), any strides.
        weight: from :func:`weight_of`.
        bias: (out_features,) or None.
        settings: for tests and tuning; default from the table.
        splits: into how many pieces K is cut; default computed.
        compute: compute type; default the dtype of ``x``, and the one that ``weight`` was made for.
        result: dtype of the result; default the dtype of ``x``.

    Returns:
        (..., out_features).
    """
    compute = compute or x.dtype
    rows, columns = weight.out_features, weight.in_features
    tokens = x.numel() // columns
    out = x.new_empty((*x.shape[:-1], rows), dtype=result)
    if not tokens:
        return out
    devices, cores = device_names(x.device)
    if settings is None:
        settings = choose("binary", devices, 8 * compute.itemsize, tokens, rows, columns)
    if splits is None:
        tiles = -(-rows // settings.block_n) * -(-tokens // settings.block_m)
        splits = split_count(tiles, weight.column_groups, cores, settings.programs_per_core)
    bias = None if bias is None else bias.contiguous()
    with torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext():
        x = _columns(x.reshape(tokens, columns), weight, compute)
        parts = out if splits == 1 else x.new_empty((splits, tokens, rows), dtype=torch.float32)
        arguments = kernel_arguments(x, weight, bias if splits == 1 else None, parts, splits, settings, compute)
        tiles = -(-rows // settings.block_n) * -(-tokens // settings.block_m)
        binary_kernel[(tiles, splits)](**arguments, **_options(settings))
        if splits > 1:
            grid = (-(-out.numel() // BLOCK),)
            reduce_kernel[grid](**reduce_arguments(parts, bias, out, compute), **FUSED)
    return out


def kernel_arguments(
    x: Tensor,
    weight: Weight,
    bias: Tensor | None,
    out: Tensor,
    splits: int,
    settings: Settings,
    compute: torch.dtype,
) -> dict[str, Any]:
    """Return the arguments of the main kernel by name; tensors may be on ``meta`` (to compile without a device).

    ``x`` is what :func:`_columns` returned, ``out`` the result or, with several ``splits``, their partial sums.
    """
    blocks, block_size = weight.scale.shape[1], weight.block_size
    count = 0 if weight.salient is None else weight.salient.shape[0]
    per_plane = blocks > 1 and block_size % GROUP != 0
    unit = 16 if per_plane else GROUP
    return {
        "x_ptr": x,
        "sign_ptr": weight.sign,
        "group_ptr": weight.group,
        "keep_ptr": weight.keep,
        "scale_ptr": weight.scale,
        "shift_ptr": weight.shift,
        "col_ptr": weight.col,
        "salient_ptr": weight.salient,
        "sign2_ptr": weight.sign2,
        "col2_ptr": weight.col2,
        "bias_ptr": bias,
        "out_ptr": out,
        "M": x.shape[0],
        "N": weight.out_features,
        "K": weight.in_features,
        "C": count,
        "x_stride": x.stride(0),
        "row_bytes": weight.sign.shape[-1],
        "sign2_bytes": 0 if weight.sign2 is None else weight.sign2.shape[-1],
        "blocks": blocks,
        "span": block_size // unit if blocks > 1 else weight.column_groups,
        "block_size": block_size,
        "per_split": -(-weight.column_groups // splits),
        "tiles_per_split": -(-count // 16 // splits) if count else 0,
        "GROUPS": weight.groups,
        "SALIENT": weight.salient_groups,
        "PER_PLANE": per_plane,
        "FULL": x.shape[1] >= padded_columns(weight.in_features),
        "PACKED": weight.packed,
        "DT": TYPES[compute],
        "BLOCK_N": settings.block_n,
        "BLOCK_M": settings.block_m,
    }


# Pinned: the default changes with Triton 3.10, and numbers should not move with it.
FUSED = {"enable_fp_fusion": True}


def _options(settings: Settings) -> dict[str, Any]:
    return {"num_warps": settings.num_warps, "num_stages": settings.num_stages, **FUSED}


def input_width(weight: Weight) -> int:
    """Return the columns of the input that the main kernel reads: salient ones are appended, in tiles of 16."""
    if weight.salient is None:
        return weight.in_features
    return padded_columns(weight.in_features) + -(-weight.salient.shape[0] // 16) * 16


def _columns(x: Tensor, weight: Weight, compute: torch.dtype) -> Tensor:
    """``x`` (tokens, in_features) with neighbouring columns next to each other; salient ones moved to the end.

    Returns ``x`` itself where nothing has to be done.
    """
    if weight.salient is None:
        return x if x.stride(1) == 1 else x.contiguous()
    out = x.new_empty((x.shape[0], input_width(weight)), dtype=compute)
    grid = (x.shape[0], -(-out.shape[1] // BLOCK))
    columns_kernel[grid](**columns_arguments(x, weight.salient, out, compute), **FUSED)
    return out


def columns_arguments(x: Tensor, salient: Tensor, out: Tensor, compute: torch.dtype) -> dict[str, Any]:
    """Return the arguments of the kernel that moves salient columns of ``x`` to the end."""
    return {
        "x_ptr": x,
        "salient_ptr": salient,
        "out_ptr": out,
        "K": x.shape[1],
        "C": salient.shape[0],
        "x_stride": x.stride(0),
        "x_step": x.stride(1),
        "width": out.shape[1],
        "padded": padded_columns(x.shape[1]),
        "steps": salient.shape[0].bit_length(),
        "DT": TYPES[compute],
        "BLOCK": BLOCK,
    }


def reduce_arguments(parts: Tensor, bias: Tensor | None, out: Tensor, compute: torch.dtype) -> dict[str, Any]:
    """Return the arguments of the kernel that adds partial sums (splits, tokens, out_features)."""
    return {
        "parts_ptr": parts,
        "bias_ptr": bias,
        "out_ptr": out,
        "total": out.numel(),
        "N": out.shape[-1],
        "splits": parts.shape[0],
        "DT": TYPES[compute],
        "BLOCK": BLOCK,
    }


@functools.cache
def device_names(device: torch.device) -> tuple[tuple[str, ...], int]:
    """Names under which settings of a device are looked up, and its number of multiprocessors."""
    if device.type != "cuda":
        return (), 1
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is None:
        names = (slug(properties.name), f"sm_{properties.major}{properties.minor}", "cuda")
    else:
        names = (slug(properties.name), properties.gcnArchName.split(":")[0], "hip")
    return names, properties.multi_processor_count
