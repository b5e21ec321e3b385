"""Custom ops ``hf_lowbit::low_rank_*``: products with a weight that is held as two factors.

``y = (x · downᵀ) · upᵀ + bias``. The two products in torch are the definition and the kernel at once, on every device:
each is a plain dense product, for which torch has the best routine there is, and what passes between them is small
(``rank`` numbers per token). On one core of an AVX-512 processor the op took 11 to 18 % longer than its two bare
products for layers of 576 columns and at most 7 % for 4096 (``python -m benchmarks.quality.adasvd --part products``):
little is lost on the way to them. On a GPU a fused kernel could save a launch per token; there is none yet.

The weight is frozen by default, but its factors may be trained: the gradient exists for them too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from hf_lowbit.kernels.ops import LIBRARY, unobserved

LIBRARY.define("low_rank_linear(Tensor x, Tensor up, Tensor down, Tensor? bias) -> Tensor")
LIBRARY.define("low_rank_dequantize(Tensor up, Tensor down) -> Tensor")


def _check(x: Tensor, up: Tensor, down: Tensor, bias: Tensor | None) -> None:
    """Refuse what no product may see."""
    if not x.is_floating_point():
        raise RuntimeError(f"low_rank_linear: x must be floating point, got {x.dtype}")
    if x.dim() < 1 or x.shape[-1] != down.shape[1]:
        raise RuntimeError(f"low_rank_linear: x has shape {tuple(x.shape)}, the weight has {down.shape[1]} columns")
    if up.shape[1] != down.shape[0]:
        raise RuntimeError(f"low_rank_linear: factors of rank {up.shape[1]} and {down.shape[0]}")
    if not x.device == up.device == down.device:
        raise RuntimeError(f"low_rank_linear: x is on {x.device}, the weight on {up.device} and {down.device}")
    if bias is not None and bias.shape != (up.shape[0],):
        raise RuntimeError(f"low_rank_linear: bias has shape {tuple(bias.shape)}, expected ({up.shape[0]},)")


def _linear(x: Tensor, up: Tensor, down: Tensor, bias: Tensor | None) -> Tensor:
    """Multiply; factors and bias are rounded once to the dtype of ``x``, which the middle has too."""
    _check(x, up, down, bias)
    dtype = x.dtype
    return linear(linear(x, down.to(dtype)), up.to(dtype), None if bias is None else bias.to(dtype))


def _linear_fake(x: Tensor, up: Tensor, down: Tensor, bias: Tensor | None) -> Tensor:
    _check(x, up, down, bias)
    return x.new_empty((*x.shape[:-1], up.shape[0]))


def _dequantize(up: Tensor, down: Tensor) -> Tensor:
    return up.float() @ down.float()


def _dequantize_fake(up: Tensor, down: Tensor) -> Tensor:
    return up.new_empty((up.shape[0], down.shape[1]), dtype=torch.float32)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, up, down, bias = inputs
    ctx.save_for_backward(x, up, down)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, up, down = ctx.saved_tensors
    wanted_x, wanted_up, wanted_down, wanted_bias = ctx.needs_input_grad
    rows, inputs = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
    middle = grad @ up.to(grad.dtype) if wanted_x or wanted_down else None
    grad_x = grad_up = grad_down = grad_bias = None
    if wanted_x and middle is not None:
        grad_x = middle @ down.to(grad.dtype)
    if wanted_up:
        grad_up = (rows.T @ (inputs @ down.to(inputs.dtype).T)).to(up.dtype)
    if wanted_down and middle is not None:
        grad_down = (middle.reshape(-1, middle.shape[-1]).T @ inputs).to(down.dtype)
    if wanted_bias:
        grad_bias = rows.sum(0).to(ctx.bias_dtype)
    return grad_x, grad_up, grad_down, grad_bias


LIBRARY.impl("low_rank_linear", _linear, "CompositeExplicitAutograd")
LIBRARY.impl("low_rank_dequantize", _dequantize, "CompositeExplicitAutograd")
torch.library.register_fake("hf_lowbit::low_rank_linear", _linear_fake, lib=LIBRARY)
torch.library.register_fake("hf_lowbit::low_rank_dequantize", _dequantize_fake, lib=LIBRARY)
torch.library.register_autograd("hf_lowbit::low_rank_linear", _backward, setup_context=_setup_context, lib=LIBRARY)


def low_rank_linear(x: Tensor, up: Tensor, down: Tensor, bias: Tensor | None) -> Tensor:
    """Multiply by a ``low_rank`` weight: ``x @ (up @ down).T + bias``, never forming the product of the factors.

    Args:
        x: (..., in_features), floating.
        up: (out_features, rank).
        down: (rank, in_features).
        bias: (out_features,) or None.

    Returns:
        (..., out_features), dtype of ``x``.

    Raises:
        RuntimeError: shapes or devices do not fit.
    """
    if unobserved(x, bias, up, down):  # torch's dispatcher takes as long as the product of a small layer
        return _linear(x, up, down, bias)
    out: Tensor = torch.ops.hf_lowbit.low_rank_linear(x, up, down, bias)
    return out
