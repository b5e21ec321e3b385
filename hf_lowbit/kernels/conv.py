"""Custom ops ``hf_lowbit::binary_conv*``: convolutions of signs, exact in integers.

Bit 1 is +1 and bit 0 is -1; the sign of 0 is +1. With ``x' = x · gain + bias`` per input channel (both optional), an
output is ``dot = Σ sign(x') · sign(w)`` over the taps inside the image: zero padding comes after the sign, so a tap
outside contributes 0 and not ±1. By bits that is ``dot = n_v - 2 · popcount(a ⊕ w)`` over the ``n_v`` valid ones.
``binary_conv2d`` goes on to ``y = affine[0] · dot + affine[1]`` (a scale of each output channel with batch
normalization folded in) and to RPReLU, ``t = y + act[1]; (t if t >= 0 else act[0] · t) + act[2]``.

The op in torch below is the definition. Sums are integers below 2^24, so float32 holds them exactly; scales are
applied in float32 also where ``x`` is bfloat16, which could not hold a dot of 4608.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hf_lowbit.kernels.cpu import popcount as cpu
from hf_lowbit.kernels.dispatch import forced_name
from hf_lowbit.kernels.geometry import ConvGeometry
from hf_lowbit.kernels.ops import LIBRARY, unobserved
from hf_lowbit.kernels.planes import unpack_plane


def signs(x: Tensor) -> Tensor:
    """Return +1 where ``x >= 0`` and -1 elsewhere, in float32; ``torch.sign`` has no bit for its 0."""
    return torch.where(x >= 0, 1.0, -1.0)


def shifted(x: Tensor, shift: Tensor | None) -> Tensor:
    """Return ``x`` in float32 with the shift of each channel: (C,) is added; of (2, C) the first row multiplies."""
    x = x.float()
    if shift is None:
        return x
    shift = shift.float()[..., None, None]
    return x + shift if shift.dim() == 3 else x * shift[0] + shift[1]


def sign_weight(sign: Tensor, geometry: ConvGeometry) -> Tensor:
    """Unpack a sign plane (out_channels, bytes) to ±1 in the layout of torch's weight, float32."""
    plane = torch.where(unpack_plane(sign, geometry.columns), 1.0, -1.0)
    return geometry.as_stored_by_torch(plane)


def rprelu(y: Tensor, act: Tensor) -> Tensor:
    """Return RPReLU of (N, C, H, W) with slope, shift before and shift after of each channel, (3, C)."""
    slope, before, after = act.to(y.dtype)[..., None, None]
    y = y + before
    return torch.where(y >= 0, y, slope * y) + after


def scaled(dot: Tensor, affine: Tensor, act: Tensor | None) -> Tensor:
    """Return dots with scale and offset, (2, C), and RPReLU, (3, C) or None; float32."""
    scale, offset = affine.float()[..., None, None]
    y = scale * dot.float() + offset
    return y if act is None else rprelu(y, act.float())


def reference_dot(x: Tensor, sign: Tensor, shift: Tensor | None, geometry: ConvGeometry) -> Tensor:
    """Return the dots (N, out_channels, H_out, W_out), int32, by a float32 convolution of ±1; the definition."""
    image, weight = signs(shifted(x, shift)), sign_weight(sign, geometry)
    out = geometry.convolve(image, weight)
    return out.round().to(torch.int32)  # some algorithms of libraries (Winograd) are off by less than a half


@dataclasses.dataclass(frozen=True)
class ConvKernel:
    """One way to convolve signs.

    Attributes:
        name: for tables, and for :func:`hf_lowbit.kernels.dispatch.forced`.
        summary: what it does, in a few words.
        why_not: ``(dtype, device type, geometry) -> reason or None``.
        run: ``(x, sign, shift, affine or None for int32 dots, act, geometry) -> out``.
    """

    name: str
    summary: str
    why_not: Callable[[torch.dtype, str, ConvGeometry], str | None]
    run: Callable[..., Tensor]


