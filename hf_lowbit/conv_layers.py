"""Modules that hold a packed convolution: sign weights, sign activations, and what is folded into them.

As with linear layers, ``weight`` is a stub of one element, so that a load without this package fails instead of
running on random weights. Batch normalization, bias and activation of the layer that was packed are part of it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from hf_lowbit.formats.binary_conv import BinaryConvFormat, BinaryConvSpec
from hf_lowbit.kernels.conv import rprelu, shifted, signs
from hf_lowbit.layers import PackedModule
from hf_lowbit.numerics.shape_adapter import adapt_shape

# Modules that are made on `meta` to be replaced by packed ones; types are compared exactly, as for linear layers.
DENSE_CONVS = (nn.Conv2d, nn.ConvTranspose2d)


class PackedConv2d(PackedModule, nn.Conv2d):
    """A convolution of signs with signs, with its full-precision residual and activation."""

    format_type: type[BinaryConvFormat]
    spec: BinaryConvSpec

    def __init__(self, packed: BinaryConvFormat, dtype: torch.dtype) -> None:
        """Wrap a packed convolution.

        Args:
            packed: the weight, on its final device or ``meta``.
            dtype: compute dtype, carried by the stub.
        """
        nn.Module.__init__(self)
        geometry = packed.spec.geometry
        self.in_channels, self.out_channels, self.groups = geometry.in_channels, geometry.out_channels, geometry.groups
        self.kernel_size, self.stride, self.padding = geometry.kernel, geometry.stride, geometry.padding
        self.dilation, self.output_padding = geometry.dilation, geometry.output_padding
        self.transposed, self.padding_mode = geometry.transposed, "zeros"
        self._hold(packed, dtype)
        self.register_parameter("bias", None)  # part of `affine`

    def residual(self, x: Tensor) -> Tensor:
        """Return the input in the shape of the output, in full precision."""
        size = self.spec.geometry.output_size(x.shape[2], x.shape[3])
        return adapt_shape(x, self.out_channels, size, self.spec.geometry.stride, self.transposed)

    def forward(self, input: Tensor, output_size: Any = None) -> Tensor:
        """Convolve (N, in_channels, H, W); the result has the dtype of the input.

        Raises:
            ValueError: ``output_size`` is given, which is fixed here.
        """
        if output_size is not None:
            raise ValueError("a packed convolution has a fixed output size; output_size is not supported")
        residual: Callable[[Tensor], Tensor] = self.residual
        packed: Any = self.packed
        out: Tensor = packed.convolve(input, residual)
        return out

    def dequantize(self, dtype: torch.dtype | None = None) -> nn.Module:
        """Return the same computation on a weight that is not packed, in ``dtype`` (default: that of the stub)."""
        return UnpackedConv2d(self, dtype or self.weight.dtype)

    def extra_repr(self) -> str:
        """Return the line that ``print(model)`` shows."""
        packed: Any = self.packed
        return f"{super().extra_repr()}, format={packed.name}, bits_per_weight={packed.bits_per_weight:.3f}"


class UnpackedConv2d(nn.Module):
    """What a packed convolution computes, by torch's convolution of a dense weight; activations stay signs."""

    affine: Any
    shift: Any
    act: Any

    def __init__(self, layer: PackedConv2d, dtype: torch.dtype) -> None:
        super().__init__()
        packed: Any = layer.packed
        geometry = layer.spec.geometry
        self.spec = layer.spec
        weight = geometry.as_stored_by_torch(packed.unpack()).to(dtype)
        self.weight = nn.Parameter(weight, requires_grad=False)
        for name in ("affine", "shift", "act"):
            part = getattr(packed, name)
            part = None if part is None else nn.Parameter(part.detach().float(), requires_grad=False)
            self.register_parameter(name, part)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve the signs of (N, in_channels, H, W); the result has the dtype of the input.

        Raises:
            ValueError: the input has another shape, or is not floating point.
        """
        g, spec = self.spec.geometry, self.spec
        g.check_input(x)
        y = g.convolve(signs(shifted(x, self.shift)).to(self.weight.dtype), self.weight)
        y = y.to(x.dtype) + self.affine[1, :, None, None].to(x.dtype)
        around = None
        if spec.residual != "none":
            around = adapt_shape(x, g.out_channels, g.output_size(x.shape[2], x.shape[3]), g.stride, g.transposed)
        if around is not None and spec.residual == "before_act":
            y = y + around
        y = y if self.act is None else rprelu(y, self.act)
        return y + around if around is not None and spec.residual == "after_act" else y


def packed_convs(model: nn.Module) -> dict[str, PackedConv2d]:
    """Return the packed convolutions of a model by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, PackedConv2d)}
