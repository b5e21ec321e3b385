"""How latent layers come into a cache: each takes the place of an empty stock layer when it is first used."""

from __future__ import annotations

import dataclasses
from typing import Any

from transformers.cache_utils import (
    Cache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    StaticLayer,
    StaticSlidingWindowLayer,
)

from hf_lowbit.cache.layers import (
    FixedLayer,
    LatentDynamicLayer,
    LatentLayer,
    LatentSlidingLayer,
    LatentStaticLayer,
    LatentStaticSlidingLayer,
)
from hf_lowbit.cache.layout import Layout


def _twin(stock: Any) -> tuple[LatentLayer, Any] | None:
    """Return an empty latent layer of the kind of ``stock``, and another stock layer of that kind."""
    kind = type(stock)
    if kind is DynamicLayer:
        return LatentDynamicLayer(), DynamicLayer()
    if kind is DynamicSlidingWindowLayer:
        window = stock.sliding_window
        twin = LatentSlidingLayer(sliding_window=window)
        twin.record_past = stock.record_past
        return twin, DynamicSlidingWindowLayer(sliding_window=window)
    if kind is StaticLayer:
        return LatentStaticLayer(max_cache_len=stock.max_cache_len), StaticLayer(max_cache_len=stock.max_cache_len)
    if kind is StaticSlidingWindowLayer:
        # The stock layer keeps only the smaller of window and length, which stands for both.
        sizes = {"max_cache_len": stock.max_cache_len, "sliding_window": stock.max_cache_len}
        return LatentStaticSlidingLayer(**sizes), StaticSlidingWindowLayer(**sizes)
    return None


def new_layer(stock: Any, layout: Layout) -> LatentLayer:
    """Return the latent twin of an empty stock layer.

    Raises:
        TypeError: there is none of its kind.
        ValueError: it holds tokens already, or a static layer is to keep recent tokens in full.
    """
    pair = _twin(stock)
    if pair is None:
        raise TypeError(
            f"{layout.name}: a cache layer of type {type(stock).__name__} cannot hold latents; pass no cache, a "
            "DynamicCache, a StaticCache or a ReCalKVCache (which also keeps latents in codes of few bits)"
        )
    if int(stock.get_seq_length()):
        raise ValueError(
            f"{layout.name}: the cache already holds {int(stock.get_seq_length())} tokens of dense keys and values; "
            "fill it with this model from the start"
        )
    layer, places = pair
    if layout.recent and isinstance(layer, FixedLayer):
        raise ValueError(f"{layout.name}: recent_window={layout.recent} needs a dynamic cache, this one is static")
    layer.start(layout, places)
    return layer


def claim(cache: Any, index: int, layout: Layout) -> LatentLayer:
    """Return the latent layer of a cache for an attention module, put in place of a stock layer at its first use.

    Args:
        cache: of the forward pass.
        index: of the layer.
        layout: what the module stores. A cache that has options of its own overrides ``bits`` and ``recent``.

    Raises:
        TypeError: the cache is of a kind that cannot hold latents.
        ValueError: the layer belongs to other projections, or holds dense keys already.
    """
    if not isinstance(cache, Cache) or not hasattr(cache, "layers"):
        raise TypeError(f"{layout.name}: past_key_values is a {type(cache).__name__}, which cannot hold latents")
    if cache.layer_class_to_replicate is not None:
        while len(cache.layers) <= index:
            cache.layers.append(cache.layer_class_to_replicate())
    if index >= len(cache.layers):
        raise ValueError(f"{layout.name}: the cache has {len(cache.layers)} layers, the model at least {index + 1}")
    layer: Any = cache.layers[index]
    if not isinstance(layer, LatentLayer):
        options = getattr(cache, "latent_options", None)
        layer = new_layer(layer, layout if options is None else dataclasses.replace(layout, **options))
        cache.layers[index] = layer
    held = layer.layout
    if held.stamp != layout.stamp:
        raise ValueError(
            f"{layout.name}: this cache was filled by another model (its layer {index} belongs to {held.name!r} with "
            f"ranks {held.key_ranks} and {held.value_ranks}, other weights than here); use one cache for one model"
        )
    return layer
