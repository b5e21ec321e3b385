"""Custom op ``hf_lowbit::integer_act_linear``: products in which the input is rotated and rounded to integers, too.

For rows x of an input and a weight Ŵ that was made for such rows (:mod:`hf_lowbit.formats.integer`)::

    x̃ = ((x / smooth) · signs) · (I ⊗ H)            transform()             in float32, whatever the dtype of x
    q, s = codes and scales of x̃                    quantize_activation()   codes int8, |q| ≤ 2^(bits-1) - 1
    y = (s · q) Ŵᵀ + bias                           dequantized form: the definition, in float32

Transforms, modes and codes are those of :mod:`hf_lowbit.kernels.rounding`. The dequantized form is what the op
computes on every device unless a kernel for the case takes it. The *integer form*, ``rounding.integer_form``, is what
kernels compute: for each stretch of columns γ that has one activation scale and one weight scale::

    y = Σ_γ s[:, γ] · Δ[γ] · Σ_j q[:, j] (code[j] - zero[γ])  + bias

Sums of codes are whole numbers below 2^31, so only the order of the outer sum in float32 is a kernel's own. With the
operands as unsigned codes the inner sum is ``q·code - zero · Σ_j q_j``: a kernel that makes q may hand on row sums.

The gradient takes the rounding of activations, and clipping, for the identity (straight through); weights are frozen.

Source: DVD-Quant (arXiv 2505.18663), Eq. 10.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from hf_lowbit.kernels.choice import Kernel, Table
from hf_lowbit.kernels.cpu import activation as cpu
from hf_lowbit.kernels.hadamard import core_of
from hf_lowbit.kernels.integer import check_input, check_weight, triton_kernels
from hf_lowbit.kernels.ops import LIBRARY, unobserved
from hf_lowbit.kernels.rounding import (
    KERNEL_MODES,
    MODES,
    RANGE_MODES,
    UNROUNDED,
    check_act_bits,
    quantize_activation,
    quantize_range,
    transform,
    untransform,
)

LIBRARY.define(
    "integer_act_linear(Tensor x, Tensor packed, Tensor scale, Tensor? zero_point, Tensor? bias, Tensor? smooth, "
    "Tensor? signs, Tensor? act_bounds, int in_features, int bits, int group_size, int rotation, str mode, "
    "int act_bits, int act_group_size) -> Tensor"
)


class Sizes(NamedTuple):
    """Scalars of a product, in the order of the op's last arguments.

    Attributes:
        in_features: columns of the weight.
        bits: of a weight's code.
        group_size: columns that share a weight scale, 0 for all.
        rotation: order of the Hadamard blocks, 0 for none.
        mode: one of :data:`hf_lowbit.kernels.rounding.MODES`.
        act_bits: of an activation's code, 2 to 8, or 16 for not rounded.
        act_group_size: columns that share an activation scale, for mode token_group.
    """

    in_features: int
    bits: int
    group_size: int
    rotation: int = 0
    mode: str = "none"
    act_bits: int = 8
    act_group_size: int = 0

    @property
    def rounds(self) -> bool:
        """Whether activations are rounded."""
        return self.mode != "none" and self.act_bits != UNROUNDED


def check(x: Tensor, tensors: tuple[Tensor | None, ...], sizes: Sizes) -> None:
    """Refuse what no product may see.

    Args:
        x: input.
        tensors: packed, scale, zero_point, bias, smooth, signs, act_bounds.
        sizes: of the weight.

    Raises:
        RuntimeError: says what does not fit.
        ValueError: activations cannot have so many bits.
    """
    bias, smooth, signs, bounds = tensors[3:]
    check_weight("integer_act_linear", tensors[:3], sizes[:3])
    packed: Any = tensors[0]
    check_input("integer_act_linear", x, packed, bias, sizes.in_features)
    columns = sizes.in_features
    for name, tensor, length in (("smooth", smooth, columns), ("signs", signs, columns), ("act_bounds", bounds, 2)):
        if tensor is not None and tensor.shape != (length,):
            raise RuntimeError(f"integer_act_linear: {name} has shape {tuple(tensor.shape)}, expected ({length},)")
        if tensor is not None and tensor.device != x.device:
            raise RuntimeError(f"integer_act_linear: {name} is on {tensor.device}, x on {x.device}")
    # kernels write whole blocks
    if sizes.rotation and (core_of(sizes.rotation) is None or sizes.in_features % sizes.rotation):
        raise RuntimeError(
            f"integer_act_linear: no Hadamard blocks of {sizes.rotation} columns make up {sizes.in_features}"
        )
    if sizes.mode not in MODES:
        raise RuntimeError(f"integer_act_linear: mode must be one of {', '.join(MODES)}, got {sizes.mode!r}")
    if (sizes.mode == "token_group") != (sizes.act_group_size > 0):
        raise RuntimeError("integer_act_linear: act_group_size is needed for mode token_group, and only then")
    if bounds is not None and sizes.mode != "static":
        raise RuntimeError("integer_act_linear: act_bounds belong to mode static only")
    if bounds is None and sizes.mode == "static":
        raise RuntimeError("integer_act_linear: mode static needs act_bounds")
    check_act_bits(sizes.act_bits)


def reference(x: Tensor, tensors: tuple[Any, ...], sizes: Sizes) -> Tensor:
    """Multiply in the dequantized form, in float32; the definition. Arguments as :func:`check` has them."""
    packed, scale, zero_point, bias = tensors[:4]
    weight = torch.ops.hf_lowbit.integer_dequantize(
        packed, scale, zero_point, sizes.in_features, sizes.bits, sizes.group_size
    )
    out = linear(_rows(x, tensors, sizes), weight, None if bias is None else bias.float())
    return out.to(x.dtype).reshape(*x.shape[:-1], weight.shape[0])


def _rows(x: Tensor, tensors: tuple[Any, ...], sizes: Sizes) -> Tensor:
    """Return the rows that the weight is multiplied by, (tokens, columns), float32."""
    smooth, signs, bounds = tensors[4:]
    rows = transform(x.reshape(-1, sizes.in_features), smooth, signs, sizes.rotation)
    if not sizes.rounds:
        return rows
    if sizes.mode in RANGE_MODES:
        return quantize_range(rows, bounds, sizes.act_bits).dequantized()
    return quantize_activation(rows, sizes.mode, sizes.act_bits, sizes.act_group_size).dequantized()


def _cpu_why_not(dtype: torch.dtype, device: str, parts: tuple[Any, ...], sizes: Sizes) -> str | None:
    if device != "cpu":
        return f"tensors on {device}"
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"activations of {dtype}"
    if sizes.rounds and sizes.mode in KERNEL_MODES:
        return cpu.unsupported(parts, sizes)
    return cpu.integer.unsupported(torch.float32, _centred(parts), sizes[:3])


def _centred(parts: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return parts without a floating zero point of whole rows: what it shifts is added behind, see :func:`_shift`."""
    packed, scale, zero = parts
    return (packed, scale, None) if zero is not None and zero.is_floating_point() and scale.shape[1] == 1 else parts


