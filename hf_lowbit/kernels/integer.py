"""Custom ops ``hf_lowbit::integer_*``: products with weights that are held as integers with scales.

``w[i, j] = scale[i, g] · (code[i, j] - zero[i, g])`` for column j of group g. Codes are unsigned. Without stored zero
points the zero is the middle of the range, ``2^(bits - 1)``. A floating zero point (n, groups) is not packed: a grid
whose lower end l is any number has ``zero = -l / scale``. The op in torch is the definition on every device; kernels
that multiply the packed codes are in :data:`TABLE`.

Layout of codes of 2, 3, 4 or 8 bits: a row is one number in little-endian bytes, column j in its bits ``bits · j`` to
``bits · j + bits - 1``, and what is left of the last byte is 0. So with 2, 4 and 8 bits a byte holds ``8 / bits``
codes, the first column in the lowest bits, and with 3 bits three bytes hold eight codes::

    byte 0  bits 0-2 column 0, 3-5 column 1, 6-7 the low two of column 2
    byte 1  bit 0 the high one of column 2, 1-3 column 3, 4-6 column 4, 7 the low one of column 5
    byte 2  bits 0-1 the high two of column 5, 2-4 column 6, 5-7 column 7
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear, pad

from hf_lowbit.kernels.choice import Kernel, Table
from hf_lowbit.kernels.cpu import integer as cpu
from hf_lowbit.kernels.cpu.calls import Call
from hf_lowbit.kernels.ops import LIBRARY, unobserved

BITS = (2, 3, 4, 8)
# On a GPU: with more the product itself takes the time, and torch's is faster than one that unpacks for every tile of
# tokens. Reckoned from rates of memory and matrix units, not measured.
_MOST_TOKENS_TRITON = 256
Parts = tuple[Tensor, Tensor, Tensor | None]  # packed, scale, zero_point
Sizes = tuple[int, ...]  # in_features, bits, group_size


def code_bytes(columns: int, bits: int) -> int:
    """Return the bytes that hold a row of codes."""
    return -(-columns * bits // 8)


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Pack unsigned codes.

    Args:
        codes: (..., columns), integers from 0 to ``2^bits - 1``.
        bits: one of :data:`BITS`.

    Returns:
        (..., code_bytes), uint8.
    """
    each, octets = _unit(bits)
    padded = pad(codes.to(torch.int32 if octets > 1 else torch.uint8), (0, -codes.shape[-1] % each))
    padded = padded.unflatten(-1, (-1, each))
    word = torch.zeros_like(padded[..., 0])
    for place in range(each):
        word |= padded[..., place] << (bits * place)
    if octets == 1:
        return word
    parts = torch.stack([(word >> 8 * octet & 255).to(torch.uint8) for octet in range(octets)], -1)
    return parts.flatten(-2)[..., : code_bytes(codes.shape[-1], bits)].contiguous()


def unpack_codes(packed: Tensor, columns: int, bits: int) -> Tensor:
    """Undo :func:`pack_codes`; (..., columns), uint8."""
    _, octets = _unit(bits)
    if octets > 1:
        parts = pad(packed, (0, -packed.shape[-1] % octets)).unflatten(-1, (-1, octets)).to(torch.int32)
        packed = parts[..., 0]
        for octet in range(1, octets):
            packed = packed | parts[..., octet] << 8 * octet
    shifts = torch.arange(0, 8 * octets, bits, dtype=packed.dtype, device=packed.device)
    codes = (packed.unsqueeze(-1) >> shifts) & (2**bits - 1)
    return codes.flatten(-2)[..., :columns].to(torch.uint8)


def _unit(bits: int) -> tuple[int, int]:
    """Return the fewest codes that fill whole bytes, and the bytes."""
    common = math.gcd(bits, 8)
    return 8 // common, bits // common


LIBRARY.define(
    "integer_linear(Tensor x, Tensor packed, Tensor scale, Tensor? zero_point, Tensor? bias, int in_features, "
    "int bits, int group_size) -> Tensor"
)
LIBRARY.define(
    "integer_dequantize(Tensor packed, Tensor scale, Tensor? zero_point, int in_features, int bits, int group_size) "
    "-> Tensor"
)


def _rebuilt(parts: Parts, sizes: Sizes) -> Tensor:
    """Return the dense weight, (out_features, in_features), float32."""
    packed, scale, zero_point = parts
    in_features, bits, group_size = sizes
    groups = scale.shape[1]
    codes = unpack_codes(packed, in_features, bits).float()
    zero = codes.new_full((1, 1), 2 ** (bits - 1))
    if zero_point is not None:
        floating = zero_point.is_floating_point()
        zero = zero_point.float() if floating else unpack_codes(zero_point, groups, bits).float()
    factor = scale.float()
    if groups > 1:
        group = torch.arange(in_features, device=codes.device) // group_size
        factor = factor[:, group]
        zero = zero if zero_point is None else zero[:, group]
    return (codes - zero) * factor


