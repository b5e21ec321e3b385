"""Whole tiny video pipelines of diffusers, built from configs: text encoders, transformer, decoder; nothing fetched.

Each family comes as a function that returns the pipeline and a function that makes a clip with it.
"""

import diffusers
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    LlamaConfig,
    LlamaModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
    UMT5Config,
    UMT5EncoderModel,
)

WORDS = ["<pad>", "</s>", "<unk>", "a", "cat", "runs"]
STEPS = 3
_T5 = {"d_model": 32, "d_ff": 48, "d_kv": 8, "num_layers": 1, "num_heads": 4, "vocab_size": 32}


def words():
    found = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    found.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=found, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def wan():
    transformer = diffusers.WanTransformer3DModel(
        num_attention_heads=4, attention_head_dim=16, in_channels=16, out_channels=16, text_dim=32, freq_dim=32,
        ffn_dim=96, num_layers=2, rope_max_seq_len=32,
    )  # fmt: skip
    vae = diffusers.AutoencoderKLWan(
        base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    )
    encoder = UMT5EncoderModel(UMT5Config(**_T5))
    return diffusers.WanPipeline(words(), encoder, vae, FlowMatchEulerDiscreteScheduler(), transformer)


def cogvideox():
    transformer = diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=4, attention_head_dim=16, in_channels=4, out_channels=4, time_embed_dim=16,
        text_embed_dim=32, num_layers=2, sample_width=4, sample_height=4, sample_frames=5, max_text_seq_length=8,
    )  # fmt: skip
    vae = diffusers.AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 4, up_block_types=("CogVideoXUpBlock3D",) * 4,
        block_out_channels=(8,) * 4, latent_channels=4, layers_per_block=1, norm_num_groups=2,
        temporal_compression_ratio=4,
    )  # fmt: skip
    encoder = T5EncoderModel(T5Config(**_T5))
    return diffusers.CogVideoXPipeline(words(), encoder, vae, transformer, diffusers.CogVideoXDDIMScheduler())


def ltx():
    transformer = diffusers.LTXVideoTransformer3DModel(
        in_channels=8, out_channels=8, num_attention_heads=4, attention_head_dim=16, cross_attention_dim=64,
        num_layers=2, caption_channels=32,
    )  # fmt: skip
    blocks, switches = (8, 8, 8, 8), (True, True, False, False)
    vae = diffusers.AutoencoderKLLTXVideo(
        latent_channels=8, block_out_channels=blocks, decoder_block_out_channels=blocks, layers_per_block=(1,) * 5,
        decoder_layers_per_block=(1,) * 5, spatio_temporal_scaling=switches, decoder_spatio_temporal_scaling=switches,
        decoder_inject_noise=(False,) * 5, upsample_residual=(False,) * 4, upsample_factor=(1,) * 4, patch_size=1,
    )  # fmt: skip
    encoder = T5EncoderModel(T5Config(**_T5))
    return diffusers.LTXPipeline(FlowMatchEulerDiscreteScheduler(), vae, encoder, words(), transformer)


def hunyuan():
    transformer = diffusers.HunyuanVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=4, attention_head_dim=16, num_layers=1,
        num_single_layers=1, num_refiner_layers=1, text_embed_dim=32, pooled_projection_dim=32,
        rope_axes_dim=(4, 6, 6), guidance_embeds=True,
    )  # fmt: skip
    vae = diffusers.AutoencoderKLHunyuanVideo(
        latent_channels=4, block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4,
        mid_block_add_attention=True,
    )  # fmt: skip
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
    encoder = LlamaModel(LlamaConfig(**sizes, vocab_size=32, num_key_value_heads=4))
    clip = CLIPTextModel(
        CLIPTextConfig(**{**sizes, "num_hidden_layers": 1}, vocab_size=32, projection_dim=32, eos_token_id=1)
    )
    return diffusers.HunyuanVideoPipeline(
        encoder, words(), transformer, vae, FlowMatchEulerDiscreteScheduler(), clip, words()
    )


FAMILIES = {"wan": wan, "cogvideox": cogvideox, "ltx": ltx, "hunyuan": hunyuan}
_CALLS = {
    "wan": {"num_frames": 5, "max_sequence_length": 8, "guidance_scale": 3.0},
    "cogvideox": {"num_frames": 5, "max_sequence_length": 8, "guidance_scale": 3.0},
    "ltx": {"num_frames": 9, "max_sequence_length": 8, "guidance_scale": 3.0},
    "hunyuan": {
        "num_frames": 5, "max_sequence_length": 8, "prompt_template": {"template": "{}", "crop_start": 0},
    },
}  # fmt: skip


def build(family):
    """Return a pipeline with random weights, in evaluation."""
    torch.manual_seed(0)
    pipeline = FAMILIES[family]()
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval().requires_grad_(False)
    return pipeline


def clip(pipeline, family, **changes):
    """Return a decoded clip of a few steps, from fixed noise."""
    pipeline.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": STEPS, "output_type": "pt", **_CALLS[family], **changes}
    generator = torch.Generator().manual_seed(1)
    return pipeline(prompt="a cat runs", height=32, width=32, generator=generator, **options).frames
