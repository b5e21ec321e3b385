"""Convolutions of signs on CUDA and ROCm devices: XOR and popcount of 32-bit words.

One kernel packs the signs of activations along channels, one convolves the words: a program computes some pixels of
some outputs, and walks the taps that lie inside the image. Nothing is copied into patches.
:mod:`hf_lowbit.kernels.conv` is the definition; integers are equal to it, and scales are applied in float32.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_lowbit.kernels.cpu.popcount import kernel_words
from hf_lowbit.kernels.geometry import ConvGeometry
from hf_lowbit.kernels.triton.forms import Derived

_WORD = 32
_PACK, _PIXELS, _OUTS = 128, 32, 32
_DERIVED = Derived()
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@triton.jit
def pack_kernel(
    x_ptr, gain_ptr, bias_ptr, out_ptr, channels, groups, each, pixels, words,
    HAS_GAIN: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """From x (N, channels, pixels) to words (N, pixels, groups, words), int32; bits past the last channel are 0."""
    blocks = tl.cdiv(pixels, BLOCK)  # one axis for all: the others of a grid end at 65535
    place = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    row = tl.program_id(0) // blocks  # (n · groups + group) · words + word
    w = row % words
    g = row // words % groups
    n = (row // words // groups).to(tl.int64)  # places in large batches are beyond 32 bits
    inside = place < pixels
    word = tl.zeros((BLOCK,), tl.int32)
    for bit in tl.static_range(32):
        c = w * 32 + bit + tl.zeros((BLOCK,), tl.int32)
        wanted = inside & (c < each)  # past it are the channels of the next group
        channel = g * each + c
        value = tl.load(x_ptr + (n * channels + channel) * pixels + place, mask=wanted, other=-1.0)
        value = value.to(tl.float32)
        if HAS_GAIN:
            value = value * tl.load(gain_ptr + channel, mask=wanted, other=0.0)
        if HAS_BIAS:
            value = value + tl.load(bias_ptr + channel, mask=wanted, other=0.0)
        word = word | (tl.where((value >= 0) & wanted, 1, 0).to(tl.int32) << bit)
    tl.store(out_ptr + ((n * pixels + place) * groups + g) * words + w, word, mask=inside)


@triton.jit
def _ones(word, HARDWARE: tl.constexpr):
    """Number of bits that are set in each int32."""
    if HARDWARE:
        return tl.inline_asm_elementwise("popc.b32 $0, $1;", "=r,r", [word], dtype=tl.int32, is_pure=True, pack=1)
    else:  # the interpreter has no assembly; AMD's compiler knows these steps
        v = word.to(tl.uint32, bitcast=True)
        v = v - ((v >> 1) & 0x55555555)
        v = (v & 0x33333333) + ((v >> 2) & 0x33333333)
        v = (v + (v >> 4)) & 0x0F0F0F0F
        v = v + (v >> 8)
        return ((v + (v >> 16)) & 0x3F).to(tl.int32)


@triton.jit
def conv_kernel(
    packed_ptr, weight_ptr, affine_ptr, act_ptr, out_ptr, places, height, width, out_height, out_width, outs, each,
    groups, group_outs, words, lanes, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w,
    KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr, TRANSPOSED: tl.constexpr, HAS_AFFINE: tl.constexpr,
    HAS_ACT: tl.constexpr, HARDWARE: tl.constexpr, PIXELS: tl.constexpr, OUTS: tl.constexpr,
):  # fmt: skip
    """From words (N, pixels, groups, words) and (groups, taps, words, lanes) to (N, outs, height, width)."""
    m = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)
    o = tl.program_id(1) * OUTS + tl.arange(0, OUTS)
    g = tl.program_id(2)
    area = out_height * out_width
    n = (m // area).to(tl.int64)
    y = m % area // out_width
    z = m % out_width
    count = tl.zeros((PIXELS, OUTS), tl.int32)
    valid = tl.zeros((PIXELS,), tl.int32)
    for tap in range(KERNEL_H * KERNEL_W):
        ky = tap // KERNEL_W
        kx = tap % KERNEL_W
        if TRANSPOSED:
            top = y + pad_h - ky * dilation_h
            left = z + pad_w - kx * dilation_w
            inside = (top >= 0) & (left >= 0) & (top % stride_h == 0) & (left % stride_w == 0)
            top = top // stride_h
            left = left // stride_w
        else:
            top = y * stride_h - pad_h + ky * dilation_h
            left = z * stride_w - pad_w + kx * dilation_w
            inside = (top >= 0) & (left >= 0)
        inside = inside & (top < height) & (left < width) & (m < places)
        valid += tl.where(inside, 1, 0)
        base = ((n * height + top) * width + left) * groups * words + g * words
        row = (g * KERNEL_H * KERNEL_W + tap) * words * lanes
        for w in range(words):
            a = tl.load(packed_ptr + base + w, mask=inside, other=0)
            b = tl.load(weight_ptr + row + w * lanes + o, mask=o < lanes, other=0)
            differ = _ones(a[:, None] ^ b[None, :], HARDWARE)
            count += tl.where(inside[:, None], differ, 0)  # a tap outside adds nothing, whatever the weight
    dot = valid[:, None] * each - 2 * count
    channel = g * group_outs + o
    real = o < group_outs
    where = (n[:, None] * outs + channel[None, :]) * area + (m % area)[:, None]
    keep = (m < places)[:, None] & real[None, :]
    if HAS_AFFINE:
        scale = tl.load(affine_ptr + channel, mask=real, other=0.0)
        offset = tl.load(affine_ptr + outs + channel, mask=real, other=0.0)
        value = scale[None, :] * dot.to(tl.float32) + offset[None, :]
        if HAS_ACT:
            slope = tl.load(act_ptr + channel, mask=real, other=0.0)
            value = value + tl.load(act_ptr + outs + channel, mask=real, other=0.0)[None, :]
            value = tl.where(value >= 0, value, slope[None, :] * value)
            value = value + tl.load(act_ptr + 2 * outs + channel, mask=real, other=0.0)[None, :]
        tl.store(out_ptr + where, value, mask=keep)
    else:
        tl.store(out_ptr + where, dot, mask=keep)


# TRITON_INTERPRET makes functions of another class: kernels then run on tensors of the CPU.
INTERPRETED = not isinstance(conv_kernel, triton.JITFunction)


def unsupported(dtype: torch.dtype, geometry: ConvGeometry) -> str | None:
    """Return why this kernel cannot convolve tensors of a GPU, None if it can."""
    return None if dtype in _DTYPES else f"activations of {dtype}"


def pack_arguments(x: Tensor, shift: Tensor | None, out: Tensor, geometry: ConvGeometry) -> dict[str, Any]:
    """Return the arguments of :func:`pack_kernel`."""
    two = shift is not None and shift.dim() == 2
    return {
        "x_ptr": x, "gain_ptr": shift[0] if two and shift is not None else x,
        "bias_ptr": x if shift is None else shift[1] if two else shift, "out_ptr": out, "channels": x.shape[1],
        "groups": geometry.groups, "each": geometry.group_channels, "pixels": x.shape[2] * x.shape[3],
        "words": out.shape[3], "HAS_GAIN": two, "HAS_BIAS": shift is not None, "BLOCK": _PACK,
    }  # fmt: skip


def conv_arguments(
    packed: Tensor,
    weight: Tensor,
    affine: Tensor | None,
    act: Tensor | None,
    out: Tensor,
    size: tuple[int, int],
    geometry: ConvGeometry,
    hardware: bool,
) -> dict[str, Any]:
    """Return the arguments of :func:`conv_kernel`."""
    g = geometry
    return {
        "packed_ptr": packed, "weight_ptr": weight, "affine_ptr": out if affine is None else affine,
        "act_ptr": out if act is None else act, "out_ptr": out, "places": out.shape[0] * out.shape[2] * out.shape[3],
        "height": size[0], "width": size[1], "out_height": out.shape[2], "out_width": out.shape[3],
        "outs": g.out_channels, "each": g.group_channels, "groups": g.groups,
        "group_outs": g.out_channels // g.groups, "words": weight.shape[2], "lanes": weight.shape[3],
        "stride_h": g.stride[0], "stride_w": g.stride[1], "pad_h": g.padding[0], "pad_w": g.padding[1],
        "dilation_h": g.dilation[0], "dilation_w": g.dilation[1], "KERNEL_H": g.kernel[0], "KERNEL_W": g.kernel[1],
        "TRANSPOSED": g.transposed, "HAS_AFFINE": affine is not None, "HAS_ACT": act is not None,
        "HARDWARE": hardware, "PIXELS": _PIXELS, "OUTS": _OUTS,
    }  # fmt: skip


def binary_conv(
    x: Tensor, sign: Tensor, shift: Tensor | None, affine: Tensor | None, act: Tensor | None, geometry: ConvGeometry
) -> Tensor:
    """Convolve; arguments and result as in :mod:`hf_lowbit.kernels.conv`."""
    size = (x.shape[2], x.shape[3])
    height, width = geometry.output_size(*size)
    dtype = torch.int32 if affine is None else torch.float32
    out = torch.empty((x.shape[0], geometry.out_channels, height, width), dtype=dtype, device=x.device)
    if not out.numel():
        return out if affine is None else out.to(x.dtype)
    weight = _DERIVED.get(("words", geometry), (sign,), lambda: kernel_words(sign.detach(), geometry, _WORD))
    words = weight.shape[2]
    packed = torch.empty((x.shape[0], size[0] * size[1], geometry.groups, words), dtype=torch.int32, device=x.device)
    parts = [None if part is None else part.detach().float().contiguous() for part in (shift, affine, act)]
    # without fusing, factor and addend of a shift are rounded one after the other, as torch does
    options: dict[str, Any] = {} if INTERPRETED else {"enable_fp_fusion": False}
    grid = (triton.cdiv(size[0] * size[1], _PACK) * x.shape[0] * geometry.groups * words,)
    pack_kernel[grid](**pack_arguments(x.detach().contiguous(), parts[0], packed, geometry), **options)
    hardware = not INTERPRETED and torch.version.hip is None
    places, group_outs = out.shape[0] * height * width, geometry.out_channels // geometry.groups
    blocks = (triton.cdiv(places, _PIXELS), triton.cdiv(group_outs, _OUTS), geometry.groups)
    conv_kernel[blocks](**conv_arguments(packed, weight, parts[1], parts[2], out, size, geometry, hardware), **options)
    return out if affine is None else out.to(x.dtype)
