"""Signs with surrogate gradients (BiDRN, arXiv 2311.14323, and the code of its ancestors).

======  =================================================================
symbol  name
======  =================================================================
x       input of a convolution after its shift, real-valued
W       latent weight, (C_out, C_in / groups, rows, columns), real-valued
s(·)    sign with s(0) = +1
α_c     scale of output channel c, mean of |W_c|
β       slope of the tanh surrogate
======  =================================================================

The paper's readable parts do not give the gradients; they are those of Bi-Real Net, ReActNet, BBCU and BiSRNet.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hf_lowbit.kernels.geometry import ConvGeometry


class _Sign(torch.autograd.Function):
    """s(x), with the gradient of a piecewise quadratic ("poly") or of a clamp ("clip")."""

    @staticmethod
    def forward(x: Tensor, poly: bool) -> Tensor:
        return torch.where(x >= 0, 1.0, -1.0).to(x.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, ctx.poly = inputs
        ctx.save_for_backward(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        size = x.abs()
        factor = (2 - 2 * size).clamp(min=0) if ctx.poly else (size <= 1).to(x.dtype)
        return grad * factor, None


class _TanhSign(torch.autograd.Function):
    """s(x), with the gradient of tanh(β x) for x and β."""

    @staticmethod
    def forward(x: Tensor, beta: Tensor) -> Tensor:
        return torch.where(x >= 0, 1.0, -1.0).to(x.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        x, beta = ctx.saved_tensors
        slope = grad * (1 - torch.tanh(beta * x) ** 2)
        return slope * beta, (slope * x).sum().to(beta.dtype).reshape(beta.shape)


def sign_activation(x: Tensor, ste: str, beta: Tensor | None = None) -> Tensor:
    """Return s(x) with a surrogate gradient.

    Args:
        x: any shape, floating.
        ste: "poly": 2 - 2|x| where |x| < 1, else 0; "clip": 1 where |x| <= 1, else 0; "tanh": β sech²(β x), and
            x sech²(β x) for β.
        beta: one element, for "tanh".

    Returns:
        The shape and dtype of ``x``, values -1 and +1.

    Source: ReActNet (poly), BBCU (clip), BiSRNet (tanh), code.  Differs: s(0) is +1 in place of 0, which no bit holds.
    """
    if ste == "tanh":
        if beta is None:
            raise ValueError("ste 'tanh' needs beta")
        out: Tensor = _TanhSign.apply(x, beta)
    else:
        out = _Sign.apply(x, ste == "poly")
    return out


class _BinaryWeight(torch.autograd.Function):
    """α_c s(W); to W the gradient of clamp(W, -1, 1), α left out."""

    @staticmethod
    def forward(weight: Tensor, scale: Tensor) -> Tensor:
        return torch.where(weight >= 0, scale, -scale)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (weight,) = ctx.saved_tensors
        return grad * (weight.abs() <= 1).to(grad.dtype), None


def weight_scale(weight: Tensor, geometry: ConvGeometry) -> Tensor:
    """Return α, (out_channels,): the mean of |W| over everything that an output channel reads."""
    return geometry.as_rows(weight.detach()).abs().mean(1)


def binarize_weight(weight: Tensor, geometry: ConvGeometry) -> Tensor:
    """Return α_c s(W) in torch's layout.

    The scale is outside the surrogate: the gradient to W is not multiplied by α, and is 0 where |W| > 1.

    Args:
        weight: in torch's layout of the convolution.
        geometry: of the convolution.

    Source: ReActNet, BBCU, BiSRNet (code).
    """
    spread = weight_scale(weight, geometry)[:, None].expand(-1, geometry.columns)
    out: Tensor = _BinaryWeight.apply(weight, geometry.as_stored_by_torch(spread))
    return out


def folded(scale: Tensor, bias: Tensor | None, norm: dict[str, Any] | None) -> Tensor:
    """Return scale and offset of the integer dots with bias and batch normalization folded in.

    Args:
        scale: α, (C,).
        bias: (C,) or None.
        norm: ``mean``, ``var``, ``eps``, and ``weight`` and ``bias`` (or None) of a batch normalization in evaluation
            mode; None without one.

    Returns:
        (2, C), float64: ``y = out[0] · dot + out[1]``.
    """
    scale = scale.double()
    offset = torch.zeros_like(scale) if bias is None else bias.double()
    if norm is not None:
        gain = (norm["var"].double() + norm["eps"]).rsqrt()
        gain = gain if norm["weight"] is None else gain * norm["weight"].double()
        offset = (offset - norm["mean"].double()) * gain
        offset = offset if norm["bias"] is None else offset + norm["bias"].double()
        scale = scale * gain
    return torch.stack([scale, offset])
