"""Models whose cache holds latents: attention is converted when such a model is compressed or loaded."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from transformers.core_model_loading import ConversionOps, WeightConverter

from hf_lowbit.cache import attach_latent_attention, check_attention, detach_latent_attention
from hf_lowbit.compress import CheckpointSource
from hf_lowbit.compress.projections import covering, is_for_attention, projection_of
from hf_lowbit.config import LowBitConfig
from hf_lowbit.errors import CheckpointError
from hf_lowbit.fused_qkv import FUSED, join_fused_qkv, parts_of, split_fused_qkv
from hf_lowbit.hf.packed import name_in
from hf_lowbit.recipe import matches, rules_of


def prepare_cache(model: Any, config: LowBitConfig) -> list[str]:
    """Look at a dense model that a config makes latents for, and take its fused projections apart.

    Args:
        model: dense, in memory or on ``meta``; changed where one layer computes queries, keys and values.
        config: a method's config or a recipe.

    Returns:
        The names of the attention modules whose projections were taken apart.

    Raises:
        UnsupportedModelError: attention modules that would be compressed are not of a known structure; all are named.
        ValueError: rules of a recipe differ in how the cache, of which there is one, holds latents.
    """
    if _cache_options(config) is None:
        return []
    fused = [name for name, module in model.named_modules() if FUSED in module._modules and _covered(config, name)]
    split = split_fused_qkv(model, fused)
    owners = {
        name.rpartition(".")[0]
        for name, _ in model.named_modules()
        if projection_of(model, name) is not None and _covered(config, name) and _latent_rule(model, config, name)
    }
    if owners:  # a run without any refuses by itself, and says what it looked for
        check_attention(model, owners)
    return split


class FusedOnTheWay:
    """Fused projections of a dense checkpoint, on their way into a model on ``meta`` where they were taken apart.

    transformers is told to cut each of their tensors when it comes; a run that reads weights by itself, in which rows
    of which tensor it finds them.
    """

    def __init__(self, model: Any, names: list[str], source: CheckpointSource | None) -> None:
        """Tell the run's source.

        Args:
            model: on ``meta``, see :func:`prepare_cache`.
            names: of the attention modules whose projections were taken apart.
            source: of the dense weights; None if they are not in safetensors files.

        Raises:
            CheckpointError: a fused projection is stored with other rows than the config says; it is named.
        """
        self._base = f"{getattr(model, 'base_model_prefix', '')}."
        self._parts = list(parts_of(model, names))
        for fused, parts in self._parts:
            if source is not None and (key := source.locate(fused)) is not None:
                _check_rows(key, source.shape(key)[0], parts[-1][1].stop)
                for parameter, rows in parts:
                    source.alias(parameter, key, rows)

    def conversions(self) -> list[WeightConverter]:
        """Return what cuts the tensors when they are loaded; names of a checkpoint may lack the model's prefix."""
        return [
            WeightConverter(
                rf"(?<!\w){re.escape(fused.removeprefix(self._base))}",
                [parameter.removeprefix(self._base) for parameter, _ in parts],
                operations=[_Cut([rows for _, rows in parts])],
            )
            for fused, parts in self._parts
        ]

    def __contains__(self, parameter: str) -> bool:
        """Return whether transformers asks for this parameter when it means one of the three: it is the first."""
        return any(parameter == parts[0][0] for _, parts in self._parts)


class _Cut(ConversionOps):
    """Cuts a tensor into rows, each piece with memory of its own."""

    def __init__(self, rows: list[slice]) -> None:
        self._rows = rows

    def convert(
        self, input_dict: dict[str, Any], source_patterns: Any, target_patterns: list[str], **kwargs: Any
    ) -> dict[str, Any]:
        """Return the pieces by the patterns of what they become."""
        (found,) = input_dict.values()
        tensor = found[0] if isinstance(found, list) else found
        _check_rows(source_patterns[0], len(tensor), self._rows[-1].stop)
        return {target: tensor[rows].clone() for target, rows in zip(target_patterns, self._rows, strict=True)}


def _check_rows(name: str, stored: int, expected: int) -> None:
    if stored != expected:
        raise CheckpointError(f"{name}: {stored} rows are stored, the heads of the config need {expected}")


def forget_cuts(model: Any) -> None:
    """Take the cuts out of the conversions that transformers keeps to undo them in a save: a save writes the parts."""
    kept = getattr(model, "_weight_conversions", None)
    if kept is not None:
        model._weight_conversions = [
            conversion
            for conversion in kept
            if not any(isinstance(operation, _Cut) for operation in getattr(conversion, "operations", ()))
        ]


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
    """Let attention modules work on keys and values again, which are dense now; fused ones are put together."""
    detach_latent_attention(model)
    join_fused_qkv(model)


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
