"""Binary convolutions in training form; the blocks made of them are in :mod:`hf_lowbit.methods.bidrn.blocks`.

A unit is ``x → shift → sign → convolution with α s(W) → batch normalization → RPReLU``, plus the full-precision input
(local convolution residual, LCR).

A latent weight beyond 1 in size gets no gradient any more: weight decay, if there is one, is the only force on it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from hf_lowbit.formats.binary_conv import BinaryConvFormat, BinaryConvSpec
from hf_lowbit.kernels.conv import rprelu, scaled, shifted, signs
from hf_lowbit.kernels.geometry import ConvGeometry
from hf_lowbit.methods.bidrn.algorithm import binarize_weight, folded, sign_activation, weight_scale
from hf_lowbit.methods.bidrn.options import UnitOptions
from hf_lowbit.numerics.shape_adapter import adapt_shape


class BinaryUnit(nn.Module):
    """What :class:`BinaryConv2d` and :class:`BinaryConvTranspose2d` share.

    Attributes:
        norm: batch normalization inside of the unit, or None.
        shift: (C_in,), or (2, C_in) with factors first, or None.
        act: (3, C_out): slope, shift before, shift after, or None.
        beta: slope of the tanh surrogate, or None.
        trained_batches: how often the unit has run in training with gradients: what never has is not packed.
    """

    weight: Any
    bias: Any
    out_channels: int
    shift: Any
    act: Any
    beta: Any
    trained_batches: Any

    def _make(self, options: Any, norm: bool | nn.Module | None) -> None:
        options = UnitOptions() if options is None else options
        if not isinstance(options, UnitOptions):
            raise ValueError(f"options must be UnitOptions, got {type(options).__name__}")
        if not isinstance(norm, (bool, _BatchNorm, type(None))):  # no other can be folded
            raise ValueError(f"norm must be a batch normalization, True or False, got {type(norm).__name__}")
        if isinstance(norm, _BatchNorm) and norm.num_features != self.out_channels:
            raise ValueError(f"norm is of {norm.num_features} channels, the convolution makes {self.out_channels}")
        self.options = options
        self.geometry = ConvGeometry.of_module(self)
        kind: dict[str, Any] = {"device": self.weight.device, "dtype": self.weight.dtype}
        ins, outs = self.geometry.in_channels, self.geometry.out_channels
        shift = {"none": None, "bias": torch.zeros(ins, **kind), "affine": torch.zeros(2, ins, **kind)}[options.shift]
        act = torch.zeros(3, outs, **kind) if options.act == "rprelu" else None
        beta = torch.ones(1, **kind) if options.ste == "tanh" else None
        for name, value in (("shift", shift), ("act", act), ("beta", beta)):
            self.register_parameter(name, None if value is None else nn.Parameter(value))
        self.norm = nn.BatchNorm2d(outs, **kind) if norm is True else norm or None
        self.register_buffer("trained_batches", torch.zeros((), dtype=torch.int64, device=self.weight.device))
        self.reset_unit()

    @torch.no_grad()
    def reset_unit(self, copy: Callable[[Tensor, Tensor], Any] = Tensor.copy_) -> None:
        """Set what belongs to the unit beside weight and normalization: no shift, slope 0.25, β = 1, untrained.

        Args:
            copy: ``(tensor, values)``, writes the values into the tensor, whole.
        """
        for tensor, first in ((self.shift, 1.0), (self.act, 0.25), (self.beta, 1.0), (self.trained_batches, 0)):
            if tensor is not None:
                values = torch.zeros_like(tensor)
                if tensor.dim() == 2 or tensor is self.beta:
                    values[0] = first
                copy(tensor, values)

    def forward(self, input: Tensor) -> Tensor:
        """Return (N, C_out, H_out, W_out) of (N, C_in, H, W), in its dtype.

        In evaluation mode the steps are those of the packed form, rounding included: a difference of one unit in the
        last place could turn a sign further on. Gradients are those of the training form all the same.

        Raises:
            ValueError: the input has another shape, or is not floating point.
        """
        self.geometry.check_input(input)
        if self.training:
            if torch.is_grad_enabled() and self.weight.requires_grad:
                self.trained_batches.add_(1)
            return self._trained(input)
        with torch.no_grad():
            exact = self._exact(input)
        if not torch.is_grad_enabled():
            return exact
        trained = self._trained(input)
        return exact + (trained - trained.detach())

    def _trained(self, input: Tensor) -> Tensor:
        options = self.options
        image = sign_activation(shifted(input, self.shift), options.ste, self.beta).to(input.dtype)
        weight = binarize_weight(self.weight, self.geometry).to(input.dtype)
        y = self.geometry.convolve(image, weight, None if self.bias is None else self.bias.to(input.dtype))
        y = y if self.norm is None else self.norm(y)
        around = self._around(input, y)
        if around is not None and options.residual_position == "before_act":
            y = y + around
        y = y if self.act is None else rprelu(y, self.act)
        return y + around if around is not None and options.residual_position == "after_act" else y

    def _exact(self, input: Tensor) -> Tensor:
        dot = self.geometry.convolve(signs(shifted(input, self.shift)), signs(self.weight))
        affine = self.affine().float()
        around = self._around(input, dot)
        if around is not None and self.options.residual_position == "before_act" and self.act is not None:
            return rprelu(scaled(dot, affine, None).to(input.dtype) + around, self.act)
        y = scaled(dot, affine, self.act).to(input.dtype)
        return y if around is None else y + around

    def _around(self, input: Tensor, y: Tensor) -> Tensor | None:
        if not self.options.lcr:
            return None
        g = self.geometry
        return adapt_shape(input, g.out_channels, (y.shape[2], y.shape[3]), g.stride, g.transposed)

    def affine(self, name: str = "unit") -> Tensor:
        """Return scale and offset of the integer dots, (2, C_out), float64; normalization is folded in.

        Raises:
            ValueError: the normalization keeps no running statistics.
        """
        norm = None if self.norm is None else _norm_values(self.norm, name)
        return folded(weight_scale(self.weight.float(), self.geometry), self.bias, norm)

    def extra_repr(self) -> str:
        """Return the line that ``print(model)`` shows."""
        o = self.options
        return f"{super().extra_repr()}, ste={o.ste}, shift={o.shift}, act={o.act}, residual={o.residual}"

    def spec(self, side_dtype: str = "float32") -> BinaryConvSpec:
        """Return what the unit is stored as."""
        o = self.options
        return BinaryConvSpec.of(self.geometry, shift=o.shift, act=o.act, residual=o.residual, side_dtype=side_dtype)

    @torch.no_grad()
    def packed(self, side_dtype: str = "float32", name: str = "unit") -> BinaryConvFormat:
        """Return the packed form, batch normalization folded in.

        Raises:
            ValueError: a value is not finite or leaves the range of ``side_dtype``; names the unit.
        """
        affine = self.affine(name)
        try:
            return BinaryConvFormat.pack(self.spec(side_dtype), self.weight, affine, self.shift, self.act)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error


def _norm_values(norm: Any, name: str) -> dict[str, Any]:
    if norm.running_mean is None:
        raise ValueError(f"{name}: its batch normalization keeps no running statistics, so it cannot be folded")
    return {
        "mean": norm.running_mean,
        "var": norm.running_var,
        "eps": norm.eps,
        "weight": norm.weight,
        "bias": norm.bias,
    }


class BinaryConv2d(BinaryUnit, nn.Conv2d):
    """A convolution with 1-bit weights and activations in training form."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = False,
        *,
        options: UnitOptions | None = None,
        norm: bool | nn.Module = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        """Make a unit.

        Args:
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, device, dtype: as of
                ``torch.nn.Conv2d``.
            options: of the unit.
            norm: make a batch normalization, take this one, or have none.
        """
        kind = {"device": device, "dtype": dtype}
        nn.Conv2d.__init__(
            self, in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, **kind
        )
        self._make(options, norm)


