"""Registration of the custom ops ``hf_lowbit::*``.

One function serves all devices (dispatch key ``CompositeExplicitAutograd``): what runs for a case,
:mod:`hf_lowbit.kernels.dispatch` decides. Weights are frozen: the gradient exists for the input and the bias only.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hf_lowbit.kernels import dispatch

LIBRARY = torch.library.Library("hf_lowbit", "DEF")

_PARTS = (
    "Tensor sign, Tensor row_scale, Tensor? group, Tensor? row_shift, Tensor? col_scale, Tensor? salient, "
    "Tensor? sign2, Tensor? col_scale2, Tensor? mask"
)
_SIZES = "int in_features, int block_size, int keep_n, int keep_m"

LIBRARY.define(f"binary_linear(Tensor x, {_PARTS}, Tensor? bias, {_SIZES}) -> Tensor")
LIBRARY.define(f"binary_dequantize({_PARTS}, {_SIZES}) -> Tensor")


def _check_input(x: Tensor, row_scale: Tensor, bias: Tensor | None, in_features: int) -> None:
    """Refuse what no kernel may see. Every call passes here, so no message is made before it is needed."""
    if not x.is_floating_point():
        raise RuntimeError(f"binary_linear: x must be floating point, got {x.dtype}")
    if x.dim() < 1:
        raise RuntimeError("binary_linear: x needs at least one dimension")
    if x.shape[-1] != in_features:
        raise RuntimeError(f"binary_linear: x has {x.shape[-1]} columns, the weight has {in_features}")
    if x.device != row_scale.device:
        raise RuntimeError(f"binary_linear: x is on {x.device}, the weight on {row_scale.device}")
    if bias is not None and bias.shape != (row_scale.shape[-1],):
        raise RuntimeError(f"binary_linear: bias has shape {tuple(bias.shape)}, expected ({row_scale.shape[-1]},)")


def _binary_linear(x: Tensor, *args: Any) -> Tensor:
    _check_input(x, args[1], args[9], args[10])
    return dispatch.binary_linear(x, args[:9], args[9], args[10:])


def _binary_linear_fake(x: Tensor, *args: Any) -> Tensor:
    _check_input(x, args[1], args[9], args[10])
    return x.new_empty((*x.shape[:-1], args[1].shape[-1]))


def _binary_dequantize(*args: Any) -> Tensor:
    return dispatch.binary_dequantize(args[:9], args[9:])


def _binary_dequantize_fake(sign: Tensor, row_scale: Tensor, *args: Any) -> Tensor:
    return row_scale.new_empty((row_scale.shape[-1], args[7]), dtype=torch.float32)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, *parts = inputs
    ctx.tensors = [isinstance(part, Tensor) for part in parts]
    ctx.save_for_backward(*(part for part in parts if isinstance(part, Tensor)))
    ctx.rest = [None if isinstance(part, Tensor) else part for part in parts]
    ctx.input_dtype = x.dtype


def _binary_linear_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    saved = iter(ctx.saved_tensors)
    parts = [next(saved) if is_tensor else rest for is_tensor, rest in zip(ctx.tensors, ctx.rest, strict=True)]
    bias, sizes = parts[9], parts[10:]
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        weight = torch.ops.hf_lowbit.binary_dequantize(*parts[:9], *sizes)
        grad_x = grad @ weight.to(grad.dtype)
    if bias is not None and ctx.needs_input_grad[10]:
        grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0).to(bias.dtype)
    return (grad_x, *([None] * 9), grad_bias, None, None, None, None)


LIBRARY.impl("binary_linear", _binary_linear, "CompositeExplicitAutograd")
LIBRARY.impl("binary_dequantize", _binary_dequantize, "CompositeExplicitAutograd")
torch.library.register_fake("hf_lowbit::binary_linear", _binary_linear_fake, lib=LIBRARY)
torch.library.register_fake("hf_lowbit::binary_dequantize", _binary_dequantize_fake, lib=LIBRARY)
torch.library.register_autograd(
    "hf_lowbit::binary_linear", _binary_linear_backward, setup_context=_setup_context, lib=LIBRARY
)


def binary_linear(x: Tensor, parts: tuple[Tensor | None, ...], bias: Tensor | None, sizes: tuple[int, ...]) -> Tensor:
    """Call the op, or, where nothing would notice, what is under it.

    The way through torch's dispatcher takes as long as the product of a small layer does (8 against 9 microseconds at
    192 x 576, ``python -m benchmarks.kernels.overhead``), which a model with hundreds of layers feels in every token.
    """
    if unobserved(x, bias):
        return _binary_linear(x, *parts, bias, *sizes)
    out: Tensor = torch.ops.hf_lowbit.binary_linear(x, *parts, bias, *sizes)
    return out


def unobserved(x: Tensor, *others: Tensor | None) -> bool:
    """Return whether no gradient, compiler, tracer, transform or mode has to see a call with these tensors."""
    if type(x) is not Tensor or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    if torch.is_grad_enabled() and (x.requires_grad or any(o is not None and o.requires_grad for o in others)):
        return False
    return not torch._C._len_torch_dispatch_stack() and torch._C._functorch.peek_interpreter_stack() is None
