"""Binary convolutions in training form: the unit, the modules that change dimensions, and the dual-residual block.

A unit is ``x → shift → sign → convolution with α s(W) → batch normalization → RPReLU``, plus the full-precision input
(local convolution residual, LCR). A block adds its own full-precision residual (BR) around its units. The names and
the wiring of the paper's four modules are not in what could be read; those below are those of its ancestor BiSRNet.

A latent weight beyond 1 in size gets no gradient any more: weight decay, if there is one, is the only force on it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, interpolate
from torch.nn.modules.batchnorm import _BatchNorm

from hf_lowbit.formats.binary_conv import BinaryConvFormat, BinaryConvSpec
from hf_lowbit.kernels.conv import rprelu, scaled, shifted, signs
from hf_lowbit.kernels.geometry import ConvGeometry
from hf_lowbit.methods.bidrn.algorithm import binarize_weight, folded, sign_activation, weight_scale
from hf_lowbit.methods.bidrn.options import BLOCK_RESIDUALS, UnitOptions
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


# Modules that change dimensions --------------------------------------------------------------------------------------


class DownScale(BinaryConv2d):
    """C, H, W → C, H/2, W/2: one binary convolution of stride 2, around it a 2 × 2 mean."""

    def __init__(self, channels: int, kernel_size: int = 3, options: UnitOptions | None = None) -> None:
        super().__init__(channels, channels, kernel_size, 2, kernel_size // 2, options=options)


class _Branches(nn.Module):
    """Binary convolutions side by side, each C → C with its own normalization, activation and residual."""

    def __init__(self, count: int, channels: int, kernel_size: int, options: UnitOptions | None) -> None:
        super().__init__()
        if count < 1:
            raise ValueError(f"ratio must be at least 1, got {count}")
        units = [
            BinaryConv2d(channels, channels, kernel_size, 1, kernel_size // 2, options=options) for _ in range(count)
        ]
        self.units = nn.ModuleList(units)

    def _each(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        return [unit(x) for unit, x in zip(self.units, inputs, strict=True)]


class FusionIncrease(_Branches):
    """C → ratio · C: so many binary convolutions of the same input, one after the other along the channels."""

    def __init__(
        self, channels: int, ratio: int = 2, kernel_size: int = 1, options: UnitOptions | None = None
    ) -> None:
        super().__init__(ratio, channels, kernel_size, options)

    def forward(self, x: Tensor) -> Tensor:
        """Return (N, ratio · C, H, W) of (N, C, H, W)."""
        return torch.cat(self._each([x] * len(self.units)), 1)


class FusionDecrease(_Branches):
    """ratio · C → C: one binary convolution for each run of C channels, and the mean of their outputs."""

    def __init__(
        self, channels: int, ratio: int = 2, kernel_size: int = 1, options: UnitOptions | None = None
    ) -> None:
        if ratio < 1 or channels % ratio:
            raise ValueError(f"ratio {ratio} must divide the {channels} channels")
        super().__init__(ratio, channels // ratio, kernel_size, options)

    def forward(self, x: Tensor) -> Tensor:
        """Return (N, C, H, W) of (N, ratio · C, H, W)."""
        return torch.stack(self._each(x.chunk(len(self.units), 1))).mean(0)


class DownSample(FusionIncrease):
    """C, H, W → 2 C, H/2, W/2: two binary convolutions of the 2 × 2 means, one after the other along the channels."""

    def __init__(self, channels: int, kernel_size: int = 3, options: UnitOptions | None = None) -> None:
        super().__init__(channels, 2, kernel_size, options)

    def forward(self, x: Tensor) -> Tensor:
        """Return (N, 2 · C, ⌈H/2⌉, ⌈W/2⌉) of (N, C, H, W)."""
        return super().forward(avg_pool2d(x, 2, 2, ceil_mode=True))


class UpSample(FusionDecrease):
    """C, H, W → C/2, 2 H, 2 W: bilinear upsampling, a binary convolution for each half, and their mean."""

    def __init__(self, channels: int, kernel_size: int = 3, options: UnitOptions | None = None) -> None:
        super().__init__(channels, 2, kernel_size, options)

    def forward(self, x: Tensor) -> Tensor:
        """Return (N, C/2, 2 · H, 2 · W) of (N, C, H, W)."""
        return super().forward(interpolate(x, scale_factor=2.0, mode="bilinear", align_corners=False))


def change_dimensions(
    channels: int, out_channels: int, kernel_size: int = 3, stride: int = 1, options: UnitOptions | None = None
) -> nn.Module:
    """Return the named module for a change of shape, or one unit where none is meant for it."""
    if stride == 2 and out_channels == channels:
        return DownScale(channels, kernel_size, options)
    if stride == 2 and out_channels == 2 * channels:
        return DownSample(channels, kernel_size, options)
    if stride == 1 and out_channels > channels and out_channels % channels == 0:
        return FusionIncrease(channels, out_channels // channels, kernel_size, options)
    if stride == 1 and out_channels < channels and channels % out_channels == 0:
        return FusionDecrease(channels, channels // out_channels, kernel_size, options)
    return BinaryConv2d(channels, out_channels, kernel_size, stride, kernel_size // 2, options=options)


KINDS = ("bottleneck", "basic")


def block_shapes(channels: int, out_channels: int, stride: int, kind: str) -> list[tuple[int, int, int, int]]:
    """Return (channels in, channels out, kernel, stride) of a residual block's convolutions, as in ResNet.

    Raises:
        ValueError: unknown ``kind``, or ``out_channels`` of a bottleneck that is no multiple of 4.
    """
    if kind not in KINDS:
        raise ValueError(f"unknown kind {kind!r}; known: {', '.join(KINDS)}")
    if kind == "basic":
        return [(channels, out_channels, 3, stride), (out_channels, out_channels, 3, 1)]
    if out_channels % 4:
        raise ValueError(f"out_channels of a bottleneck must be a multiple of 4, got {out_channels}")
    middle = out_channels // 4
    return [(channels, middle, 1, 1), (middle, middle, 3, stride), (middle, out_channels, 1, 1)]


class BiDRB(nn.Module):
    """A stack of binary units, each with its residual, and a residual around all of them; no ReLU after the sum."""

    def __init__(
        self,
        channels: int,
        out_channels: int,
        stride: int = 1,
        *,
        kind: str = "bottleneck",
        block_residual: str = "fp",
        named: bool = False,
        options: UnitOptions | None = None,
    ) -> None:
        """Make a block.

        Args:
            channels: of the input.
            out_channels: of the output, a multiple of 4 for a bottleneck.
            stride: of the first 3 × 3 convolution.
            kind: "bottleneck" (1 × 1, 3 × 3, 1 × 1) or "basic" (two 3 × 3).
            block_residual: "fp" (identity, or a real 1 × 1 projection with normalization where shapes differ),
                "binary" (that projection binary) or "none".
            named: use the named modules where the shape changes, in place of one convolution with an adapter.
            options: of the units.

        Raises:
            ValueError: unknown ``kind`` or ``block_residual``, or ``out_channels`` that the kind cannot have.
        """
        super().__init__()
        if block_residual not in BLOCK_RESIDUALS:
            raise ValueError(f"block_residual must be one of {', '.join(BLOCK_RESIDUALS)}, got {block_residual!r}")
        shapes = block_shapes(channels, out_channels, stride, kind)

        def unit(ins: int, outs: int, size: int, step: int) -> nn.Module:
            if named:
                return change_dimensions(ins, outs, size, step, options)
            return BinaryConv2d(ins, outs, size, step, size // 2, options=options)

        self.units = nn.Sequential(*(unit(*shape) for shape in shapes))
        self.around: nn.Module | None = nn.Identity()
        if block_residual == "none":
            self.around = None
        elif channels != out_channels or stride != 1:
            self.around = projection(channels, out_channels, stride, block_residual == "binary", options)

    def forward(self, x: Tensor) -> Tensor:
        """Return (N, out_channels, H / stride, W / stride) of (N, channels, H, W)."""
        out: Tensor = self.units(x)
        return out if self.around is None else out + self.around(x)


def projection(channels: int, out_channels: int, stride: int, binary: bool, options: UnitOptions | None) -> nn.Module:
    """Return the 1 × 1 projection with normalization around a block; a binary one has no residual, no activation."""
    if binary:
        own = options or UnitOptions()
        plain = UnitOptions(ste=own.ste, shift=own.shift, act="none", lcr=False)
        return BinaryConv2d(channels, out_channels, 1, stride, options=plain)
    return nn.Sequential(nn.Conv2d(channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels))
