"""Tiny models of real architectures, built from a config with random weights; for structure, never for quality."""

from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

VOCABULARY = 128
_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_GATED = {**_COMMON, "intermediate_size": 96, "num_key_value_heads": 2}

# architecture -> (config class, causal model class, arguments)
ARCHITECTURES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", _GATED),
    "llama-tied": ("LlamaConfig", "LlamaForCausalLM", {**_GATED, "tie_word_embeddings": True}),
    "llama-bias": ("LlamaConfig", "LlamaForCausalLM", {**_GATED, "attention_bias": True, "mlp_bias": True}),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", _GATED),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {**_GATED, "head_dim": 16}),
    "mistral": ("MistralConfig", "MistralForCausalLM", {**_GATED, "sliding_window": 8}),
    "gemma3": (
        "Gemma3TextConfig",
        "Gemma3ForCausalLM",
        {
            **_GATED,
            "head_dim": 16,
            "sliding_window": 8,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "phi": ("PhiConfig", "PhiForCausalLM", {**_COMMON, "intermediate_size": 96}),
    "gpt_neox": ("GPTNeoXConfig", "GPTNeoXForCausalLM", {**_COMMON, "intermediate_size": 96}),
    "opt": (
        "OPTConfig",
        "OPTForCausalLM",
        {**_COMMON, "ffn_dim": 96, "word_embed_proj_dim": 64, "dropout": 0.0},
    ),
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", {**_COMMON, "n_inner": 96, "tie_word_embeddings": False}),
    # experts that transformers fuses when it loads them; gpt-oss stores them fused, and transposed
    "mixtral": (
        "MixtralConfig",
        "MixtralForCausalLM",
        {**_GATED, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        "Qwen3MoeForCausalLM",
        {**_GATED, "head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    ),
    "gpt_oss": (
        "GptOssConfig",
        "GptOssForCausalLM",
        {**_GATED, "head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8},
    ),
}

_VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}


def tiny_llava() -> PreTrainedModel:
    """Return a tiny model with a vision tower beside its text model."""
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**_VISION),
        text_config=transformers.LlamaConfig(**_GATED),
        image_token_index=VOCABULARY - 1,
        vision_feature_layer=-1,
    )
    torch.manual_seed(0)
    return transformers.LlavaForConditionalGeneration(config).eval()


_ENCODER_DECODER = {
    "d_model": 64,
    "d_ff": 96,
    "d_kv": 16,
    "num_layers": 2,
    "num_heads": 4,
    "vocab_size": VOCABULARY,
    "decoder_start_token_id": 0,
}


def tiny_t5(**changes: Any) -> PreTrainedModel:
    """Return a tiny encoder-decoder."""
    config = transformers.T5Config(**{**_ENCODER_DECODER, **changes})
    torch.manual_seed(0)
    return transformers.T5ForConditionalGeneration(config).eval()


def tiny_umt5(**changes: Any) -> PreTrainedModel:
    """Return a tiny encoder-decoder with position biases in every block, as video pipelines use for their prompts."""
    config = transformers.UMT5Config(**{**_ENCODER_DECODER, "tie_word_embeddings": False, **changes})
    torch.manual_seed(0)
    return transformers.UMT5ForConditionalGeneration(config).eval()


WITH_EXPERTS = ("mixtral", "qwen3_moe", "gpt_oss")


def tiny_model(architecture: str = "llama", dtype: torch.dtype = torch.float32, **changes: Any) -> PreTrainedModel:
    """Return a tiny model in evaluation mode; the same weights every time."""
    config_class, model_class, arguments = ARCHITECTURES[architecture]
    config = getattr(transformers, config_class)(**{**arguments, **changes})
    torch.manual_seed(0)
    return getattr(transformers, model_class)(config).to(dtype).eval()


def closed_router(architecture: str = "mixtral") -> PreTrainedModel:
    """Return a model with experts, the first of which no token reaches."""
    model = tiny_model(architecture, num_experts_per_tok=1)
    with torch.no_grad():
        for block in model.model.layers:
            router = block.mlp.gate.weight
            router[0], router[2] = 0, -router[1]  # of the experts 1 and 2, one has a logit above 0
    return model


def tokens(samples: int = 4, length: int = 24) -> torch.Tensor:
    """Return (samples, length) token ids, the same every time."""
    generator = torch.Generator().manual_seed(7)
    return torch.randint(3, VOCABULARY, (samples, length), generator=generator)


def save_words(folder: Path) -> None:
    """Save a tokenizer of the words w0 to w126 and an end, one id each, beside a tiny model."""
    words = {f"w{number}": number for number in range(VOCABULARY - 1)} | {"<end>": VOCABULARY - 1}
    inner = Tokenizer(models.WordLevel(words, unk_token="<end>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<end>").save_pretrained(folder)
