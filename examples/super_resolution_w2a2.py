"""Double the size of photographs with a dense model and with its 4, 3 and 2-bit versions, and put them side by side.

``python examples/super_resolution_w2a2.py`` trains a small Swin2SR on first use (half an hour of one core, kept in
the cache folder) and quantizes weights and activations by CondiQuant. ``--tiny`` does the same with a model trained
for seconds, which is worse than bicubic interpolation. Written is ``strip.png``: for each photograph bicubic, dense,
W4A4, W3A3, W2A2 and the truth.

The one line that quantizes is the one for any super-resolution model of transformers::

    Swin2SRForImageSuperResolution.from_pretrained(
        path, quantization_config=CondiQuantConfig(weight_bits=2, act_bits=2, calibration="photos/"))
"""

import logging
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import AutoModelForImageToImage, Swin2SRForImageSuperResolution

if not __package__:  # started as a file: what it shares with tests and benchmarks lies one folder up
    sys.path.insert(0, str(Path(__file__).parent.parent))

from assets import super_resolution
from examples.common import console, figures, parsed, parser_of
from hf_lowbit import CondiQuantConfig, RunOptions
from hf_lowbit.calibration.images import enlarge, multiple_of, reconstructed, shrink
from hf_lowbit.report.inspect import inspect
from hf_lowbit.report.super_resolution import score
from hf_lowbit.report.tables import size_text

BITS = (4, 3, 2)
GAP = 4
QUICK = {"samples": 2, "cond_strength": 0.01, "cond_steps": 5, "dobi_candidates": 20}


def dense_model(tiny: bool, folder: Path) -> Path:
    """Return the folder of a dense model."""
    if not tiny:
        return super_resolution.swin2sr()
    logging.getLogger("assets").setLevel(logging.WARNING)
    super_resolution.train(super_resolution.photos("train"), steps=10).save_pretrained(folder / "dense")
    return folder / "dense"


def strip(columns: list[list[Tensor]]) -> Image.Image:
    """Return one picture: a row for each photograph, a column for each version."""
    side = super_resolution.SQUARE
    rows, width = len(columns[0]), len(columns) * (side + GAP) + GAP
    sheet = torch.ones(3, rows * (side + GAP) + GAP, width)
    for i, column in enumerate(columns):
        for j, image in enumerate(column):
            top, left = GAP + j * (side + GAP), GAP + i * (side + GAP)
            sheet[:, top : top + side, left : left + side] = image
    return Image.fromarray((sheet * 255).round().to(torch.uint8).permute(1, 2, 0).numpy())


def main() -> None:
    """Run everything and write the strip."""
    given = parsed(parser_of(__doc__, "outputs/super_resolution_w2a2", ("--tiny", "a model trained for seconds")))
    warnings.filterwarnings("ignore")
    truth = super_resolution.held_out(2 if given.tiny else 5)
    scale = super_resolution.SCALE
    low = [shrink(image.unsqueeze(0), scale) for image in truth]

    table = figures(None, "version", "PSNR of the luma", "SSIM", "on disk", "bits per packed weight")
    columns = [[enlarge(image, scale)[0] for image in low]]

    def add(name: str, model: Any, size: str = "–", bits: str = "–") -> None:
        found = score(model, truth, scale)
        table.add_row(name, f"{found['psnr']:.2f} dB", f"{found['ssim']:.4f}", size, bits)
        if model is not None:
            columns.append([reconstructed(model, image, scale, multiple_of(model))[0] for image in low])

    add("bicubic", None)
    with tempfile.TemporaryDirectory() as folder:
        path = dense_model(given.tiny, Path(folder))
        size = sum(file.stat().st_size for file in path.iterdir())
        add("dense", AutoModelForImageToImage.from_pretrained(path).eval(), size_text(size))
        for bits in BITS:
            config = CondiQuantConfig(
                weight_bits=bits, act_bits=bits, calibration=super_resolution.photos("train"), patch_size=32,
                run=RunOptions(progress=False), **(QUICK if given.tiny else {}),
            )  # fmt: skip
            packed = Swin2SRForImageSuperResolution.from_pretrained(path, quantization_config=config)
            place = given.out / f"w{bits}a{bits}"
            packed.save_pretrained(place)
            inspection = inspect(place)
            loaded = AutoModelForImageToImage.from_pretrained(place).eval()
            add(f"W{bits}A{bits}", loaded, size_text(inspection.total_bytes), f"{inspection.bits_per_weight:.2f}")
    columns.append(truth)
    strip(columns).save(given.out / "strip.png")
    console.print(table)
    console.print(f"bicubic, dense, W4A4, W3A3, W2A2, truth: {given.out / 'strip.png'}")


if __name__ == "__main__":
    main()
