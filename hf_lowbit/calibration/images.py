"""Images for calibration and evaluation: from files, a folder, arrays, tensors or a dataset.

Everything ends as float32 tensors (3, H, W) from 0 to 1, and calibration as one batch of patches that a model takes.
Sampling is deterministic: the same images, seed and sizes give the same patches on every machine.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from hf_lowbit.config import CalibrationRecord
from hf_lowbit.errors import CalibrationError
from hf_lowbit.image_config import images_kind

logger = logging.getLogger(__name__)
SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff")


def load_images(data: Any, most: int | None = None, seed: int | None = None) -> list[Tensor]:
    """Return the images of a source, all of them in memory.

    Args:
        data: an image file or a folder of them (sorted by name), or several images: file names, PIL images, arrays
            or tensors (H, W, 3), (3, H, W) or (H, W), uint8 or floating from 0 to 1; a batch of them in one; or a
            dataset whose rows are mappings with the key "image". Pictures have 8 bits, grey ones 8 or 16.
        most: read no more than so many; None reads all.
        seed: of the draw, if there are more; None takes the first ones, and so it is where their number is unknown.

    Returns:
        (3, H, W) each, float32, 0 to 1; grey images get three equal channels.

    Raises:
        CalibrationError: the source is missing, empty, unreadable or holds no images; says which one.
    """
    if isinstance(data, str) and not data:  # else it would be the current folder
        raise CalibrationError("images must be a folder, a file, a list of images or a dataset, got ''")
    if isinstance(data, (str, Path)):
        found = [_read(path) for path in _drawn(_files(Path(data)), most, seed)]
    else:
        items = enumerate(_drawn(_items(data), most, seed))
        found = [_as_image(item, f"image {number}") for number, item in items]
    if not found:
        raise CalibrationError("there are no images to calibrate on")
    return found


def _drawn(items: Any, most: int | None, seed: int | None) -> Iterable[Any]:
    """Return at most so many items, in their order."""
    count = len(items) if hasattr(items, "__len__") else None
    if most is None or (count is not None and count <= most):
        return items
    if count is None or seed is None or not hasattr(items, "__getitem__"):
        return itertools.islice(iter(items), most)
    chosen = torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:most].sort().values
    return [items[index] for index in chosen.tolist()]


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise CalibrationError(f"image source {str(path)!r} is neither a file nor a folder")
    found = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())
    if not found:
        raise CalibrationError(f"folder {path.name!r} holds no images ({', '.join(SUFFIXES)})")
    return found


def _items(data: Any) -> Any:
    """Return the images one by one; a dataset, and an array of four dimensions, hold several."""
    if isinstance(data, Tensor) or hasattr(data, "__array_interface__") or _is_picture(data):
        shape = getattr(data, "shape", ())
        return data if len(shape) == 4 else [data]
    if isinstance(data, Mapping) or not (isinstance(data, Iterable) or hasattr(data, "__getitem__")):
        raise CalibrationError(
            f"images must be a folder, a file, a list of images or a dataset, got {type(data).__name__}"
        )
    return data


def _is_picture(item: Any) -> bool:
    return hasattr(item, "convert") and hasattr(item, "getbands")  # of PIL, which need not be installed


def _read(path: Path) -> Tensor:
    try:
        from PIL import Image
    except ImportError as error:
        raise CalibrationError(
            "reading image files needs pillow (pip install 'hf-lowbit[images]'); arrays and tensors work without it"
        ) from error
    try:
        with Image.open(path) as picture:
            return _as_image(picture, path.name)
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise CalibrationError(f"cannot read {path.name!r} as an image: {error}") from error


def _as_image(item: Any, where: str) -> Tensor:
    """Return one image as (3, H, W), float32."""
    if isinstance(item, Mapping):
        if "image" not in item:
            raise CalibrationError(f"{where}: a row of a dataset must have an 'image', got {sorted(map(str, item))}")
        item = item["image"]
    if isinstance(item, (str, Path)):
        return _read(Path(item))
    if _is_picture(item):
        item = _pixels(item, where)
    try:
        values = torch.as_tensor(item)
    except (TypeError, ValueError, RuntimeError) as error:
        raise CalibrationError(f"{where}: is no image: {error}") from error
    if values.dim() == 2:
        values = values.unsqueeze(0).expand(3, -1, -1)
    elif values.dim() == 3 and values.shape[0] not in (1, 3) and values.shape[-1] in (1, 3):
        values = values.movedim(-1, 0)
    if values.dim() != 3 or values.shape[0] not in (1, 3) or not values.numel():
        raise CalibrationError(f"{where}: has shape {tuple(values.shape)}, expected (3, H, W) or (H, W, 3)")
    if not values.is_floating_point() and values.dtype != torch.uint8:
        raise CalibrationError(f"{where}: must be uint8, or floating from 0 to 1, got {values.dtype}")
    image = values.expand(3, -1, -1).float()
    if values.dtype == torch.uint8:
        image = image / 255
    if not bool(torch.isfinite(image).all()) or float(image.min()) < 0 or float(image.max()) > 1:
        raise CalibrationError(f"{where}: floating images must lie between 0 and 1")
    return image.contiguous()


def _pixels(picture: Any, where: str) -> Any:
    """Return a picture as an array: 8-bit RGB, or floating from 0 to 1 where it has 16 bits, which RGB would clip."""
    import numpy

    if picture.mode.startswith("I;16"):
        return numpy.array(picture, dtype=numpy.float32) / 65535
    if picture.mode in ("I", "F"):  # they have no range of their own
        raise CalibrationError(f"{where}: pictures of mode {picture.mode} are not taken; convert it to 8 or 16 bits")
    return numpy.array(picture.convert("RGB"))  # a copy: views of pictures cannot be written to


def shrink(images: Tensor, scale: int) -> Tensor:
    """Make images smaller as training sets of super-resolution do: bicubic with a = -0.5, antialiased, 8 bits.

    Args:
        images: (N, 3, H, W), floating, 0 to 1; rows and columns that ``scale`` does not divide are cut off.
        scale: how many times smaller.

    Returns:
        (N, 3, H / scale, W / scale), float32, multiples of 1/255.
    """
    height, width = (size // scale * scale for size in images.shape[-2:])
    images = images[..., :height, :width].float()
    if scale > 1:
        size = (height // scale, width // scale)
        images = interpolate(images, size=size, mode="bicubic", antialias=True, align_corners=False)
    return (images.clamp(0, 1) * 255).round() / 255


def enlarge(images: Tensor, scale: int) -> Tensor:
    """Enlarge images by bicubic interpolation with a = -0.5, the baseline of super-resolution; (N, 3, s·H, s·W)."""
    size = [scale * side for side in images.shape[-2:]]
    return interpolate(images.float(), size=size, mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)


def padded(images: Tensor, multiple: int) -> Tensor:
    """Mirror images at their right and lower edges until both sides are multiples of a number.

    Args:
        images: (N, C, H, W).
        multiple: usually the size of a window.

    Returns:
        (N, C, H', W'), the image in its upper left corner.
    """
    for dimension in (-2, -1):
        missing = -images.shape[dimension] % multiple
        while missing:  # an image smaller than a window is mirrored more than once
            part = min(missing, images.shape[dimension])
            size = images.shape[dimension]
            mirrored = images.narrow(dimension, size - part, part).flip(dimension)
            images = torch.cat([images, mirrored], dimension)
            missing -= part
    return images


def calibration_patches(config: Any, scale: int | None, multiple: int) -> tuple[Tensor, CalibrationRecord]:
    """Return the calibration patches of a config, and the record that is saved in place of the images.

    Every image gives as many patches as the others, or one less; each is cut at random, mirrored and turned at random.

    Args:
        config: an ``ImageConfig`` with data.
        scale: how many times larger the model makes images, None if it does not say.
        multiple: sides of what the model receives must be multiples of it, usually of a window.

    Returns:
        (samples, 3, H, W), float32, 0 to 1, as the model receives them, and a record with the hash of their pixels.

    Raises:
        CalibrationError: no images, or the model does not say by how much they must be shrunk.
    """
    if config.calibration is None or isinstance(config.calibration, CalibrationRecord):
        raise CalibrationError("this config names no calibration images; a stored config only records what was used")
    if config.degradation == "bicubic" and scale is None:
        raise CalibrationError(
            "the model's config has no 'upscale', so it is not known by how much images must be shrunk; pass images "
            "as the model receives them, with degradation='none'"
        )
    images = [image.unsqueeze(0) for image in load_images(config.calibration, config.samples, config.seed)]
    if config.degradation == "bicubic" and scale is not None:
        if small := [n for n, image in enumerate(images) if min(image.shape[-2:]) < scale]:
            raise CalibrationError(f"image {small[0]}: is smaller than the scale {scale} that it would be shrunk by")
        images = [shrink(image, scale) for image in images]
    size = config.patch_size
    if small := [n for n, image in enumerate(images) if min(image.shape[-2:]) < max(size, multiple)]:
        logger.warning(
            "%d of %d calibration images are smaller than a patch of %d pixels and are mirrored at their edges; "
            "lower patch_size or use larger images",
            len(small),
            len(images),
            max(size, multiple),
        )
    generator = torch.Generator().manual_seed(config.seed)
    order = torch.randperm(len(images), generator=generator).tolist()
    patches = []
    for number in range(config.samples):
        image = _at_least(images[order[number % len(images)]], size)
        top, left = (int(torch.randint(side - size + 1, (1,), generator=generator)) for side in image.shape[-2:])
        mirror, turns = torch.randint(1 << 30, (2,), generator=generator).tolist()
        patch = image[..., top : top + size, left : left + size]
        patches.append(torch.rot90(patch.flip(-1) if mirror % 2 else patch, turns % 4, (-2, -1)))
    batch = padded(torch.cat(patches), multiple).contiguous()
    digest = hashlib.sha256((batch * 255).round().to(torch.uint8).numpy().tobytes()).hexdigest()
    pixels = batch.shape[0] * batch.shape[2] * batch.shape[3]
    return batch, CalibrationRecord(kind=images_kind(config.calibration), sha256=digest, tokens=pixels)


def _at_least(image: Tensor, size: int) -> Tensor:
    """Mirror those sides of an image at its edges that are shorter than ``size``."""
    height, width = image.shape[-2:]
    if min(height, width) >= size:
        return image
    return padded(image, size)[..., : max(height, size), : max(width, size)]


def reconstructed(model: Any, images: Tensor, scale: int, multiple: int) -> Tensor:
    """Enlarge images with a model, whatever their size.

    Args:
        model: takes a batch, returns the enlarged one, or an output with ``reconstruction``.
        images: (N, 3, H, W), 0 to 1.
        scale: how many times larger.
        multiple: see :func:`padded`.

    Returns:
        (N, 3, scale · H, scale · W), float32, clipped to 0 to 1.
    """
    height, width = images.shape[-2:]
    with torch.inference_mode():
        output = model(padded(images, multiple))
    output = getattr(output, "reconstruction", output)
    return output[..., : scale * height, : scale * width].float().clamp(0, 1)


def scale_of(model: Any) -> int | None:
    """Return how many times larger a model makes images, as its config says; None if it does not."""
    scale = getattr(getattr(model, "config", None), "upscale", None)
    return scale if isinstance(scale, int) and scale >= 1 else None


def multiple_of(model: Any) -> int:
    """Return what sides of a model's inputs must be multiples of: its window, 1 if its config names none."""
    window = getattr(getattr(model, "config", None), "window_size", 1)
    return window if isinstance(window, int) and window >= 1 else 1
