"""One attention module, dense and on latents, and the caches compared: what they hold and one step of each."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.cache_utils import Cache, DynamicCache, QuantizedCache

from hf_lowbit.cache import ReCalKVCache, attach_latent_attention
from hf_lowbit.formats.latent import LatentFormat
from hf_lowbit.layers import PackedLinear

DTYPE = torch.bfloat16
DENSE, LATENTS = "dense", "latents"


@dataclasses.dataclass(frozen=True)
class Shape:
    """Of an attention module, and of the latents that half of its cache's width leaves.

    Attributes:
        hidden: width of the model.
        heads: query heads.
        kv_heads: key heads.
        head_dim: width of each.
        together: key heads of one group; values are one group.
    """

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    together: int

    @property
    def width(self) -> int:
        """Numbers that a dense cache keeps of a token's keys."""
        return self.kv_heads * self.head_dim

    @property
    def key_rank(self) -> int:
        """Rank of a group of keys: half of its rows."""
        return self.together * self.head_dim // 2

    @property
    def value_rank(self) -> int:
        """Rank of the values."""
        return self.width // 2


# SmolLM2-135M, and an attention with as many key as query heads, as in Llama-2-7B, in two groupings of its keys.
SHAPES = {
    "SmolLM2-135M": Shape(576, 9, 3, 64, 3),
    "32 heads, groups of 4": Shape(4096, 32, 32, 128, 4),
    "32 heads, groups of 1": Shape(4096, 32, 32, 128, 1),
}


def models(shape: Shape) -> dict[str, Any]:
    """Return a dense model of one layer and random weights, and one with random factors; time depends on neither."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=shape.hidden,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        vocab_size=16,
        max_position_embeddings=2**17,
    )
    dense = LlamaForCausalLM(config).to(DTYPE).eval()
    latent = copy.deepcopy(dense)
    attention = latent.model.layers[0].self_attn
    for name, together, rank in (
        ("k_proj", shape.together, shape.key_rank),
        ("v_proj", shape.kv_heads, shape.value_rank),
    ):
        groups = [list(range(head, head + together)) for head in range(0, shape.kv_heads, together)]
        ups = [torch.randn(together, shape.head_dim, rank) / rank**0.5 for _ in groups]
        downs = [torch.randn(rank, shape.hidden) / shape.hidden**0.5 for _ in groups]
        packed = LatentFormat.pack(groups, ups, downs, DTYPE)
        setattr(attention, name, PackedLinear.replacing(getattr(attention, name), packed))
    attach_latent_attention(latent)
    return {DENSE: dense, LATENTS: latent}


def caches(found: dict[str, Any]) -> dict[str, tuple[Any, Callable[[], Cache]]]:
    """Return for every kind of cache the model that fills it, and how to make it."""
    dense, latent = found[DENSE], found[LATENTS]

    def codes(bits: int) -> Callable[[], Cache]:
        return lambda: ReCalKVCache(latent.config, latent_bits=bits)

    return {
        "dense": (dense, lambda: DynamicCache(config=dense.config)),
        "fp8 (transformers)": (dense, lambda: QuantizedCache("fp8", dense.config)),
        "latents": (latent, lambda: DynamicCache(config=latent.config)),
        "latents, 8 bits": (latent, codes(8)),
        "latents, 4 bits": (latent, codes(4)),
    }


def fill(model: Any, cache: Cache, shape: Shape, tokens: int, batch: int) -> None:
    """Put keys and values of random inputs into a cache, in pieces: attention itself is not needed for that."""
    attention = model.model.layers[0].self_attn
    generator = torch.Generator().manual_seed(1)
    # The first token by a step, which makes the layer one of latents; the others past the attention.
    step(attention, model, cache, torch.randn(batch, 1, shape.hidden, generator=generator).to(DTYPE), 0)
    for start in range(1, tokens, 512):
        count = min(512, tokens - start)
        keys, values = _states(
            attention, torch.randn(batch, count, shape.hidden, generator=generator).to(DTYPE), shape
        )
        cache.update(keys, values, 0, position_ids=torch.arange(start, start + count)[None])


def _states(attention: Any, x: Tensor, shape: Shape) -> tuple[Tensor, Tensor]:
    if isinstance(attention.k_proj, PackedLinear):
        return attention.k_proj(x, "latent"), attention.v_proj(x, "latent")
    keys, values = (
        projection(x).unflatten(-1, (shape.kv_heads, -1)).transpose(1, 2)
        for projection in (attention.k_proj, attention.v_proj)
    )
    return keys, values


def step(attention: Any, model: Any, cache: Cache, x: Tensor, position: int) -> Tensor:
    """Run the module on one new token of each row, which the cache takes in, too."""
    positions = torch.full((1, 1), position)
    turn = model.model.rotary_emb(x, positions)
    out: Tensor = attention(x, position_embeddings=turn, past_key_values=cache, position_ids=positions)[0]
    return out


def held(cache: Cache) -> int:
    """Count the bytes behind all tensors that a cache of any kind refers to, each piece of memory once."""
    seen: dict[int, int] = {}

    def walk(value: Any) -> None:
        if isinstance(value, Tensor):
            storage = value.untyped_storage()
            seen[storage.data_ptr()] = storage.nbytes()
        elif isinstance(value, tuple | list):
            for part in value:
                walk(part)
        elif isinstance(value, dict):
            walk(list(value.values()))
        elif hasattr(value, "update") and hasattr(value, "get_seq_length"):  # a layer, and that of its positions
            walk(vars(value))

    walk(cache.layers)
    return sum(seen.values())
