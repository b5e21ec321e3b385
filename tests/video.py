"""Tiny image and video models and a pipeline of diffusers, built from configs with random weights."""

import diffusers
import torch
from diffusers import LTXVideoTransformer3DModel as Video
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

import hf_lowbit
from hf_lowbit import RunOptions
from hf_lowbit.compress.checksums import metadata_of
from tests.hf.test_transformers import quick

FILE = "diffusion_pytorch_model.safetensors"
FIRST = "transformer_blocks.0.attn1.to_q"
SIZES = {
    "in_channels": 8, "out_channels": 8, "num_attention_heads": 4, "attention_head_dim": 8, "cross_attention_dim": 32,
    "num_layers": 1, "caption_channels": 32,
}  # fmt: skip
WORDS = ["<pad>", "</s>", "<unk>", "a", "cat", "runs"]


def free(**changes):
    """Config of a run without data."""
    return quick(**{"calibration": None, "scale_dtype": "float32", "run": RunOptions(progress=False), **changes})


def tiny_video(**changes):
    torch.manual_seed(0)
    return Video(**{**SIZES, **changes}).eval()


def tiny_wan():
    """Another video model, with parts that are kept in float32 and a place for automatic device maps."""
    torch.manual_seed(0)
    sizes = {"num_attention_heads": 2, "attention_head_dim": 12, "text_dim": 32, "freq_dim": 32, "ffn_dim": 32}
    return diffusers.WanTransformer3DModel(in_channels=4, out_channels=4, num_layers=1, **sizes).eval()


def wan_outputs(model):
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        return model(
            hidden_states=torch.randn(1, 4, 1, 4, 4, generator=generator),
            encoder_hidden_states=torch.randn(1, 3, 32, generator=generator),
            timestep=torch.tensor([500]), return_dict=False,
        )[0]  # fmt: skip


def tiny_pipeline(dtype=torch.float32):
    """An LTX pipeline whose parts are built from configs."""
    transformer = tiny_video().to(dtype)
    encoder = T5EncoderModel(T5Config(d_model=32, d_ff=48, d_kv=8, num_layers=1, num_heads=4, vocab_size=32)).to(dtype)
    blocks, switches = (8, 8, 8, 8), (True, True, False, False)
    vae = diffusers.AutoencoderKLLTXVideo(
        latent_channels=8, block_out_channels=blocks, decoder_block_out_channels=blocks, layers_per_block=(1,) * 5,
        decoder_layers_per_block=(1,) * 5, spatio_temporal_scaling=switches, decoder_spatio_temporal_scaling=switches,
        decoder_inject_noise=(False,) * 5, upsample_residual=(False,) * 4, upsample_factor=(1,) * 4, patch_size=1,
    )  # fmt: skip
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    return diffusers.LTXPipeline(scheduler, vae, encoder, tokenizer, transformer)


def save_pipelines(folder):
    """Save a tiny pipeline, dense and with two packed parts."""
    pipeline = tiny_pipeline()
    pipeline.save_pretrained(folder / "dense")
    for part in (pipeline.transformer, pipeline.text_encoder):
        hf_lowbit.quantize(part, free())
    pipeline.save_pretrained(folder / "packed")


def outputs(model):
    """Run a video model once; gradients are left to the caller."""
    generator = torch.Generator().manual_seed(3)
    return model(
        hidden_states=torch.randn(2, 12, SIZES["in_channels"], generator=generator).to(model.dtype),
        encoder_hidden_states=torch.randn(2, 5, 32, generator=generator).to(model.dtype),
        timestep=torch.tensor([300, 700]),
        encoder_attention_mask=torch.ones(2, 5),
        num_frames=3, height=2, width=2, return_dict=False,
    )[0]  # fmt: skip


def latents(pipeline):
    """Make a video of two steps, up to the latents."""
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(
        prompt="a cat runs", height=32, width=32, num_frames=9, num_inference_steps=2, max_sequence_length=8,
        output_type="latent", generator=torch.Generator().manual_seed(1),
    ).frames  # fmt: skip


def stored_tensors(model):
    return {name: tensor for name, tensor in model.state_dict().items() if ".weight_" in name}


def assert_same(found, expected):
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert tensor.dtype == found[name].dtype, name
        assert torch.equal(tensor, found[name]), name


def rewrite(folder, change):
    tensors = load_file(folder / FILE)
    change(tensors)
    save_file(tensors, folder / FILE, metadata={"format": "pt", **metadata_of(tensors)})