def _triton_why_not(dtype: torch.dtype, device: str, geometry: ConvGeometry) -> str | None:
    if device != "cuda":  # ROCm devices are called so, too
        return f"tensors on {device}"
    try:  # not before a GPU needs it: Triton exists for Linux only
        from hf_lowbit.kernels.triton import popcount as on_gpu
    except ImportError as error:
        return f"Triton cannot be imported ({type(error).__name__})"
    return on_gpu.unsupported(dtype, geometry)


def _triton(*arguments: Any) -> Tensor:
    from hf_lowbit.kernels.triton import popcount as on_gpu

    return on_gpu.binary_conv(*arguments)


def _reference(
    x: Tensor, sign: Tensor, shift: Tensor | None, affine: Tensor | None, act: Tensor | None, geometry: ConvGeometry
) -> Tensor:
    dot = reference_dot(x, sign, shift, geometry)
    return dot if affine is None else scaled(dot, affine, act).to(x.dtype)


# In order of preference.
CONV_KERNELS = {
    kernel.name: kernel
    for kernel in (
        ConvKernel("cpu", "C++, XOR and popcount of packed bits", cpu.unsupported, cpu.binary_conv),
        ConvKernel("triton", "Triton, XOR and popcount, not yet timed on a GPU", _triton_why_not, _triton),
        ConvKernel("reference", "float32 convolution of ±1", lambda *_: None, _reference),
    )
}


def choose_conv(dtype: torch.dtype, device: str, geometry: ConvGeometry) -> ConvKernel:
    """Return the kernel for a case; :func:`hf_lowbit.kernels.dispatch.forced` counts where it names one of these.

    Raises:
        RuntimeError: a kernel is forced that cannot do it; with the reason.
    """
    name = forced_name()
    if name in CONV_KERNELS:
        kernel = CONV_KERNELS[name]
        reason = kernel.why_not(dtype, device, geometry)
        if reason is not None:
            raise RuntimeError(f"kernel {name!r} was asked for and cannot convolve: {reason}")
        return kernel
    return next(k for k in CONV_KERNELS.values() if k.why_not(dtype, device, geometry) is None)


_PARTS = "Tensor x, Tensor sign, Tensor? shift"
LIBRARY.define(f"binary_conv_dot({_PARTS}, int[] geometry) -> Tensor")
LIBRARY.define(f"binary_conv2d({_PARTS}, Tensor affine, Tensor? act, int[] geometry) -> Tensor")


@functools.lru_cache(maxsize=1024)
def _geometry(numbers: tuple[int, ...]) -> ConvGeometry:
    """Return the geometry that an op was given, if it is sound."""
    if len(numbers) != 14:
        raise RuntimeError(f"binary_conv2d: geometry must be 14 integers, got {len(numbers)}")
    geometry = ConvGeometry.of(numbers)
    if problems := geometry.problems():
        raise RuntimeError(f"binary_conv2d: {'; '.join(problems)}")
    return geometry


def _check(x: Tensor, sign: Tensor, others: tuple[Tensor | None, ...], geometry: ConvGeometry) -> None:
    """Refuse what no kernel may see."""
    if not x.is_floating_point():
        raise RuntimeError(f"binary_conv2d: x must be floating point, got {x.dtype}")
    if x.dim() != 4 or x.shape[1] != geometry.in_channels:
        raise RuntimeError(
            f"binary_conv2d: x has shape {tuple(x.shape)}, expected (batch, {geometry.in_channels}, height, width)"
        )
    shift, affine, act = others
    channels, outs = geometry.in_channels, geometry.out_channels
    wanted = (
        ("sign", sign, ((outs, geometry.plane_bytes),)),
        ("shift", shift, ((channels,), (2, channels))),
        ("affine", affine, ((2, outs),)),
        ("act", act, ((3, outs),)),
    )
    for name, tensor, shapes in wanted:
        if tensor is not None and tuple(tensor.shape) not in shapes:
            raise RuntimeError(f"binary_conv2d: {name} has shape {tuple(tensor.shape)}, expected {shapes[-1]}")
        if tensor is not None and tensor.device != x.device:
            raise RuntimeError(f"binary_conv2d: x is on {x.device}, {name} on {tensor.device}")
    if sign.dtype != torch.uint8:
        raise RuntimeError(f"binary_conv2d: sign must be uint8, got {sign.dtype}")
    if min(geometry.output_size(*x.shape[2:])) < 1:
        raise RuntimeError(f"binary_conv2d: an image of {tuple(x.shape[2:])} is smaller than the kernel")