class BinaryConvTranspose2d(BinaryUnit, nn.ConvTranspose2d):
    """A transposed convolution with 1-bit weights and activations; its residual is upsampled bilinearly."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] = 0,
        output_padding: int | tuple[int, int] = 0,
        groups: int = 1,
        bias: bool = False,
        dilation: int | tuple[int, int] = 1,
        *,
        options: UnitOptions | None = None,
        norm: bool | nn.Module = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        """Make a unit; arguments as of ``torch.nn.ConvTranspose2d`` and :class:`BinaryConv2d`."""
        kind = {"device": device, "dtype": dtype}
        nn.ConvTranspose2d.__init__(
            self, in_channels, out_channels, kernel_size, stride, padding, output_padding, groups, bias, dilation,
            **kind,
        )  # fmt: skip
        self._make(options, norm)

    def forward(self, input: Tensor, output_size: Any = None) -> Tensor:
        """Return the upsampled images; ``output_size`` must be None.

        Raises:
            ValueError: ``output_size`` is given.
        """
        if output_size is not None:
            raise ValueError("a binary transposed convolution has a fixed output size; output_size is not supported")
        return BinaryUnit.forward(self, input)


def binary_like(conv: Any, norm: nn.Module | None, options: UnitOptions) -> BinaryUnit:
    """Return the unit that takes the place of a dense convolution, with its weight as latents and its bias."""
    arguments = {"options": options, "norm": norm or False, "device": conv.weight.device, "dtype": conv.weight.dtype}
    shared = (conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding)
    unit: BinaryUnit
    if conv.transposed:
        unit = BinaryConvTranspose2d(
            *shared, conv.output_padding, conv.groups, conv.bias is not None, conv.dilation, **arguments
        )
    else:
        unit = BinaryConv2d(*shared, conv.dilation, conv.groups, conv.bias is not None, **arguments)
    unit.weight, unit.bias = conv.weight, conv.bias
    unit.train(conv.training)
    return unit
