"""Models whose cache holds latents: attention is converted when such a model is compressed or loaded."""

from __future__ import annotations

from typing import Any

from hf_lowbit import registry
from hf_lowbit.cache import attach_latent_attention, check_attention
from hf_lowbit.cache.attention import LatentAttention
from hf_lowbit.cache.projection import is_latent
from hf_lowbit.config import LowBitConfig
from hf_lowbit.recipe import rules_of


def check_cache(model: Any, config: LowBitConfig) -> None:
    """Refuse a model whose attention could not work on latents, if a config asks for them.

    Args:
        model: dense, in memory or on ``meta``.
        config: a method's config or a recipe.

    Raises:
        UnsupportedModelError: attention modules are not of a known structure; all are named.
        ValueError: rules of a recipe differ in how the cache, of which there is one, holds latents.
    """
    if _cache_options(config) is not None:
        check_attention(model)


def attach_cache(model: Any, config: LowBitConfig) -> None:
    """Make attention modules work on latents where keys and values are packed as such; works on ``meta``."""
    options = _cache_options(config)
    if options is not None:
        attach_latent_attention(model, **options)


def detach_cache(model: Any) -> None:
    """Let attention modules work on keys and values again where these are dense again."""
    for module in model.modules():
        if isinstance(module, LatentAttention) and not is_latent(module._modules.get("k_proj")):
            module.__class__ = type(module).__mro__[2]  # the model's own, see hf_lowbit.cache.attention


def _cache_options(config: LowBitConfig) -> dict[str, int | None] | None:
    """Return how the cache of a config holds latents, None if it holds none."""
    rules = [rule for _, rule in rules_of(config) if registry.get(rule.method).unit == "attention"]
    found = [(getattr(rule, "latent_bits", 16), getattr(rule, "recent_window", 0)) for rule in rules]
    if len(set(found)) > 1:
        raise ValueError("a model has one cache: latent_bits and recent_window must be alike in all rules of a recipe")
    if not found:
        return None
    bits, window = found[0]
    return {"latent_bits": None if bits == 16 else bits, "recent_window": window}
