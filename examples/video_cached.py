"""Make small videos four ways: as they are, with QuantCache, with DVD-Quant, and with both; see what each costs.

``python -m examples.video_cached`` trains a small video transformer on first use (some minutes), samples six videos
and prints their distance from those of the plain transformer. ``--tiny`` takes a smaller model and two videos: it
takes seconds, and its figures only show that everything works. On a real pipeline it is the same two calls::

    hf_lowbit.quantize(pipe.transformer, DVDQuantConfig())
    pipe.transformer.enable_cache(QuantCacheConfig(num_inference_steps=50))
"""

import logging
import time
from typing import Any

import torch

import hf_lowbit
from assets import video
from examples.common import console, figures, parsed, parser_of
from hf_lowbit import DVDQuantConfig, QuantCacheConfig


def main() -> None:
    """Make the videos and show what each took."""
    parser = parser_of(__doc__, "outputs/video_cached", ("--tiny", "a smaller model, fewer videos"))
    parser.add_argument("--steps", type=int, default=24, help="of the sampler")
    arguments = parsed(parser)
    if arguments.steps < 1:
        parser.error(f"--steps must be at least 1, got {arguments.steps}")
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    steps = arguments.steps
    model = video.load("quick" if arguments.tiny else "full")
    prompts = video.PROMPTS[:2] if arguments.tiny else video.PROMPTS

    def made(transformer: Any) -> tuple[torch.Tensor, float]:
        start = time.perf_counter()
        found = video.sample(transformer, prompts, steps)
        return found, time.perf_counter() - start

    columns = ("transformer", "steps computed", "fewer block calls", "bits", "seconds", "PSNR")
    table = figures(f"{len(prompts)} videos, {steps} steps", *columns)
    expected, seconds = made(model)
    table.add_row("plain", str(steps), "1.00 ×", "–", f"{seconds:.1f}", "–")
    for name in ("QuantCache", "DVD-Quant", "both"):
        if name == "DVD-Quant":
            hf_lowbit.quantize(model, DVDQuantConfig())
        if name != "DVD-Quant":
            model.enable_cache(QuantCacheConfig())
        found, seconds = made(model)
        computed, fewer, bits = str(steps), "1.00 ×", "–"
        if name != "DVD-Quant":
            report = model.cache_report()
            model.disable_cache()
            computed, fewer = str(report.computed), f"{report.speed_up:.2f} ×"
            bits = f"{report.bits:.1f}" if name == "both" else "–"
        else:
            bits = f"{hf_lowbit.delta_gbs_report(model).mean_bits:.1f}"
        table.add_row(name, computed, fewer, bits, f"{seconds:.1f}", f"{video.psnr(found, expected):.1f} dB")
    console.print(table)
    console.print(report.table())
    console.print(f"what was decided at each step: {report.save_plot(arguments.out / 'timeline.png')}")
    console.print("fewer block calls save time in proportion only where blocks take most of it, as in real models")


if __name__ == "__main__":
    main()
