"""Make videos with a dense and with quantized pipelines from the same noise, and put them side by side.

``python examples/video_w4a4.py`` trains a small video transformer on first use (ten minutes of one core, kept in the
cache folder), gives it the outlier channels that large ones have, and loads its pipeline dense and in four bits by
plain rounding and by DVD-Quant. ``--tiny`` does the same with a model trained for seconds, which paints little more
than colours. Written are ``videos.png``, rows of frames, and ``videos.gif``, where all versions move side by side.

The one line that quantizes is the one for any video pipeline of diffusers::

    pipe = WanPipeline.from_pretrained(repo, quantization_config=PipelineQuantizationConfig(
        quant_mapping={"transformer": DVDQuantConfig()}))
"""

import logging
import math
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from diffusers import PipelineQuantizationConfig, WanPipeline
from diffusers.utils import logging as diffusers_logging
from PIL import Image
from torch import Tensor

if not __package__:  # started as a file: what it shares with tests and benchmarks lies one folder up
    sys.path.insert(0, str(Path(__file__).parent.parent))

from assets import video
from examples.common import console, figures, parsed, parser_of
from hf_lowbit import DVDQuantConfig, LowBitConfig, RunOptions, delta_gbs_report, packed_modules
from hf_lowbit.report.tables import size_text

QUIET = RunOptions(progress=False)
ROUNDING = {"rotation": "none", "balance": "none", "weight_init": "absmax", "group_size": -1, "act_scale": "token"}
VERSIONS: dict[str, LowBitConfig | None] = {
    "dense": None,
    "rounding, W4A4": DVDQuantConfig(preset="w4a4", run=QUIET, **ROUNDING),
    "DVD-Quant, W4A4": DVDQuantConfig(preset="w4a4", run=QUIET),
    "DVD-Quant, δ-GBS": DVDQuantConfig(run=QUIET),
}
_ZOOM, _GAP = 6, 4


def load(folder: Path, config: LowBitConfig | None) -> Any:
    """Load a pipeline, as anybody would; this one has no text encoder and no decoder."""
    quantization = None if config is None else PipelineQuantizationConfig(quant_mapping={"transformer": config})
    pipe = WanPipeline.from_pretrained(
        folder, text_encoder=None, tokenizer=None, vae=None, quantization_config=quantization
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def pixels(clips: Tensor) -> Tensor:
    """Return clips as (clips, frames, rows, columns, 3) bytes, enlarged."""
    found = ((clips.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 4, 1)
    return found.repeat_interleave(_ZOOM, 2).repeat_interleave(_ZOOM, 3)


def grid(cells: list[list[Tensor]]) -> Image.Image:
    """Return one picture of rows of pictures, each (rows, columns, 3) bytes, with a gap between them."""
    rows, columns, _ = cells[0][0].shape
    height, width = len(cells) * (rows + _GAP) + _GAP, len(cells[0]) * (columns + _GAP) + _GAP
    canvas = torch.full((height, width, 3), 255, dtype=torch.uint8)
    for down, line in enumerate(cells):
        for right, cell in enumerate(line):
            top, left = _GAP + down * (rows + _GAP), _GAP + right * (columns + _GAP)
            canvas[top : top + rows, left : left + columns] = cell
    return Image.fromarray(canvas.numpy())


def write(videos: dict[str, Tensor], out: Path) -> None:
    """Write the contact sheet, rows of frames, and the animation, a column for each version."""
    found = [pixels(clips) for clips in videos.values()]
    prompts, frames = range(len(found[0])), range(found[0].shape[1])
    grid([[clips[prompt, frame] for frame in frames] for prompt in prompts for clips in found]).save(
        out / "videos.png"
    )
    moving = [grid([[clips[prompt, frame] for clips in found] for prompt in prompts]) for frame in frames]
    moving[0].save(out / "videos.gif", save_all=True, append_images=moving[1:], duration=150, loop=0)


def main() -> None:
    """Run the example."""
    quick = ("--tiny", "a model of seconds, few steps: does it work at all?")
    args = parsed(parser_of(__doc__, "outputs/video_w4a4", quick))
    logging.basicConfig(level=logging.ERROR)
    logging.getLogger("assets").setLevel(logging.INFO)
    diffusers_logging.disable_progress_bar()
    diffusers_logging.set_verbosity_error()
    warnings.filterwarnings("ignore", message="Mismatch dtype")
    torch.set_num_threads(1)  # tensors are small here: more threads only wait for each other

    video.pipeline(video.load("quick" if args.tiny else "full", outliers=True)).save_pretrained(args.out / "dense")
    prompts, steps = video.PROMPTS[: 3 if args.tiny else None], 8 if args.tiny else 16
    console.print("Prompts: " + "; ".join(" ".join(prompt) for prompt in prompts))

    columns = ("transformer", "PSNR to dense", "bits per weight", "file", "mean activation bits")
    table = figures(f"{len(prompts)} videos of {steps} steps, from the same noise", *columns)
    videos: dict[str, Tensor] = {}
    for name, config in VERSIONS.items():
        pipe = load(args.out / "dense", config)
        folder = args.out / name.lower().replace(", ", "-").replace(" ", "-").replace("δ", "delta")
        pipe.save_pretrained(folder)
        videos[name] = video.sample(pipe, prompts, steps)
        if not torch.equal(video.sample(load(folder, None), prompts, steps), videos[name]):
            raise RuntimeError(f"{name}: the saved pipeline makes other videos than the one in memory")
        layers = packed_modules(pipe.transformer).values()
        weights = sum(layer.in_features * layer.out_features for layer in layers)
        bits = 8 * sum(layer.packed.nbytes for layer in layers) / weights if weights else 32
        size = (folder / "transformer" / "diffusion_pytorch_model.safetensors").stat().st_size
        apart = video.psnr(videos[name], videos["dense"])
        table.add_row(
            name,
            "" if math.isinf(apart) else f"{apart:.1f} dB",
            f"{bits:.2f}",
            size_text(size),
            mean_bits(pipe.transformer),
        )
    write(videos, args.out)
    console.print(table)
    console.print("Two dense videos of the same prompts from other noise are ", end="")
    other = video.sample(load(args.out / "dense", None), prompts, steps, seed=1)
    console.print(f"{video.psnr(other, videos['dense']):.1f} dB apart.")
    console.print(f"Frames: {args.out / 'videos.png'}, moving: {args.out / 'videos.gif'}")
    console.print(f"From left to right (and from top to bottom for each prompt): {'; '.join(videos)}.")


def mean_bits(transformer: Any) -> str:
    """Return in how many bits activations were rounded in the mean over the steps."""
    layers = packed_modules(transformer).values()
    if not layers:
        return "–"
    if hasattr(transformer, "delta_gbs"):
        return f"{delta_gbs_report(transformer).mean_bits:.2f}"
    return f"{next(iter(layers)).spec.act_bits:.2f}"


if __name__ == "__main__":
    main()