def _dequantize_fake(packed: Tensor, scale: Tensor, zero_point: Tensor | None, in_features: int, *_: int) -> Tensor:
    return scale.new_empty((packed.shape[0], in_features), dtype=torch.float32)


def check_weight(op: str, parts: tuple[Tensor | None, ...], sizes: Sizes) -> None:
    """Refuse what is no weight: kernels read as many bytes as the sizes say, and torch would broadcast.

    Args:
        op: its name, for messages.
        parts: packed, scale and zero_point.
        sizes: in_features, bits, group_size.

    Raises:
        RuntimeError: a tensor is missing, or its shape, dtype or device does not fit.
    """
    packed, scale, zero = parts
    columns, bits, group_size = sizes
    if bits not in BITS or columns < 1 or group_size < 0:
        raise RuntimeError(f"{op}: no weight has {columns} columns in groups of {group_size} with {bits} bits")
    if packed is None or scale is None:
        raise RuntimeError(f"{op}: {'packed' if packed is None else 'scale'} is missing")
    rows, groups = packed.shape[:1].numel(), -(-columns // group_size) if group_size else 1
    floating = zero is not None and zero.is_floating_point()
    for name, part, width, kind in (
        ("packed", packed, code_bytes(columns, bits), "uint8"),
        ("scale", scale, groups, "floating"),
        ("zero_point", zero, groups if floating else code_bytes(groups, bits), "floating" if floating else "uint8"),
    ):
        if part is None:
            continue
        typed = part.is_floating_point() if kind == "floating" else part.dtype is torch.uint8
        if not typed or part.shape != (rows, width):
            raise RuntimeError(f"{op}: {name} is {part.dtype} {tuple(part.shape)}, expected {kind} {(rows, width)}")
        if part.device != packed.device:
            raise RuntimeError(f"{op}: {name} is on {part.device}, packed on {packed.device}")


def check_input(op: str, x: Tensor, packed: Tensor, bias: Tensor | None, in_features: int) -> None:
    """Refuse an input or a bias that a weight cannot meet.

    Args:
        op: its name, for messages.
        x: (..., in_features), floating, on the device of the weight.
        packed: of the weight.
        bias: (out_features,) or None.
        in_features: columns of the weight.

    Raises:
        RuntimeError: says what does not fit.
    """
    if not x.is_floating_point():
        raise RuntimeError(f"{op}: x must be floating point, got {x.dtype}")
    if x.dim() < 1 or x.shape[-1] != in_features:
        raise RuntimeError(f"{op}: x has shape {tuple(x.shape)}, the weight has {in_features} columns")
    if x.device != packed.device:
        raise RuntimeError(f"{op}: x is on {x.device}, the weight on {packed.device}")
    if bias is not None and bias.shape != packed.shape[:1]:
        raise RuntimeError(f"{op}: bias has shape {tuple(bias.shape)}, expected ({packed.shape[0]},)")
    if bias is not None and bias.device != x.device:
        raise RuntimeError(f"{op}: bias is on {bias.device}, x on {x.device}")


def _check(x: Tensor, parts: Parts, bias: Tensor | None, sizes: Sizes) -> None:
    check_weight("integer_linear", parts, sizes)
    check_input("integer_linear", x, parts[0], bias, sizes[0])


def _reference(x: Tensor, parts: Parts, bias: Tensor | None, sizes: Sizes) -> Tensor:
    """Multiply; the weight is rounded once to the dtype of ``x``."""
    weight = _rebuilt(parts, sizes).to(x.dtype)
    return linear(x, weight, None if bias is None else bias.to(x.dtype))


def _cpu_why_not(dtype: torch.dtype, device: str, parts: Parts, sizes: Sizes) -> str | None:
    return f"tensors on {device}" if device != "cpu" else cpu.unsupported(dtype, parts, sizes)


def triton_kernels(device: str) -> tuple[Any, str | None]:
    """Return the module that launches Triton's kernels, or None and why there is none for a kind of device."""
    if device != "cuda":  # ROCm devices are called so, too
        return None, f"tensors on {device}"
    try:  # not before a GPU needs it: Triton exists for Linux only
        from hf_lowbit.kernels.triton import integer as on_gpu
    except ImportError as error:
        return None, f"Triton cannot be imported ({type(error).__name__})"
    return on_gpu, None


def _triton_why_not(dtype: torch.dtype, device: str, parts: Parts, sizes: Sizes) -> str | None:
    on_gpu, reason = triton_kernels(device)
    return reason if on_gpu is None else on_gpu.unsupported(dtype, parts, sizes)


def _triton_linear(x: Tensor, parts: Parts, bias: Tensor | None, sizes: Sizes) -> Tensor:
    if x.numel() // sizes[0] > _MOST_TOKENS_TRITON:  # enough to pay for a dense weight
        return _reference(x, parts, bias, sizes)
    out: Tensor = triton_kernels("cuda")[0].linear(x, parts, bias, sizes)
    return out


# A case is (dtype of x, device type, parts, sizes).
TABLE = Table(
    Kernel("cpu", "C++ on the packed codes, exact to the dtype", _cpu_why_not, cpu.linear, cpu.dequantize),
    Kernel(
        "cpu-int8",
        "C++ with activations of 8 bits, relative error about 0.006",
        _cpu_why_not,
        functools.partial(cpu.linear, digits=1),
        cpu.dequantize,
        opt_in=True,
    ),
    Kernel("triton", "Triton on the packed codes, not yet timed on a GPU", _triton_why_not, _triton_linear),
    Kernel("reference", "plain torch, rebuilds the dense weight in every call", lambda *_: None, _reference, _rebuilt),
)


def _dequantize(packed: Tensor, scale: Tensor, zero_point: Tensor | None, *sizes: Any) -> Tensor:
    parts = (packed, scale, zero_point)
    check_weight("integer_dequantize", parts, sizes)
    kernel = TABLE.choose(torch.float32, packed.device.type, parts, sizes)
    return (kernel.dequantize or _rebuilt)(parts, sizes)


def _linear(x: Tensor, packed: Tensor, scale: Tensor, zero_point: Tensor | None, *rest: Any) -> Tensor:
    bias, *sizes = rest
    case = (packed, scale, zero_point), tuple(sizes)
    _check(x, case[0], bias, case[1])
    return TABLE.choose(x.dtype, x.device.type, *case).linear(x, case[0], bias, case[1])


def _linear_fake(x: Tensor, packed: Tensor, scale: Tensor, zero_point: Tensor | None, *rest: Any) -> Tensor:
    _check(x, (packed, scale, zero_point), rest[0], rest[1:])
    return x.new_empty((*x.shape[:-1], packed.shape[0]))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, packed, scale, zero_point, bias, *sizes = inputs
    ctx.save_for_backward(packed, scale, zero_point)
    ctx.sizes = sizes
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Return gradients of the input and the bias; the weight is frozen."""
    packed, scale, zero_point = ctx.saved_tensors
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = grad @ torch.ops.hf_lowbit.integer_dequantize(packed, scale, zero_point, *ctx.sizes).to(grad.dtype)
    if ctx.needs_input_grad[4]:
        grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0).to(ctx.bias_dtype)
    return grad_x, None, None, None, grad_bias, None, None, None


def integer_call(parts: Parts, bias: Tensor | None, sizes: Sizes) -> Call | None:
    """Return a shorter way to :func:`integer_linear` with one weight and few tokens, or None where there is none."""
    if parts[0].device.type != "cpu" or cpu.unsupported(torch.bfloat16, parts, sizes) is not None:
        return None
    return cpu.call(parts, bias, sizes)


LIBRARY.impl("integer_linear", _linear, "CompositeExplicitAutograd")
LIBRARY.impl("integer_dequantize", _dequantize, "CompositeExplicitAutograd")
torch.library.register_fake("hf_lowbit::integer_linear", _linear_fake, lib=LIBRARY)
torch.library.register_fake("hf_lowbit::integer_dequantize", _dequantize_fake, lib=LIBRARY)
torch.library.register_autograd("hf_lowbit::integer_linear", _backward, setup_context=_setup_context, lib=LIBRARY)


def integer_linear(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bias: Tensor | None,
    sizes: tuple[int, int, int],
) -> Tensor:
    """Multiply by an ``integer`` weight.

    Args:
        x: (..., in_features), floating.
        packed: (out_features, code_bytes(in_features)), uint8.
        scale: (out_features, groups), floating.
        zero_point: (out_features, code_bytes(groups)), uint8, or (out_features, groups), floating, or None.
        bias: (out_features,) or None.
        sizes: in_features, bits and columns of a group.

    Returns:
        (..., out_features), dtype of ``x``.

    Raises:
        RuntimeError: shapes or devices do not fit.
    """
    arguments = (x, packed, scale, zero_point, bias, *sizes)
    if unobserved(x, bias):
        return _linear(*arguments)
    out: Tensor = torch.ops.hf_lowbit.integer_linear(*arguments)
    return out
