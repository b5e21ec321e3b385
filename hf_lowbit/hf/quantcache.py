"""QuantCache on a transformer of diffusers: through its ``enable_cache``, or the functions here.

``transformer.enable_cache(QuantCacheConfig(...))`` works on every class with diffusers' ``CacheMixin``, and
``disable_cache()`` takes everything away again. diffusers has no registry of caches, only a closed list of types in
these two methods; so both are wrapped once, when the package registers: a config of ours goes our way, any other
theirs. :func:`apply_quantcache` and :func:`remove_quantcache` do the same without the mixin, in the manner of
diffusers' own functions. A recipe may bring a cache along (``LowBitRecipe(..., cache=QuantCacheConfig())``): it is
stored in ``config.json`` of the transformer and enabled when that is loaded.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import nn

from hf_lowbit.config import LowBitConfig
from hf_lowbit.methods.quantcache import QuantCacheConfig

if TYPE_CHECKING:
    from hf_lowbit.report.timeline import CacheReport

_ROOT, _BLOCK, _SUBLAYER = "quantcache_root", "quantcache_block", "quantcache_sublayer"
_HOOKS = (_ROOT, _BLOCK, _SUBLAYER)
# Modules of diffusers whose hooks skip work, too.
_OTHER_CACHES = (
    "faster_cache", "first_block_cache", "mag_cache", "pyramid_attention_broadcast", "sea_cache", "taylorseer_cache",
    "text_kv_cache",
)  # fmt: skip
_MARK = "_hf_lowbit_wrapped"


def apply_quantcache(transformer: nn.Module, config: QuantCacheConfig | None = None) -> None:
    """Make a transformer skip work while it samples.

    What was done is told by ``transformer.cache_report()``, which returns a
    :class:`~hf_lowbit.report.timeline.CacheReport` of the latest trajectory.

    Args:
        transformer: a diffusion transformer of diffusers, quantized or not.
        config: the options; None for the defaults.

    Raises:
        TypeError: ``transformer`` is no model, or ``config`` none of QuantCache.
        ValueError: a cache is enabled already.
        UnsupportedModelError: the blocks of the transformer are not known.
    """
    make: Any = QuantCacheConfig
    config = make() if config is None else config
    if not isinstance(config, QuantCacheConfig):
        raise TypeError(f"config must be a QuantCacheConfig, got {type(config).__name__}")
    from diffusers.hooks.hooks import HookRegistry

    from hf_lowbit.hf.quantcache_hooks import BlockHook, Engine, RootHook, SublayerHook

    engine = Engine(transformer, config)
    _refuse_second_cache(transformer)
    engine.bits.take()
    registry = HookRegistry.check_if_exists_or_initialize
    for index, block in enumerate(engine.blocks.values()):
        registry(block).register_hook(BlockHook(engine, index), _BLOCK)
    for name, module in engine.sublayers.items():
        registry(module).register_hook(SublayerHook(engine, name), _SUBLAYER)
    registry(transformer).register_hook(RootHook(engine), _ROOT)
    registry(transformer).invalidate_child_registries_cache()  # else contexts do not reach the new hooks
    parts: Any = transformer
    parts._cache_config = config
    parts.cache_report = engine.report


def check_config(transformer: nn.Module, config: LowBitConfig) -> None:
    """Refuse a recipe whose ``cache`` does not work on a transformer, before its weights are compressed.

    Raises:
        UnsupportedModelError: the blocks of the transformer are not known.
        ValueError: another cache is enabled on it.
    """
    cache: Any = getattr(config, "cache", None)
    if cache is not None:
        from hf_lowbit.hf.quantcache_hooks import Engine

        Engine(transformer, cache)
        if not isinstance(getattr(transformer, "_cache_config", None), QuantCacheConfig):
            _refuse_second_cache(transformer)


def follow_config(transformer: nn.Module, config: LowBitConfig) -> None:
    """Enable the ``cache`` of a recipe, if it has one; a QuantCache that is enabled by hand stays as it is."""
    cache: Any = getattr(config, "cache", None)
    if cache is not None and getattr(transformer, "_cache_config", None) is None:
        apply_quantcache(transformer, cache)


def remove_quantcache(transformer: nn.Module) -> None:
    """Take QuantCache off a transformer: hooks, cached tensors, and the bits it has chosen.

    Raises:
        ValueError: it has none.
    """
    parts: Any = transformer
    registry = getattr(transformer, "_diffusers_hook", None)
    hook = None if registry is None else registry.get_hook(_ROOT)
    if registry is None or hook is None:
        raise ValueError(f"{type(transformer).__name__} has no QuantCache to remove")
    hook.engine.reset()
    for name in _HOOKS:
        registry.remove_hook(name, recurse=True)
    registry.invalidate_child_registries_cache()
    hook.engine.bits.give_back()
    parts._cache_config = None
    del parts.cache_report


def cache_report(transformer: nn.Module) -> CacheReport:
    """Return the report of the latest trajectory of a transformer, as its ``cache_report()`` does.

    Raises:
        ValueError: it has no QuantCache.
    """
    report: Callable[[], CacheReport] | None = getattr(transformer, "cache_report", None)
    if report is None:
        raise ValueError(f"{type(transformer).__name__} has no QuantCache to report on")
    return report()


def _refuse_second_cache(transformer: nn.Module) -> None:
    """Refuse a transformer with another cache: by its mixin, or by hooks that a function of diffusers has put on."""
    enabled = getattr(transformer, "_cache_config", None)
    if enabled is not None:
        raise ValueError(
            f"caching has already been enabled with {type(enabled).__name__}; call disable_cache() first, only one "
            "cache works at a time"
        )
    for name, module in transformer.named_modules():
        hooks = getattr(getattr(module, "_diffusers_hook", None), "hooks", {})
        for hook in hooks.values():
            package, _, kind = type(hook).__module__.rpartition(".")
            if package == "diffusers.hooks" and kind in _OTHER_CACHES:
                raise ValueError(f"{name or type(transformer).__name__} has the hooks of {kind}; remove them first")


def wrap(mixin: type) -> None:
    """Make the ``enable_cache`` and ``disable_cache`` of diffusers' mixin know QuantCache; again does nothing."""
    if getattr(mixin, _MARK, False):
        return
    kind: Any = mixin
    enable, disable = kind.enable_cache, kind.disable_cache

    @functools.wraps(enable)
    def enable_cache(self: Any, config: Any) -> None:
        if isinstance(config, QuantCacheConfig):
            return apply_quantcache(self, config)
        return enable(self, config)

    @functools.wraps(disable)
    def disable_cache(self: Any) -> None:
        if isinstance(self._cache_config, QuantCacheConfig):
            return remove_quantcache(self)
        return disable(self)

    kind.enable_cache, kind.disable_cache = enable_cache, disable_cache
    setattr(mixin, _MARK, True)


def register() -> None:
    """Wrap the mixin; it is a module of its own that loads no model."""
    from diffusers.models.cache_utils import CacheMixin

    wrap(CacheMixin)
