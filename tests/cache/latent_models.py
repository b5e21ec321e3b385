"""Models whose keys and values are held as latents, exactly or truncated, for the tests of this folder."""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Phi3Config, Phi3ForCausalLM

from hf_lowbit.cache import attach_latent_attention, attention_modules
from hf_lowbit.formats.latent import LatentFormat
from hf_lowbit.fused_qkv import split_fused_qkv
from hf_lowbit.layers import PackedLinear
from hf_lowbit.numerics.rotation import spreading
from tests.tiny import VOCABULARY, tiny_model

_YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
}
# every family that is promised, and what is special about it
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama-bias": {},
    "llama-yarn": {"rope_parameters": _YARN},
    "qwen2": {},  # biases of queries, keys and values
    "qwen3": {},  # norms of queries and keys
    "mistral": {},  # a window of 8 tokens
    "gemma3": {},  # windows in some layers, two kinds of rotation, norms
    "phi3": {},  # one fused projection, a window
    "phi3-partial": {"partial_rotary_factor": 0.5},
    "opt": {},  # no rotation
}


def dense_model(family: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """Return a tiny dense model of a family; the same weights every time."""
    if family.startswith("phi3"):
        arguments = {
            "vocab_size": VOCABULARY,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 128,
            "original_max_position_embeddings": 128,
            "sliding_window": 8,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
        }
        if "partial_rotary_factor" in FAMILIES[family]:
            arguments["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
        torch.manual_seed(0)
        model = Phi3ForCausalLM(Phi3Config(**{**arguments, **changes})).to(dtype).eval()
    else:
        model = tiny_model(family.removesuffix("-yarn"), dtype, **{**FAMILIES[family], **changes})
    lively(model)
    return model


def lively(model: nn.Module) -> None:
    """Give a random model distinct logits and attention that is not uniform, so that a mistake changes tokens."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
            if "norm" in name:
                parameter += 0.3 * noise
            elif parameter.dim() == 2:
                parameter.copy_(noise * 1.5 / parameter.shape[1] ** 0.5)
            else:
                parameter.copy_(0.5 * noise)


def factors(weight: Tensor, group: list[int], head_dim: int, rank: int | None, rotated: bool) -> tuple[Tensor, Tensor]:
    """Return (heads, head_dim, rank) and (rank, columns) of the rows of a group; exact without a rank."""
    rows = torch.cat([weight[head * head_dim : (head + 1) * head_dim] for head in group]).double()
    if rank is not None:
        left, values, right = torch.linalg.svd(rows, full_matrices=False)
        up, down = left[:, :rank], values[:rank, None] * right[:rank]
    elif rows.shape[0] <= rows.shape[1]:
        up, down = torch.eye(rows.shape[0], dtype=torch.float64), rows
    else:
        up, down = rows, torch.eye(rows.shape[1], dtype=torch.float64)
    if rotated:
        turn = spreading(down.shape[0])
        up, down = up @ turn.T, turn @ down
    return up.float().unflatten(0, (len(group), head_dim)), down.float()


def compress(
    model: Any,
    ranks: int | None = None,
    grouped: bool = False,
    rotated: bool = False,
    attach: bool = True,
    factor_dtype: torch.dtype = torch.float32,
    **options: Any,
) -> Any:
    """Return a copy of a model with latents; ``ranks`` per group, ``grouped`` for several groups out of order."""
    model = copy.deepcopy(model)
    split_fused_qkv(model)
    for _, attention in attention_modules(model):
        for name in ("k_proj", "v_proj"):
            dense = getattr(attention, name)
            heads = dense.out_features // attention.head_dim
            groups = [list(range(heads))]
            if grouped and heads > 2:
                groups = [list(range(0, heads, 2)), list(range(1, heads, 2))]  # not neighbours
            elif grouped:
                groups = [[head] for head in reversed(range(heads))]
            made = [factors(dense.weight, group, attention.head_dim, ranks, rotated) for group in groups]
            packed = LatentFormat.pack(groups, [up for up, _ in made], [down for _, down in made], factor_dtype)
            setattr(attention, name, PackedLinear.replacing(dense, packed))
    if attach:
        attach_latent_attention(model, **options)
    return model
