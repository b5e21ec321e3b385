"""QuantCache: a sampler's steps skipped, bits chosen and blocks bypassed as it runs (arXiv 2503.06545)."""

from __future__ import annotations

from typing import Any, NoReturn

from hf_lowbit.methods.quantcache.options import QuantCacheConfig
from hf_lowbit.registry import Method, register

__all__ = ["QuantCacheConfig"]


def _compress(unit: Any, stats: Any, options: QuantCacheConfig) -> NoReturn:
    raise ValueError(
        f"{unit.name}: quantcache compresses no weights; transformer.enable_cache(QuantCacheConfig()) makes a "
        "pipeline's transformer skip work, with weights of any kind"
    )


register(
    Method(
        name="quantcache",
        title="QuantCache",
        summary="a diffusion transformer skips steps, chooses activation bits and bypasses blocks while it samples",
        paper="2503.06545",
        config=QuantCacheConfig,
        unit="pipeline",
        needs="none",
        format="none",
        status="works: by enable_cache of diffusers, three parts, each alone or together; weight bits under a budget",
        compress=_compress,
    )
)
