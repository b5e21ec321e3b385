"""Shape of a convolution: what a kernel needs beside tensors, and how a weight is laid out as a matrix of rows."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from hf_lowbit.kernels.planes import plane_bytes

Pair = tuple[int, int]


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
