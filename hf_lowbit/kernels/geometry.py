"""Shape of a convolution: what a kernel needs beside tensors, and how a weight is laid out as a matrix of rows."""

from __future__ import annotations

import dataclasses
import math
import reprlib
from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.nn.functional import conv2d, conv_transpose2d

from hf_lowbit.kernels.planes import plane_bytes

Pair = tuple[int, int]
MOST_TAPS = 64  # of a kernel's rows and of its columns, as in csrc/popcount_rows.h; more than any layer has
MOST_CHANNELS, _MOST_OUTPUTS = 2**20, 2**24
_RANGES = (
    *((name, 1, MOST_TAPS) for name in ("kernel", "stride", "dilation")),
    ("padding", 0, MOST_TAPS * MOST_TAPS),
    ("output_padding", 0, MOST_TAPS),
)


@dataclasses.dataclass(frozen=True)
class ConvGeometry:
    """A 2-D convolution or transposed convolution with zero padding, as ``torch.nn.Conv2d`` means it.

    Attributes:
        in_channels, out_channels: of images.
        kernel, stride, padding, dilation, output_padding: (rows, columns); the last for transposed ones only.
        groups: that channels are split into.
        transposed: whether it is a transposed convolution.
    """

    in_channels: int
    out_channels: int
    kernel: Pair
    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)
    groups: int = 1
    transposed: bool = False
    output_padding: Pair = (0, 0)

    @classmethod
    def of(cls, numbers: Sequence[int]) -> ConvGeometry:
        """Undo :attr:`numbers`."""
        ins, outs, kh, kw, sh, sw, ph, pw, dh, dw, groups, transposed, oh, ow = numbers
        return cls(ins, outs, (kh, kw), (sh, sw), (ph, pw), (dh, dw), groups, bool(transposed), (oh, ow))

    @classmethod
    def of_module(cls, module: Any) -> ConvGeometry:
        """Return the geometry of a ``Conv2d`` or ``ConvTranspose2d``.

        Raises:
            ValueError: padding other than with zeros, or padding that differs from side to side.
        """
        transposed = hasattr(module, "transposed") and bool(module.transposed)
        padding = module.padding
        if module.padding_mode != "zeros":
            raise ValueError(f"padding_mode {module.padding_mode!r} is not supported, only 'zeros'")
        if padding == "valid":
            padding = (0, 0)
        elif padding == "same":
            total = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
            if any(t % 2 for t in total):
                raise ValueError("padding 'same' of an even kernel differs from side to side, which is not supported")
            padding = (total[0] // 2, total[1] // 2)
        extra: Any = tuple(module.output_padding) if transposed else (0, 0)
        parts = (module.kernel_size, module.stride, padding, module.dilation)
        pairs: Any = [tuple(map(int, part)) for part in parts]
        numbers: Any = (module.in_channels, module.out_channels, *pairs, module.groups, transposed, extra)
        return cls(*numbers)

    @property
    def numbers(self) -> tuple[int, ...]:
        """All values as integers, for the schema of an op."""
        pairs = (*self.kernel, *self.stride, *self.padding, *self.dilation)
        last = (self.groups, int(self.transposed), *self.output_padding)
        return (self.in_channels, self.out_channels, *pairs, *last)

    def problems(self) -> list[str]:
        """Return what is wrong with the values, empty if nothing is; they may come from somebody's file."""
        found = []
        for name, least, most in _RANGES:
            pair = getattr(self, name)
            good = isinstance(pair, tuple) and len(pair) == 2 and all(type(v) is int for v in pair)
            if not good or not all(least <= v <= most for v in pair):
                found.append(f"{name} must be two integers from {least} to {most}, got {reprlib.repr(pair)}")
        counts = (("in_channels", MOST_CHANNELS), ("out_channels", _MOST_OUTPUTS), ("groups", MOST_CHANNELS))
        for name, most in counts:
            value = getattr(self, name)
            if type(value) is not int or not 1 <= value <= most:
                found.append(f"{name} must be an integer from 1 to {most}, got {reprlib.repr(value)}")
        if type(self.transposed) is not bool:
            found.append(f"transposed must be true or false, got {reprlib.repr(self.transposed)}")
        if found:
            return found
        if self.in_channels % self.groups or self.out_channels % self.groups:
            found.append(f"groups {self.groups} must divide {self.in_channels} and {self.out_channels} channels")
        extra = zip(self.output_padding, self.stride, self.dilation, strict=True)
        if any(self.output_padding) and (not self.transposed or any(o >= max(s, d) for o, s, d in extra)):
            found.append("output_padding is for transposed convolutions, and smaller than stride or dilation")
        return found

    @property
    def group_channels(self) -> int:
        """Input channels that an output reads."""
        return self.in_channels // self.groups

    @property
    def taps(self) -> int:
        """Places of the kernel."""
        return math.prod(self.kernel)

    @property
    def columns(self) -> int:
        """Weights of an output channel: channels of its group times taps."""
        return self.group_channels * self.taps

    @property
    def plane_bytes(self) -> int:
        """Bytes of the signs of an output channel."""
        return plane_bytes(self.columns)

    @property
    def stride_gain(self) -> int:
        """Product of both strides."""
        return math.prod(self.stride)

    @property
    def weight_shape(self) -> tuple[int, int, int, int]:
        """Shape of torch's weight."""
        if self.transposed:
            return (self.in_channels, self.out_channels // self.groups, *self.kernel)
        return (self.out_channels, self.group_channels, *self.kernel)

    def check_input(self, x: Tensor) -> None:
        """Refuse what a shift of each channel would silently spread, or no convolution takes.

        Raises:
            ValueError: ``x`` is not (N, in_channels, H, W), floating point.
        """
        if x.dim() != 4 or x.shape[1] != self.in_channels or not x.is_floating_point():
            raise ValueError(
                f"input must be floating point (N, {self.in_channels}, H, W), got {tuple(x.shape)}, {x.dtype}"
            )

    def convolve(self, image: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Convolve (N, in_channels, H, W) with torch's weight, of the same dtype; by torch, in that dtype."""
        if self.transposed:
            return conv_transpose2d(
                image, weight, bias, self.stride, self.padding, self.output_padding, self.groups, self.dilation
            )
        return conv2d(image, weight, bias, self.stride, self.padding, self.dilation, self.groups)

    def output_size(self, height: int, width: int) -> Pair:
        """Return height and width of the result for those of an image."""

        def one(size: int, i: int) -> int:
            reach = self.dilation[i] * (self.kernel[i] - 1)
            if self.transposed:
                return (size - 1) * self.stride[i] - 2 * self.padding[i] + reach + self.output_padding[i] + 1
            return (size + 2 * self.padding[i] - reach - 1) // self.stride[i] + 1

        return one(height, 0), one(width, 1)

    def as_rows(self, weight: Tensor) -> Tensor:
        """Return torch's weight as (out_channels, columns), a row in the order (channel of the group, row, column)."""
        if self.transposed:  # stored as (in_channels, out_channels / groups, rows, columns)
            weight = weight.unflatten(0, (self.groups, -1)).transpose(1, 2).flatten(0, 1)
        return weight.reshape(self.out_channels, -1)

    def as_stored_by_torch(self, rows: Tensor) -> Tensor:
        """Undo :meth:`as_rows`."""
        weight = rows.reshape(self.out_channels, self.group_channels, *self.kernel)
        if self.transposed:
            weight = weight.unflatten(0, (self.groups, -1)).transpose(1, 2).flatten(0, 1)
        return weight