def _shift(rows: Tensor, parts: tuple[Any, ...], bits: int) -> Tensor:
    """Return what :func:`_centred` leaves out, ``Σ_j x[j] · scale · (2^(bits-1) - zero)``, (tokens, out_features)."""
    _, scale, zero = parts
    return rows.sum(1, keepdim=True) * (scale.float() * (2.0 ** (bits - 1) - zero.float())).T


def _cpu_linear(x: Tensor, tensors: tuple[Any, ...], sizes: Sizes) -> Tensor:
    """Multiply codes by codes in the modes that allow it, else rows in float32 by codes."""
    if sizes.rounds and sizes.mode in KERNEL_MODES:
        made = cpu.linear(x, tensors, sizes)
        return reference(x, tensors, sizes) if made is None else made
    bias = None if tensors[3] is None else tensors[3].float()
    rows, parts = _rows(x, tensors, sizes), tensors[:3]
    centred = _centred(parts)
    out = cpu.integer.linear(rows, centred, bias, sizes[:3])
    if centred is not parts:
        out = out + _shift(rows, parts, sizes.bits)
    return out.to(x.dtype).reshape(*x.shape[:-1], out.shape[-1])


def _triton_why_not(dtype: torch.dtype, device: str, parts: tuple[Any, ...], sizes: Sizes) -> str | None:
    on_gpu, reason = triton_kernels(device)
    if on_gpu is None:
        return reason
    if not sizes.rounds or sizes.mode not in KERNEL_MODES:
        return f"mode {sizes.mode} with {sizes.act_bits} bits is no product of codes with a scale for each token"
    why: str | None = on_gpu.unsupported(dtype, parts, sizes[:3]) or on_gpu.unsupported_codes(parts, sizes)
    return why


