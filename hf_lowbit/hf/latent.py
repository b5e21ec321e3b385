"""Models whose cache holds latents: attention is converted when such a model is compressed or loaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hf_lowbit.cache import attach_latent_attention, check_attention, detach_latent_attention
from hf_lowbit.compress.projections import covering, is_for_attention, projection_of
from hf_lowbit.config import LowBitConfig
from hf_lowbit.errors import UnsupportedModelError
from hf_lowbit.fused_qkv import FUSED, split_fused_qkv
from hf_lowbit.hf.packed import name_in
from hf_lowbit.recipe import matches, rules_of


def prepare_cache(model: Any, config: LowBitConfig) -> None:
    """Look at a dense model that a config makes latents for, and take its fused projections apart.

    Args:
        model: dense, in memory or on ``meta``; changed where one layer computes queries, keys and values.
        config: a method's config or a recipe.

    Raises:
        UnsupportedModelError: attention modules that would be compressed are not of a known structure, all are named;
            or their projections are fused in a model on ``meta``.
        ValueError: rules of a recipe differ in how the cache, of which there is one, holds latents.
    """
    if _cache_options(config) is None:
        return
    fused = [name for name, module in model.named_modules() if FUSED in module._modules and _covered(config, name)]
    if fused and any(parameter.device.type == "meta" for parameter in model.parameters()):
        raise UnsupportedModelError(
            f"{fused[0]}: computes queries, keys and values in one layer, which can be taken apart in memory only; "
            "load the dense model and call hf_lowbit.quantize(model, config)"
        )
    split_fused_qkv(model, fused)
    owners = {
        name.rpartition(".")[0]
        for name, _ in model.named_modules()
        if projection_of(model, name) is not None and _covered(config, name) and _latent_rule(model, config, name)
    }
    if owners:  # a run without any refuses by itself, and says what it looked for
        check_attention(model, owners)


def split_listed(model: Any, table: Mapping[str, Any]) -> None:
    """Take fused projections apart, on ``meta``, of which a module table lists the keys or values as packed."""
    known = {name for name, module in model.named_modules() if FUSED in module._modules}
    listed = {name_in(model, name.rpartition(".")[0], known) for name in table}
    split_fused_qkv(model, [name for name in known if name in listed])


def _covered(config: LowBitConfig, name: str) -> bool:
    rules = [pattern for pattern, rule in rules_of(config) if is_for_attention(rule)]
    return any(matches(pattern, name) for pattern in rules) and not any(matches(p, name) for p in config.skip)


def _latent_rule(model: Any, config: LowBitConfig, name: str) -> bool:
    _, rule, _ = covering(model, config, name)
    return rule is not None and is_for_attention(rule)


def attach_cache(model: Any, config: LowBitConfig) -> None:
    """Make attention modules work on latents where keys and values are packed as such; works on ``meta``."""
    options = _cache_options(config)
    if options is not None:
        attach_latent_attention(model, **options)


def detach_cache(model: Any) -> None:
    """Let attention modules work on keys and values again, which are dense now."""
    detach_latent_attention(model)


def _cache_options(config: LowBitConfig) -> dict[str, Any] | None:
    """Return how the cache of a config holds latents, None if it holds none."""
    rules: dict[str, Any] = {pattern: rule for pattern, rule in rules_of(config) if is_for_attention(rule)}
    found = {pattern: (rule.latent_bits, rule.recent_window, rule.sink_tokens) for pattern, rule in rules.items()}
    if len(set(found.values())) > 1:
        raise ValueError(
            f"rules {', '.join(map(repr, found))}: a model has one cache: latent_bits, recent_window and sink_tokens "
            "must be alike in all rules of a recipe"
        )
    if not found:
        return None
    bits, window, sinks = next(iter(found.values()))
    return {"latent_bits": None if bits == 16 else bits, "recent_window": window, "sink_tokens": sinks}
