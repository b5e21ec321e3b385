"""Tiny pipelines of diffusers' video models with random weights, that go from prompt embeddings to latents.

There is no text encoder and no decoder: those are not what is tested, and take most of the time.
"""

from collections.abc import Callable

import diffusers
import torch

STEPS = 6
_CALL = {"num_inference_steps": STEPS, "output_type": "latent"}


def _finished(pipeline, transformer):
    pipeline.set_progress_bar_config(disable=True)
    for parameter in transformer.parameters():  # zero-initialized output layers would hide everything
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.05)
    transformer.eval().requires_grad_(False)
    return pipeline


def _text(width, batch=1, length=4):
    return torch.randn(batch, length, width, generator=torch.Generator().manual_seed(5))


def _guided(**changes):
    """Return the arguments of a call with classifier-free guidance."""
    call = {"prompt_embeds": _text(16), "negative_prompt_embeds": -_text(16), "height": 64, "width": 64}
    return {**call, "num_frames": 5, "guidance_scale": 2.0, **changes}


def _without_text(kind, model, scheduler):
    return kind(tokenizer=None, text_encoder=None, vae=None, transformer=model, scheduler=scheduler)


def wan(layers=3):
    torch.manual_seed(0)
    model = diffusers.WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, text_dim=16, freq_dim=16, ffn_dim=32, in_channels=4,
        out_channels=4, num_layers=layers, rope_max_seq_len=32,
    )  # fmt: skip
    pipeline = _without_text(diffusers.WanPipeline, model, diffusers.FlowMatchEulerDiscreteScheduler())
    return _finished(pipeline, model), _guided()


def cogvideox(layers=3):
    torch.manual_seed(0)
    model = diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=4, time_embed_dim=8,
        text_embed_dim=16, num_layers=layers, sample_width=8, sample_height=8, sample_frames=5, patch_size=2,
        max_text_seq_length=4,
    )  # fmt: skip
    pipeline = _without_text(diffusers.CogVideoXPipeline, model, diffusers.CogVideoXDDIMScheduler())
    return _finished(pipeline, model), _guided()


def ltx(layers=3):
    torch.manual_seed(0)
    model = diffusers.LTXVideoTransformer3DModel(
        in_channels=8, out_channels=8, num_attention_heads=2, attention_head_dim=8, cross_attention_dim=16,
        num_layers=layers, caption_channels=16,
    )  # fmt: skip
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    pipeline = diffusers.LTXPipeline(scheduler, None, None, None, model)
    mask = torch.ones(1, 4)
    call = _guided(prompt_attention_mask=mask, negative_prompt_attention_mask=mask, num_frames=17)
    return _finished(pipeline, model), call


def hunyuan(layers=2):
    torch.manual_seed(0)
    model = diffusers.HunyuanVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=12, num_layers=layers,
        num_single_layers=layers, num_refiner_layers=1, patch_size=1, patch_size_t=1, guidance_embeds=True,
        text_embed_dim=16, pooled_projection_dim=8, rope_axes_dim=(4, 4, 4),
    )  # fmt: skip
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0)
    pipeline = diffusers.HunyuanVideoPipeline(None, None, model, None, scheduler, None, None)
    call = {
        "prompt_embeds": _text(16), "pooled_prompt_embeds": _text(8)[:, 0], "prompt_attention_mask": torch.ones(1, 4),
        "height": 32, "width": 32, "num_frames": 5,
    }  # fmt: skip
    return _finished(pipeline, model), call


def latte(layers=2):
    """Its blocks have two shapes, and its pipeline enters no cache context."""
    torch.manual_seed(0)
    model = diffusers.LatteTransformer3DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=layers, sample_size=8,
        patch_size=2, caption_channels=16, cross_attention_dim=16, attention_bias=True,
        activation_fn="gelu-approximate", norm_type="ada_norm_single", norm_elementwise_affine=False, video_length=4,
    )  # fmt: skip
    pipeline = diffusers.LattePipeline(None, None, None, model, diffusers.DDIMScheduler())
    call = {
        "prompt": None, "prompt_embeds": _text(16), "negative_prompt_embeds": -_text(16), "negative_prompt": None,
        "height": 64, "width": 64, "video_length": 4, "guidance_scale": 2.0, "enable_temporal_attentions": True,
        "mask_feature": False,
    }  # fmt: skip
    return _finished(pipeline, model), call


ARCHITECTURES: dict[str, Callable] = {"wan": wan, "cogvideox": cogvideox, "ltx": ltx, "hunyuan": hunyuan}


def latents(pipeline, call, **changes):
    """Return the latents of a video, float32."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        return pipeline(**{**_CALL, **call, "generator": generator, **changes}).frames.float()