def _triton_linear(x: Tensor, tensors: tuple[Any, ...], sizes: Sizes) -> Tensor:
    """Multiply codes by codes, in Triton; rotated and rounded in one pass where that kernel can."""
    on_gpu, _ = triton_kernels("cuda")
    packed, scale, zero_point, bias, smooth, signs = tensors[:6]
    rows = x.reshape(-1, sizes.in_features)
    if on_gpu.fuses(sizes):
        made = on_gpu.round_rows(rows if rows.stride(1) == 1 else rows.contiguous(), smooth, signs, sizes)
    else:
        found = quantize_activation(
            transform(rows, smooth, signs, sizes.rotation), sizes.mode, sizes.act_bits, sizes.act_group_size
        )
        made = on_gpu.in_parts(found.codes, sizes), found.token
    out: Tensor = on_gpu.product(*made, (packed, scale, zero_point), bias, sizes, x.dtype)
    return out.reshape(*x.shape[:-1], packed.shape[0])


# A case is (dtype of x, device type, parts, sizes), parts being packed, scale and zero_point.
TABLE = Table(
    Kernel("cpu", "C++: rotates and rounds in one pass, multiplies codes by codes", _cpu_why_not, _cpu_linear),
    Kernel("triton", "Triton: codes by codes, not yet timed on a GPU", _triton_why_not, _triton_linear),
    Kernel("reference", "plain torch, rebuilds the dense weight in every call", lambda *_: None, reference),
)


def _linear(x: Tensor, *arguments: Any) -> Tensor:
    tensors, sizes = arguments[:7], Sizes(*arguments[7:])
    check(x, tensors, sizes)
    return TABLE.choose(x.dtype, x.device.type, tensors[:3], sizes).linear(x, tensors, sizes)


def _linear_fake(x: Tensor, *arguments: Any) -> Tensor:
    check(x, arguments[:7], Sizes(*arguments[7:]))
    return x.new_empty((*x.shape[:-1], arguments[0].shape[0]))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, packed, scale, zero_point, bias, smooth, signs, _, *sizes = inputs
    ctx.save_for_backward(packed, scale, zero_point, smooth, signs)
    ctx.sizes = Sizes(*sizes)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Return gradients of the input and the bias; rounding counts as the identity, the weight is frozen."""
    packed, scale, zero_point, smooth, signs = ctx.saved_tensors
    sizes: Sizes = ctx.sizes
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        weight = torch.ops.hf_lowbit.integer_dequantize(
            packed, scale, zero_point, sizes.in_features, sizes.bits, sizes.group_size
        )
        grad_x = untransform(grad.float() @ weight, None, signs, sizes.rotation)
        grad_x = (grad_x if smooth is None else grad_x / smooth.float()).to(grad.dtype)
    if ctx.needs_input_grad[4]:
        grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0).to(ctx.bias_dtype)
    return (grad_x, None, None, None, grad_bias, *([None] * 10))


LIBRARY.impl("integer_act_linear", _linear, "CompositeExplicitAutograd")
torch.library.register_fake("hf_lowbit::integer_act_linear", _linear_fake, lib=LIBRARY)
torch.library.register_autograd("hf_lowbit::integer_act_linear", _backward, setup_context=_setup_context, lib=LIBRARY)


def integer_act_linear(x: Tensor, tensors: tuple[Tensor | None, ...], sizes: Sizes) -> Tensor:
    """Transform and round an input, and multiply it by an ``integer`` weight.

    Args:
        x: (..., in_features), floating.
        tensors: packed, scale and zero_point as in :func:`hf_lowbit.kernels.integer.integer_linear`; bias
            (out_features,); smooth (in_features,), > 0; signs (in_features,), ±1; act_bounds, for mode static. All
            but the first two may be None.
        sizes: of the weight, and how activations are rounded.

    Returns:
        (..., out_features), dtype of ``x``.

    Raises:
        RuntimeError: shapes or devices do not fit, or the mode is none.
        ValueError: activations cannot have so many bits.
    """
    arguments = (*tensors, *sizes)
    if unobserved(x, tensors[3]):
        return _linear(x, *arguments)
    out: Tensor = torch.ops.hf_lowbit.integer_act_linear(x, *arguments)
    return out