def _convolve(
    x: Tensor,
    sign: Tensor,
    shift: Tensor | None,
    affine: Tensor | None,
    act: Tensor | None,
    numbers: list[int],
) -> Tensor:
    geometry = _geometry(tuple(numbers))
    _check(x, sign, (shift, affine, act), geometry)
    return choose_conv(x.dtype, x.device.type, geometry).run(x, sign, shift, affine, act, geometry)


def _fake(x: Tensor, sign: Tensor, shift: Tensor | None, affine: Any, act: Any, numbers: list[int]) -> Tensor:
    geometry = _geometry(tuple(numbers))
    _check(x, sign, (shift, affine, act), geometry)
    shape = (x.shape[0], geometry.out_channels, *geometry.output_size(*x.shape[2:]))
    return x.new_empty(shape, dtype=torch.int32 if affine is None else x.dtype)


def _dot(x: Tensor, sign: Tensor, shift: Tensor | None, geometry: list[int]) -> Tensor:
    return _convolve(x, sign, shift, None, None, geometry)


LIBRARY.impl("binary_conv_dot", _dot, "CompositeExplicitAutograd")
LIBRARY.impl("binary_conv2d", _convolve, "CompositeExplicitAutograd")
torch.library.register_fake(
    "hf_lowbit::binary_conv_dot", lambda x, sign, shift, numbers: _fake(x, sign, shift, None, None, numbers),
    lib=LIBRARY,
)  # fmt: skip
torch.library.register_fake("hf_lowbit::binary_conv2d", _fake, lib=LIBRARY)


def binary_conv2d(
    x: Tensor, sign: Tensor, shift: Tensor | None, affine: Tensor, act: Tensor | None, geometry: ConvGeometry
) -> Tensor:
    """Convolve signs with signs, scale, and apply RPReLU.

    Args:
        x: (batch, in_channels, height, width), floating.
        sign: (out_channels, plane_bytes), uint8: a P128 plane of ``geometry.columns`` columns in the order
            (channel of the group, row, column).
        shift: (in_channels,) or (2, in_channels), or None.
        affine: (2, out_channels): scale and offset.
        act: (3, out_channels): slope, shift before and after, or None.
        geometry: of the convolution.

    Returns:
        (batch, out_channels, height_out, width_out), dtype of ``x``. There is no gradient: signs have none; training
        uses :mod:`hf_lowbit.methods.bidrn`.

    Raises:
        RuntimeError: shapes, dtypes or devices do not fit, or the geometry is none.
    """
    arguments: tuple[Any, ...] = (x, sign, shift, affine, act, list(geometry.numbers))
    if unobserved(x):
        return _convolve(*arguments)
    out: Tensor = torch.ops.hf_lowbit.binary_conv2d(*arguments)
    return out


def binary_conv_dot(x: Tensor, sign: Tensor, shift: Tensor | None, geometry: ConvGeometry) -> Tensor:
    """Return the integer sums of :func:`binary_conv2d` before any scale, int32."""
    out: Tensor = torch.ops.hf_lowbit.binary_conv_dot(x, sign, shift, list(geometry.numbers))
    return out


def floor_seconds(geometry: ConvGeometry, batch: int, size: tuple[int, int], bits: float, bandwidth: float) -> float:
    """Return the least time of a convolution: operations on bits at a rate, or bytes at a bandwidth.

    Args:
        geometry: of the convolution.
        batch: images.
        size: height and width of the input.
        bits: pairs of bits per second that the processor compares and counts.
        bandwidth: bytes per second.
    """
    out = geometry.output_size(*size)
    places = math.prod(size) if geometry.transposed else math.prod(out)
    work = (
        batch
        * places
        * geometry.columns
        * geometry.out_channels
        / (geometry.stride_gain if geometry.transposed else 1)
    )
    moved = 4 * batch * (geometry.in_channels * math.prod(size) + geometry.out_channels * math.prod(out))
    return max(work / bits, moved / bandwidth)
