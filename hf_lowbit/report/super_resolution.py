"""How good a super-resolution model is: PSNR and SSIM on held-out images, beside the dense model and bicubic.

Every image is shrunk as training sets do it, enlarged again by the model, and compared with what it was: luma, 8 bits,
without a border as wide as the scale. Such figures depend on the images, so bicubic interpolation of the same ones
stands beside them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_lowbit.calibration.images import enlarge, load_images, multiple_of, reconstructed, scale_of, shrink
from hf_lowbit.errors import CalibrationError, HfLowbitError
from hf_lowbit.hf.auto import auto_class
from hf_lowbit.numerics.image_quality import LEAST_SIDE, psnr, ssim
from hf_lowbit.report.headers import read_checkpoint
from hf_lowbit.report.inspect import bits_per_parameter

BICUBIC = "bicubic"


def score(model: Any, images: Sequence[Tensor], scale: int) -> dict[str, float]:
    """Return mean PSNR (dB) and SSIM of a model over images.

    Args:
        model: makes images larger; None for bicubic interpolation.
        images: (3, H, W) each, float32, 0 to 1, of full resolution.
        scale: how many times larger.

    Raises:
        ValueError: there are no images, one is smaller than the window of SSIM, or the scale is below 1.
        HfLowbitError: a reconstruction holds NaN.
    """
    if not images or scale < 1:
        raise ValueError(f"PSNR needs images and a scale of at least 1, got {len(images)} images and {scale}")
    sums = torch.zeros(2, dtype=torch.float64)
    for image in images:
        low = shrink(image.unsqueeze(0), scale)
        truth = image.unsqueeze(0)[..., : scale * low.shape[-2], : scale * low.shape[-1]]
        if model is None:
            found = enlarge(low, scale)
        else:
            own = low.to(model.device, model.dtype)
            found = reconstructed(model, own, scale, multiple_of(model)).cpu()
        sums += torch.stack([psnr(found, truth, scale)[0], ssim(found, truth, scale)[0]])
    if bool(torch.isnan(sums).any()):
        raise HfLowbitError("the model's images hold NaN, so there is no PSNR")
    mean = (sums / len(images)).tolist()
    return {"psnr": mean[0], "ssim": mean[1]}


def evaluate_images(
    path: str | Path, data: Any, against: str | Path | None = None, samples: int = 8
) -> dict[str, Any]:
    """Measure a super-resolution model, compressed or dense, beside bicubic and another model.

    Args:
        path: folder or Hub repository.
        data: held-out images of full resolution, see :func:`hf_lowbit.calibration.images.load_images`.
        against: the model to compare with, usually the dense one, or None.
        samples: at most so many images, in order.

    Returns:
        JSON types: what was measured on, "models" (psnr, ssim, bytes on disk, bits per parameter by name; bicubic
        last) and "ratios" of bytes of the first model to the other, empty without one.

    Raises:
        ValueError, HfLowbitError, OSError: a model or the images cannot be had, or scales differ.
    """
    places = [path] if against is None else [path, against]
    checkpoints = [read_checkpoint(place) for place in places]
    names = [checkpoint.name for checkpoint in checkpoints]
    if len(set(names)) < len(names):
        names = [f"{name} ({role})" for name, role in zip(names, ("model", "against"), strict=True)]
    if type(samples) is not int or samples < 1:
        raise ValueError(f"samples must be an integer of at least 1, got {samples}")
    images = load_images(data, samples)
    rows: dict[str, dict[str, Any]] = {}
    scales = set()
    for name, place, checkpoint in zip(names, places, checkpoints, strict=True):
        model = auto_class(place).from_pretrained(place).eval()
        scale = _scale(model, name)
        scales.add(scale)
        if len(scales) > 1:
            raise ValueError(f"the two models make images larger by different scales: {sorted(scales)}")
        _refuse_small(images, scale)
        size = {"bytes": checkpoint.total_bytes, "bits_per_parameter": bits_per_parameter(checkpoint)}
        rows[name] = {**score(model, images, scale), **size}
    ratios = {names[0]: _ratios(rows[names[0]], rows[names[1]])} if against is not None else {}
    rows[BICUBIC] = {**score(None, images, scales.pop()), "bytes": None, "bits_per_parameter": None}
    return {
        "data": Path(data).name if isinstance(data, (str, Path)) else "images",
        "images": len(images),
        "scale": scale,
        "models": rows,
        "ratios": ratios,
    }


def _scale(model: Any, name: str) -> int:
    scale = scale_of(model)
    if scale is None or scale < 2:
        raise ValueError(f"{name}: PSNR of super-resolution needs a model that makes images larger ('upscale' > 1)")
    return scale


def _refuse_small(images: Sequence[Tensor], scale: int) -> None:
    least = LEAST_SIDE + 3 * scale
    for number, image in enumerate(images):
        if min(image.shape[-2:]) < least:
            raise CalibrationError(
                f"image {number} has {image.shape[-2]} x {image.shape[-1]} pixels, too few for SSIM: {least}"
            )


def _ratios(own: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, float]:
    return {key: own[key] / other[key] for key in ("bytes", "bits_per_parameter")}
