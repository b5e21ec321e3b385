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
from transformers.utils import is_hqq_available, is_optimum_quanto_available

from hf_lowbit.cache import ReCalKVCache, attach_latent_attention
from hf_lowbit.formats.latent import LatentFormat
from hf_lowbit.layers import PackedLinear

DTYPE = torch.bfloat16
DENSE, LATENTS = "dense", "latents"
FP8, QUANTO, HQQ = "fp8 (transformers)", "quanto, 4 bits (transformers)", "hqq, 4 bits (transformers)"
DECODED_AS_A_WHOLE = (FP8, QUANTO, HQQ)


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


# SmolLM2-135M; attention that shares heads as in Llama-3-8B; and with as many key as query heads as in Llama-2-7B, in
# two groupings of its keys.
SHAPES = {
    "SmolLM2-135M": Shape(576, 9, 3, 64, 3),
    "8 of 32 heads, groups of 1": Shape(4096, 32, 8, 128, 1),
    "32 heads, groups of 4": Shape(4096, 32, 32, 128, 4),
    "32 heads, groups of 1": Shape(4096, 32, 32, 128, 1),
}


# What one rotation through the layers reads, at least: more than the second-level cache of any machine we know. The
# layers of a model are not read from a cache.
_COLD_BYTES = 64_000_000
_MOST_LAYERS = 30
_OWN_TOKENS = 2048


def layers_for(shape: Shape, tokens: int, batch: int) -> int:
    """Return how many layers it takes for none to be read from a cache, in a model or in a measurement."""
    weights = 2 * shape.hidden * (shape.heads * shape.head_dim + shape.width)
    each = DTYPE.itemsize * (weights + tokens * batch * shape.width)  # of a cache that holds half
    return max(1, min(_MOST_LAYERS, -(-_COLD_BYTES // each)))


def models(shape: Shape, layers: int = 1) -> dict[str, Any]:
    """Return a dense model with random weights, and one with random factors; time depends on neither."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=shape.hidden,
        intermediate_size=16,
        num_hidden_layers=layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        vocab_size=16,
        max_position_embeddings=2**17,
    )
    dense = LlamaForCausalLM(config).to(DTYPE).eval()
    latent = copy.deepcopy(dense)
    for layer in latent.model.layers:
        attention = layer.self_attn
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

    kinds = {
        DENSE: (dense, lambda: DynamicCache(config=dense.config)),
        FP8: (dense, lambda: QuantizedCache("fp8", dense.config)),
    }
    if is_optimum_quanto_available():
        kinds[QUANTO] = (dense, lambda: QuantizedCache("quanto", dense.config, nbits=4))
    if is_hqq_available():
        kinds[HQQ] = (
            dense,
            lambda: QuantizedCache("hqq", dense.config, nbits=4, axis_key=1, axis_value=1),
        )
    return {
        **kinds,
        LATENTS: (latent, lambda: DynamicCache(config=latent.config)),
        "latents, 8 bits": (latent, codes(8)),
        "latents, 4 bits": (latent, codes(4)),
        "latents, 3 bits": (latent, codes(3)),
    }


def fill(model: Any, cache: Cache, shape: Shape, tokens: int, batch: int) -> None:
    """Put keys and values of random inputs into all layers of a cache: attention itself is not needed for that.

    In long caches they come again and again, which changes nothing about bytes and times and spares most of the work.
    """
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, min(tokens, _OWN_TOKENS), shape.hidden, generator=generator).to(DTYPE)
    for index, layer in enumerate(model.model.layers):
        attention = layer.self_attn
        first = 0
        if isinstance(attention.k_proj, PackedLinear):
            step(attention, model, cache, x[:, :1], 0)  # which makes the layer one of latents
            first = 1
        again = -(-tokens // x.shape[1])
        keys, values = (states.repeat(1, 1, again, 1)[:, :, first:tokens] for states in _states(attention, x, shape))
        cache.update(keys, values, index, position_ids=torch.arange(first, tokens)[None])


def _states(attention: Any, x: Tensor, shape: Shape) -> tuple[Tensor, Tensor]:
    if isinstance(attention.k_proj, PackedLinear):
        return attention.k_proj(x, "latent"), attention.v_proj(x, "latent")
    keys, values = (
        projection(x).unflatten(-1, (shape.kv_heads, -1)).transpose(1, 2).contiguous()
        for projection in (attention.k_proj, attention.v_proj)
    )
    return keys, values


def step(attention: Any, model: Any, cache: Cache, x: Tensor, position: int) -> Tensor:
    """Run the module on one new token of each row, which the cache takes in, too."""
    positions = torch.full((1, 1), position)
    turn = model.model.rotary_emb(x, positions)
    out: Tensor = attention(
        hidden_states=x, position_embeddings=turn, attention_mask=None, past_key_values=cache, position_ids=positions
    )[0]
    return out


def held(cache: Cache) -> int:
    """Count the bytes behind all tensors that a cache of any kind refers to, each piece of memory once."""
    seen: dict[int, int] = {}

    def walk(value: Any) -> None:
        if isinstance(value, Tensor) and hasattr(value, "__tensor_flatten__"):  # made of others
            walk([getattr(value, name) for name in value.__tensor_flatten__()[0]])
        elif isinstance(value, Tensor):
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


def kvpress_runs() -> str:
    """Say whether a press of kvpress takes tokens out of a cache on this transformers, or what stands against it."""
    try:
        from kvpress import KnormPress
    except ImportError as error:
        return f"not installed ({error})"
    model = models(Shape(64, 4, 2, 16, 2))[DENSE]
    cache = DynamicCache(config=model.config)
    try:
        with torch.no_grad(), KnormPress(compression_ratio=0.5)(model):
            model(torch.zeros(1, 64, dtype=torch.int64), past_key_values=cache)
    except (KeyError, TypeError, AttributeError, RuntimeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return f"keeps {cache.get_seq_length()} of 64 tokens"
