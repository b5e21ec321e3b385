"""A cache for models with latent attention, with options of its own, and the count of bytes that any cache holds."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.cache_utils import Cache, DynamicCache, StaticCache

from hf_lowbit.cache.adoption import claim
from hf_lowbit.cache.attention import LatentAttention
from hf_lowbit.cache.layers import LatentLayer
from hf_lowbit.cache.layout import check_codes
from hf_lowbit.kernels.latent_codec import SINK_TOKENS
from hf_lowbit.layers import check_model


class ReCalKVCache(Cache):
    """Keeps latents in place of keys and values.

    Not needed for that alone: ``generate`` and ``forward`` of a converted model turn the cache that they make
    themselves into one of latents. This class is for a choice that differs from the model's own: codes of other bits,
    another window of recent tokens, static memory, offloading.

    Args:
        config: of the model, for kinds and number of its layers.
        latent_bits: 8, 4 or 3 keeps latents in codes; None as they are.
        recent_window: how many of the latest tokens are kept in full beside their codes.
        sink_tokens: how many of the first tokens are kept in full beside their codes, in layers without a window;
            where rows are padded on the left, those of each row, but in static memory those of the first slots.
        max_cache_len: room for so many tokens, allocated at once, so that decoding can be compiled; None grows.
        offloading: keep layers in the memory of the CPU while others run; needs an accelerator.
        offload_only_non_sliding: leave layers with a sliding window, which are small, where they are.

    Raises:
        TypeError: ``config`` is no config of a model.
        ValueError: an option is out of range, or two of them exclude each other.
    """

    def __init__(
        self,
        config: PretrainedConfig,
        *,
        latent_bits: int | None = None,
        recent_window: int = 0,
        sink_tokens: int = SINK_TOKENS,
        max_cache_len: int | None = None,
        offloading: bool = False,
        offload_only_non_sliding: bool = True,
    ) -> None:
        check_codes(latent_bits, recent_window, sink_tokens)
        if not isinstance(config, PretrainedConfig):
            raise TypeError(
                f"config must be that of a model, model.config, got {type(config).__name__}; for a model there is "
                "ReCalKVCache.from_model"
            )
        if max_cache_len is not None and (type(max_cache_len) is not int or max_cache_len < 1):
            raise ValueError(f"max_cache_len must be None or an integer from 1, got {max_cache_len!r}")
        if recent_window and max_cache_len is not None:
            raise ValueError(f"recent_window={recent_window} needs a growing cache; leave max_cache_len out")
        if offloading and not torch.accelerator.is_available():
            raise ValueError("offloading moves layers between an accelerator and the CPU, and there is no accelerator")
        if max_cache_len is None:
            stock: Cache = DynamicCache(config=config)
        else:
            stock = StaticCache(config=config, max_cache_len=max_cache_len)
        super().__init__(layers=stock.layers, offloading=offloading, offload_only_non_sliding=offload_only_non_sliding)
        first = sink_tokens if latent_bits else 0
        self.latent_options = {"bits": latent_bits or 0, "recent": recent_window, "first": first}

    @classmethod
    def from_model(cls, model: Any, **options: Any) -> ReCalKVCache:
        """Return a cache whose layers are made for a model at once, rather than when they are first used.

        Args:
            model: with latent attention.
            options: as for the class; without ``latent_bits``, how latents are kept is by default the model's choice.

        Raises:
            TypeError: it is no model, or there is no such option.
            ValueError: the model has no latent attention, or an option is out of range.
        """
        attentions = attention_by_layer(model)
        layouts = {index: attention.latent_layout() for index, attention in attentions.items()}
        first = next(iter(layouts.values()))
        if "latent_bits" not in options:
            own = {"latent_bits": first.bits or None, "recent_window": first.recent}
            options = own | ({"sink_tokens": first.first} if first.bits else {}) | options
        cache = cls(model.config, **options)
        for index, layout in layouts.items():
            claim(cache, index, layout)
        return cache

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Store what a layer computed, as all caches do.

        Raises:
            ValueError: no layer gave latents: the model has no latent attention, and would keep dense keys and values.
        """
        stored = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        if layer_idx == len(self.layers) - 1 and not any(isinstance(layer, LatentLayer) for layer in self.layers):
            raise ValueError(
                "a ReCalKVCache is for models with latent attention, and this model has none; compress it with "
                "ReCalKVConfig, or use another cache"
            )
        return stored

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the latest tokens from all layers, or, if one of them cannot, from none.

        Args:
            tokens_to_remove: 0 or negative, as for transformers' caches.

        Raises:
            ValueError: positive, or more tokens than a layer still has; or the cache is static.
        """
        for layer in self.layers:
            if isinstance(layer, LatentLayer):
                layer.check_crop(tokens_to_remove)
        super().crop(tokens_to_remove)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors that the cache holds."""
        return cache_bytes(self)["total"]

    def memory_footprint(self) -> dict[str, int]:
        """Return the bytes held by what they are, see :func:`cache_bytes`."""
        return cache_bytes(self)


def attention_by_layer(model: nn.Module) -> dict[int, Any]:
    """Return the modules with latent attention of a model by the index of their cache layer.

    Raises:
        TypeError: it is no model.
        ValueError: it has none, or two for one layer.
    """
    check_model(model, "model")
    found: dict[int, Any] = {}
    for name, module in model.named_modules():
        if isinstance(module, LatentAttention):
            index: Any = module.layer_idx  # type: ignore[attr-defined]
            if index in found:
                raise ValueError(f"{name} and another attention module have layer_idx {index}; pass one model of them")
            found[index] = module
    if not found:
        raise ValueError(f"{type(model).__name__} has no attention that works on latents")
    return found


def cache_bytes(cache: Cache) -> dict[str, int]:
    """Count the bytes that a cache really holds: the memory behind its tensors, each piece once.

    Args:
        cache: any, also one that ``generate`` made, and one that holds dense keys and values.

    Returns:
        Bytes of "latents" or "codes" (scales and zero points are part of the codes), "first" and "recent" tokens kept
        in full, "positions", "dense" (layers that no latent attention has used) and their "total".

    Raises:
        TypeError: it is no cache.
    """
    if not isinstance(cache, Cache):
        raise TypeError(f"cache must be a cache of transformers, got {type(cache).__name__}")
    counts = dict.fromkeys(("latents", "codes", "first", "recent", "positions", "dense"), 0)
    seen: set[tuple[torch.device, int]] = set()
    for layer in cache.layers:
        held = layer.held() if isinstance(layer, LatentLayer) else {"dense": _dense(layer)}
        for kind, tensors in held.items():
            for tensor in tensors:
                storage = tensor.untyped_storage()
                place = storage.device, storage.data_ptr()
                if storage.nbytes() and place not in seen:
                    seen.add(place)
                    counts[kind] += storage.nbytes()
    return {**counts, "total": sum(counts.values())}


def _dense(layer: Any) -> list[Tensor]:
    return [states for states in (getattr(layer, "keys", None), getattr(layer, "values", None)) if states is not None]
