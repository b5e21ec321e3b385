"""Blocks of binary convolutions: the modules that change dimensions, and the dual-residual block.

A block adds its own full-precision residual (BR) around its units. The names and the wiring of the paper's four
modules are not in what could be read; those below are those of its ancestor BiSRNet.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, interpolate

from hf_lowbit.methods.bidrn.modules import BinaryConv2d
from hf_lowbit.methods.bidrn.options import BLOCK_RESIDUALS, UnitOptions


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
