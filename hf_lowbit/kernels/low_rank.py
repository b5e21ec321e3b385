"""Custom ops ``hf_lowbit::low_rank_*``: products with a weight that is held as two factors.

``y = (x · downᵀ) · upᵀ + bias``. The two products in torch are the definition; for many tokens they are also the
fastest way, since each is a plain dense product and what passes between them is small (``rank`` numbers per token).
For few tokens, where reading the factors takes all the time, one call reads both and holds what is between:
:mod:`hf_lowbit.kernels.cpu.low_rank` and :mod:`hf_lowbit.kernels.triton.low_rank`. How much each way takes is measured
with ``python -m benchmarks.kernels.low_rank``.

The weight is frozen by default, but its factors may be trained: the gradient exists for them too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from hf_lowbit.kernels.choice import Kernel, Table, forced_name
from hf_lowbit.kernels.cpu import low_rank as cpu
from hf_lowbit.kernels.ops import LIBRARY, unobserved

LIBRARY.define("low_rank_linear(Tensor x, Tensor up, Tensor down, Tensor? bias) -> Tensor")
LIBRARY.define("low_rank_dequantize(Tensor up, Tensor down) -> Tensor")


# Ways to multiply ----------------------------------------------------------------------------------------------------


def _cpu_why_not(dtype: torch.dtype, device: str, up: Tensor, down: Tensor) -> str | None:
    return f"tensors on {device}" if device != "cpu" else cpu.unsupported(dtype, up, down)


def _cpu(x: Tensor, up: Tensor, down: Tensor, bias: Tensor | None) -> Tensor:
    tokens = x.numel() // down.shape[1]
    return (cpu.linear if tokens <= cpu.most_tokens(x.dtype, up.dtype) else _reference)(x, up, down, bias)


def _triton_why_not(dtype: torch.dtype, device: str, up: Tensor, down: Tensor) -> str | None:
    if device != "cuda":  # ROCm devices are called so, too
        return f"tensors on {device}"
    try:  # not before a GPU needs it: Triton exists for Linux only
        from hf_lowbit.kernels.triton import low_rank as on_gpu
    except ImportError as error:
        return f"Triton cannot be imported ({type(error).__name__})"
    return on_gpu.unsupported(dtype, up, down)


def _triton(x: Tensor, up: Tensor, down: Tensor, bias: Tensor | None) -> Tensor:
    from hf_lowbit.kernels.triton import low_rank as on_gpu

    tokens = x.numel() // down.shape[1]
    return (on_gpu.low_rank_linear if tokens <= on_gpu.MOST_TOKENS else _reference)(x, up, down, bias)


def _reference(x: Tensor, up: Tensor, down: Tensor, bias: Tensor | None) -> Tensor:
    """Multiply; factors and bias are rounded once to the dtype of ``x``, which the middle has too."""
    dtype = x.dtype
    out = linear(linear(x, down.to(dtype)), up.to(dtype), None if bias is None else bias.to(dtype))
    return out.to(dtype)  # which autocast has left


# A case is (dtype of x, device type, up, down).
TABLE = Table(
    Kernel("cpu", "C++, both factors in one call; torch's two products for many tokens", _cpu_why_not, _cpu),
    Kernel(
        "triton",
        "Triton, both factors in one launch, not yet timed on a GPU; torch's two products for many tokens",
        _triton_why_not,
        _triton,
    ),
    Kernel("reference", "torch, two dense products", lambda *_: None, _reference),
)


# The op ------------------------------------------------------------------------------------------------------------


def _check(x: Tensor, up: Tensor, down: Tensor, bias: Tensor | None) -> None:
    """Refuse what no product may see."""
    if not x.is_floating_point():
        raise RuntimeError(f"low_rank_linear: x must be floating point, got {x.dtype}")
    if up.dim() != 2 or down.dim() != 2 or not down.numel():
        raise RuntimeError(
            f"low_rank_linear: factors must be matrices of at least one rank and column, got {tuple(up.shape)} and "
            f"{tuple(down.shape)}"
        )
    if x.dim() < 1 or x.shape[-1] != down.shape[1]:
        raise RuntimeError(f"low_rank_linear: x has shape {tuple(x.shape)}, the weight has {down.shape[1]} columns")
    if up.shape[1] != down.shape[0]:
        raise RuntimeError(f"low_rank_linear: factors of rank {up.shape[1]} and {down.shape[0]}")
    if not x.device == up.device == down.device:
        raise RuntimeError(f"low_rank_linear: x is on {x.device}, the weight on {up.device} and {down.device}")
    if bias is not None and bias.shape != (up.shape[0],):
        raise RuntimeError(f"low_rank_linear: bias has shape {tuple(bias.shape)}, expected ({up.shape[0]},)")
    if bias is not None and bias.device != x.device:
        raise RuntimeError(f"low_rank_linear: x is on {x.device}, the bias on {bias.device}")


def _linear(x: Tensor, up: Tensor, down: Tensor, bias: Tensor | None) -> Tensor:
    _check(x, up, down, bias)
    out: Tensor = TABLE.choose(x.dtype, x.device.type, up, down).linear(x, up, down, bias)
    return out


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


class Ready:
    """The product with two factors on the CPU, for calls that nothing has to see: what is chosen, without asking."""

    def __init__(self, up: Tensor, down: Tensor, bias: Tensor | None) -> None:
        """Look up what does not change from call to call."""
        self._up, self._down, self._bias = up, down, bias
        self._columns = down.shape[1]
        self._call = cpu.Call(up, down, bias)

    def __call__(self, x: Tensor) -> Tensor | None:
        """Return what :func:`low_rank_linear` would, or None where that has to be asked."""
        if forced_name() is not None or not unobserved(x, self._bias, self._up, self._down):
            return None
        out = self._call(x)
        if out is None and x.is_cpu and x.dtype in cpu.DTYPES and x.dim() and x.shape[-1] == self._columns:
            if x.numel() > cpu.most_tokens(x.dtype, self._up.dtype) * self._columns:
                return _reference(x, self._up, self._down, self._bias)
        return out


def low_rank_ready(up: Tensor, down: Tensor, bias: Tensor | None) -> Ready | None:
    """Return a shorter way to :func:`low_rank_linear` with one weight, None if there is none."""
    if up.device.type != "cpu" or cpu.unsupported(torch.float32, up, down) is not None:
        return None
    return None if bias is not None and not bias.is_contiguous() else Ready(up, down, bias)
