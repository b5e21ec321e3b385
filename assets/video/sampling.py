"""Videos from the trained model, through the pipeline of diffusers, and how far apart two of them are."""

import math
from typing import Any

import torch
from torch import Tensor

from assets.video import data

# colour, shape, direction; each colour and each direction at least once
PROMPTS = (
    ("red", "square", "right"),
    ("green", "disc", "down"),
    ("blue", "plus", "left"),
    ("yellow", "disc", "up"),
    ("red", "plus", "down"),
    ("green", "square", "left"),
)
_NOISE_SEED = 100


def noise(count: int = len(PROMPTS), seed: int = _NOISE_SEED) -> Tensor:
    """Return the noise that videos start from, (count, 3, 8, 16, 16)."""
    shape = (count, data.CHANNELS, data.FRAMES, data.SIZE, data.SIZE)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def pipeline(transformer: Any, shift: float = 1.0) -> Any:
    """Return a ``WanPipeline`` around the transformer, without text encoder and decoder: it works on pixels.

    Args:
        transformer: trained here, dense or quantized.
        shift: of the sampler's steps towards noise; 1 spreads them evenly, video models are run with 3 to 7.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline

    found = WanPipeline(
        tokenizer=None, text_encoder=None, vae=None, transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=shift),
    )  # fmt: skip
    found.set_progress_bar_config(disable=True)
    return found


@torch.no_grad()
def sample(
    transformer: Any,
    prompts: tuple[tuple[str, str, str], ...] = PROMPTS,
    steps: int = 16,
    seed: int = _NOISE_SEED,
    guidance: float = 1.0,
) -> Tensor:
    """Return one video for each prompt.

    Args:
        transformer: trained here, dense or quantized; or a pipeline around one, as :func:`pipeline` makes it.
        prompts: colour, shape and direction of each.
        steps: of the sampler.
        seed: of the noise.
        guidance: scale of classifier-free guidance; above 1 the transformer runs twice a step.

    Returns:
        (prompts, 3, 8, 16, 16) in float32, about [-1, 1].

    Raises:
        ValueError: no prompt, or one that is not a colour, a shape and a direction.
    """
    words = data.indices(prompts)
    made = pipeline(transformer) if isinstance(transformer, torch.nn.Module) else transformer
    dtype = made.transformer.dtype
    # sizes are those of a decoder that enlarges eight times, and frames four times
    frames = made(
        prompt_embeds=data.embed(words).to(dtype),
        negative_prompt_embeds=data.embed(torch.full_like(words, -1)).to(dtype),
        latents=noise(len(prompts), seed),
        height=8 * data.SIZE, width=8 * data.SIZE, num_frames=4 * (data.FRAMES - 1) + 1,
        num_inference_steps=steps, guidance_scale=guidance, output_type="latent",
    ).frames  # fmt: skip
    return frames.float()


def psnr(found: Tensor, expected: Tensor) -> float:
    """Return the peak signal-to-noise ratio in decibels over all of both, for values in [-1, 1].

    Raises:
        ValueError: shapes differ.
    """
    if found.shape != expected.shape:
        raise ValueError(f"videos have shapes {tuple(found.shape)} and {tuple(expected.shape)}")
    error = float((found.double() - expected.double()).square().mean())
    return 10 * math.log10(4 / error) if error else math.inf
