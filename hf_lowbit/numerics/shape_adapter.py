"""The parameter-free way around a convolution: its input, brought to the shape of its output in full precision."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, interpolate, pad


def adapt_channels(x: Tensor, channels: int) -> Tensor:
    """Bring (N, C, H, W) to another number of channels without parameters.

    Args:
        x: images.
        channels: wanted. A multiple of C: copies, one after the other. A divisor of C: the mean of C / channels runs
            of ``channels`` neighbours. Otherwise channel c is the mean of channels ``⌊c · C / channels⌋`` to
            ``⌈(c + 1) · C / channels⌉ - 1``.

    Source: BiSRNet's code pairs runs of channels in its fusion modules; the last case, which BoxNet's first layer
    needs (2248 to 256), is ours.
    """
    have = x.shape[1]
    if channels == have:
        return x
    if channels % have == 0:
        return x.repeat(1, channels // have, 1, 1)
    if have % channels == 0:
        return x.unflatten(1, (have // channels, channels)).mean(1)
    begin = [c * have // channels for c in range(channels)]
    end = [-(-(c + 1) * have // channels) for c in range(channels)]
    shares = x.new_zeros(channels, have)
    for c, (b, e) in enumerate(zip(begin, end, strict=True)):
        shares[c, b:e] = 1 / (e - b)
    return torch.einsum("nchw,oc->nohw", x, shares)


def adapt_size(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Crop or pad with zeros, evenly on both sides, to ``size``; what is left over counts at the end."""
    for axis, want in zip((2, 3), size, strict=True):
        extra = x.shape[axis] - want
        if extra > 0:
            x = x.narrow(axis, extra // 2, want)
        elif extra < 0:
            before, after = -extra // 2, -extra - -extra // 2
            x = pad(x, (before, after) if axis == 3 else (0, 0, before, after))
    return x


def adapt_shape(
    x: Tensor, channels: int, size: tuple[int, int], stride: tuple[int, int], transposed: bool = False
) -> Tensor:
    """Bring the input of a convolution to the shape of its output.

    Args:
        x: (N, C, H, W).
        channels: of the output.
        size: height and width of the output.
        stride: of the convolution: averages over windows of that size, the last ones cut short by the border; of a
            transposed one: bilinear upsampling by that factor.
        transposed: whether it is a transposed convolution.

    Returns:
        (N, channels, *size). It is ``x`` itself where nothing has to change.

    Source: BiSRNet's down-sampling and up-sampling modules (code). Differs: sizes that are left over by one row are
    cropped or padded with zeros; the sources have even sizes only.
    """
    if stride != (1, 1):
        if transposed:
            factor = (float(stride[0]), float(stride[1]))
            x = interpolate(x, scale_factor=factor, mode="bilinear", align_corners=False)
        else:
            x = avg_pool2d(x, stride, stride, ceil_mode=True)
    return adapt_channels(adapt_size(x, size), channels)
