"""How close a reconstructed image is to the true one: PSNR and SSIM as papers on super-resolution state them.

Both are taken of the luma of images rounded to 8 bits, without a border as wide as the scale, which depends on how a
model pads.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import conv2d

# BT.601 for 8 bits: black is 16 and white 235
_LUMA = (65.481, 128.553, 24.966)
_PEAK = 255.0
_WINDOW, _SIGMA = 11, 1.5
# Of an image inside the border, for SSIM.
LEAST_SIDE = _WINDOW


def luma(images: Tensor) -> Tensor:
    """Return the Y channel of RGB images after they were rounded to 8 bits.

    Args:
        images: (N, 3, H, W), floating, 0 to 1; what lies outside is clipped.

    Returns:
        (N, H, W), float64, from 16 to 235.

    Raises:
        ValueError: not RGB images.

    Source: ITU-R BT.601, as ``rgb2ycbcr`` of MATLAB has it.
    """
    if images.dim() != 4 or images.shape[1] != 3 or not images.is_floating_point():
        raise ValueError(f"images must be floating (N, 3, H, W), got {images.dtype} {tuple(images.shape)}")
    rounded = (images.double().clamp(0, 1) * _PEAK).round() / _PEAK
    return 16 + torch.einsum("nchw,c->nhw", rounded, rounded.new_tensor(_LUMA))


def psnr(images: Tensor, truth: Tensor, border: int = 0) -> Tensor:
    """Peak signal-to-noise ratio of the luma, in dB.

    Args:
        images: (N, 3, H, W), floating, 0 to 1.
        truth: same shape.
        border: pixels left out on every side, usually the scale.

    Returns:
        (N,), float64; infinity for equal images.

    Raises:
        ValueError: shapes differ, or nothing is left inside the border.
    """
    one, other = _inner(images, truth, border)
    mean = (one - other).square().mean((1, 2))
    return 10 * torch.log10(_PEAK**2 / mean)


def ssim(images: Tensor, truth: Tensor, border: int = 0) -> Tensor:
    """Structural similarity of the luma: Gaussian window of 11, σ = 1.5, valid positions only.

    Args:
        images: (N, 3, H, W), floating, 0 to 1.
        truth: same shape.
        border: pixels left out on every side.

    Returns:
        (N,), float64, 1 for equal images.

    Raises:
        ValueError: shapes differ, or less than a window is left inside the border.

    Source: Wang et al. 2004, Eq. 13, with K1 = 0.01 and K2 = 0.03.
    """
    one, other = _inner(images, truth, border)
    if min(one.shape[1:]) < _WINDOW:
        raise ValueError(f"SSIM needs {_WINDOW} pixels inside the border, got {tuple(one.shape[1:])}")
    a, b = one.unsqueeze(1), other.unsqueeze(1)
    mean_a, mean_b = _blurred(a), _blurred(b)
    var_a, var_b = _blurred(a * a) - mean_a**2, _blurred(b * b) - mean_b**2
    cov = _blurred(a * b) - mean_a * mean_b
    c1, c2 = (0.01 * _PEAK) ** 2, (0.03 * _PEAK) ** 2
    found = (2 * mean_a * mean_b + c1) * (2 * cov + c2) / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))
    return found.mean((1, 2, 3))


def _inner(images: Tensor, truth: Tensor, border: int) -> tuple[Tensor, Tensor]:
    if images.shape != truth.shape:
        raise ValueError(f"images have shape {tuple(images.shape)}, the true ones {tuple(truth.shape)}")
    if border < 0 or 2 * border >= min(images.shape[-2:]):
        raise ValueError(f"border must leave pixels of {tuple(images.shape[-2:])}, got {border}")
    own = slice(border, -border or None)
    return luma(images)[:, own, own], luma(truth)[:, own, own]


def _blurred(images: Tensor) -> Tensor:
    offsets = torch.arange(_WINDOW, dtype=images.dtype, device=images.device) - _WINDOW // 2
    weights = torch.exp(-(offsets**2) / (2 * _SIGMA**2))
    weights = weights / weights.sum()
    return conv2d(conv2d(images, weights.view(1, 1, -1, 1)), weights.view(1, 1, 1, -1))
