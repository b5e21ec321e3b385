"""A cache of latents in place of keys and values, and attention that works on it.

:func:`attach_latent_attention` converts a model whose key and value projections are packed as latents; from then on
``forward`` and ``generate`` keep latents in whatever cache they make. :class:`ReCalKVCache` is for options that differ
from the model's own, :func:`cache_bytes` counts what a cache holds, :func:`save_cache` and :func:`load_cache` keep the
cache of a long prefix in a file.
"""

from hf_lowbit.cache.adapters import (
    attach_latent_attention,
    attention_modules,
    check_attention,
    detach_latent_attention,
    structure_of,
)
from hf_lowbit.cache.attention import convert_attention
from hf_lowbit.cache.cache import ReCalKVCache, cache_bytes
from hf_lowbit.cache.projection import LatentProjection
from hf_lowbit.cache.store import load_cache, save_cache

__all__ = [
    "LatentProjection",
    "ReCalKVCache",
    "attach_latent_attention",
    "attention_modules",
    "cache_bytes",
    "check_attention",
    "convert_attention",
    "detach_latent_attention",
    "load_cache",
    "save_cache",
    "structure_of",
]
