"""Which attention modules can work on latents: told by what they consist of and what they compute, not by name.

An attention module qualifies if it consists of the known parts (projections of queries, keys and values, an output
projection, norms of queries and keys per head or none) and if, with random weights, it computes what our forward pass
computes (:mod:`hf_lowbit.cache.probe`). The second check finds what the first cannot see: scores that are capped,
queries that are scaled twice, rotations of another kind. Anything else is refused by name and with the reason, before
a weight is touched.
"""

from __future__ import annotations

import dataclasses
import inspect
import sys
from collections.abc import Container, Iterator
from typing import Any

from torch import nn
from transformers.cache_utils import (
    DYNAMIC_LAYER_TYPE_MAPPING,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    get_layer_types_and_kwargs,
)

from hf_lowbit.cache.attention import NO_PAGES, LatentAttention, Structure, convert_attention
from hf_lowbit.cache.probe import difference, norm_shift
from hf_lowbit.cache.projection import become, is_latent
from hf_lowbit.errors import UnsupportedModelError
from hf_lowbit.fused_qkv import FUSED
from hf_lowbit.kernels.latent_codec import SINK_TOKENS

_PROJECTIONS = {"q_proj", "k_proj", "v_proj"}
_OUTPUTS = ("o_proj", "out_proj", "dense")
_NORMS = {"q_norm", "k_norm"}
_LATENT_ATTENTION = ("kv_b_proj", "kv_a_proj_with_mqa")
_OWN = ("latent_structure", "latent_bits", "recent_window", "sink_tokens", "_latent_layout", "_latent_groups")
_PAGES = "init_continuous_batching"  # also on the way of generate_batch and of cache_implementation="paged"
_PLAIN = (bool, int, float, str, type(None))
_TOLERANCE = 1e-4  # relative; rounding gives 1e-6


def attach_latent_attention(
    model: nn.Module, latent_bits: int | None = None, recent_window: int = 0, sink_tokens: int = SINK_TOKENS
) -> int:
    """Make every attention module whose keys and values are packed as latents work on them.

    Modules that do so already get the options given here. Works on ``meta``.

    Args:
        model: changed in place.
        latent_bits: 8, 4 or 3: how caches that have no options of their own keep latents; None as they are.
        recent_window: how many of the latest tokens they keep in full beside their codes.
        sink_tokens: how many of the first tokens they keep in full beside their codes.

    Returns:
        The number of attention modules that work on latents.

    Raises:
        UnsupportedModelError: some of them cannot; all are named.
        ValueError: an option is out of range.
    """
    wanted = {
        name: module
        for name, module in model.named_modules()
        if is_latent(module._modules.get("k_proj")) or is_latent(module._modules.get("v_proj"))
    }
    fresh = {name: module for name, module in wanted.items() if not isinstance(module, LatentAttention)}
    structures = _structures(model, fresh)
    for name, module in wanted.items():
        structure = structures[name] if name in fresh else module.latent_structure
        convert_attention(
            module, structure, latent_bits=latent_bits, recent_window=recent_window, sink_tokens=sink_tokens
        )
    if wanted and hasattr(model, _PAGES):
        setattr(model, _PAGES, _without_pages)
    return len(wanted)


def _without_pages(*args: Any, **kwargs: Any) -> Any:
    """Take the place of a model's way into continuous batching, whose own thread would swallow the error."""
    raise NotImplementedError(NO_PAGES)


def detach_latent_attention(model: nn.Module) -> int:
    """Give attention modules whose projections are dense again back to the model's own class; return their number."""
    modules: list[Any] = [
        module
        for module in model.modules()
        if isinstance(module, LatentAttention) and not any(map(is_latent, module.children()))  # type: ignore[attr-defined]
    ]
    for module in modules:
        become(module, type(module).__mro__[2])
        for name in [name for name in vars(module) if name in _OWN]:
            delattr(module, name)
    if modules and not any(isinstance(module, LatentAttention) for module in model.modules()):
        vars(model).pop(_PAGES, None)
    return len(modules)


def check_attention(model: nn.Module, names: Container[str] | None = None) -> list[str]:
    """Return the names of attention modules that keep a cache, if each of them can work on latents.

    Args:
        model: in memory or on ``meta``.
        names: of the modules to look at; all by default.

    Raises:
        UnsupportedModelError: some cannot, or there are none; all are named, with the reason.
    """
    found = {name: module for name, module in attention_modules(model) if names is None or name in names}
    if not found:
        raise UnsupportedModelError(f"{type(model).__name__} has no attention module that keeps a cache of its own")
    _structures(model, found)
    return list(found)


def attention_modules(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield ``(name, module)`` of what takes part in a cache: transformers gives such a module its ``layer_idx``."""
    for name, module in model.named_modules():
        known = type(module).__name__.endswith("Attention") or bool({"k_proj", FUSED} & set(module._modules))
        if known and getattr(module, "layer_idx", None) is not None:
            yield name, module


def structure_of(model: nn.Module, name: str) -> Structure:
    """Return the structure of one attention module.

    Raises:
        UnsupportedModelError: it cannot work on latents.
    """
    return _structures(model, {name: model.get_submodule(name)})[name]


def _structures(model: nn.Module, modules: dict[str, Any]) -> dict[str, Structure]:
    structures: dict[str, Structure] = {}
    reasons: dict[str, list[str]] = {}
    probed: dict[Any, Structure | str] = {}
    for name, module in modules.items():
        structure = _structure(model, name, module)
        if isinstance(structure, Structure):
            # Most layers of a model differ in their index alone, so one of each kind is tried out.
            plain = {key: value for key, value in vars(module).items() if isinstance(value, _PLAIN)} | {"layer_idx": 0}
            kind = (
                type(module),
                id(module.config),
                structure.prefix,
                structure.norm_shift,
                repr(sorted(plain.items())),
            )
            if kind not in probed:
                probed[kind] = _tried_out(module, structure)
            tried = probed[kind]
            if isinstance(tried, Structure):
                # some models leave the rotation out in some layers
                structures[name] = dataclasses.replace(structure, rotary=tried.rotary and structure.rotary)
                continue
            structure = tried
        reasons.setdefault(structure, []).append(name)
    if reasons:
        listed = [f"{', '.join(names)}: {reason}" for reason, names in reasons.items()]
        raise UnsupportedModelError(f"attention that cannot work on latents: {'; '.join(listed)}")
    return structures


def _structure(model: nn.Module, name: str, module: Any) -> Structure | str:
    """Return the structure of a module, or why it has none that is known."""
    reason = _unknown_parts(module) or _unknown_model(model, module)
    if reason is not None:
        return reason
    heads = module.config.num_attention_heads
    kv_heads = getattr(module.config, "num_key_value_heads", None) or heads
    if FUSED not in module._modules:
        rows = [module._modules[part].out_features for part in ("q_proj", "k_proj", "v_proj")]
        if rows != [heads * module.head_dim, kv_heads * module.head_dim, kv_heads * module.head_dim]:
            return f"projections of {rows} rows are not {heads} + 2 · {kv_heads} heads of {module.head_dim}"
    base: Any = type(module).__mro__[2] if isinstance(module, LatentAttention) else type(module)
    rotary, prefix = None, ""
    if "position_embeddings" in inspect.signature(base.forward).parameters:
        rotary, prefix = _rotary(model, name, module)
        if rotary is None:
            return "its rotary embeddings are of a kind that is not known (no module with inv_freq above it)"
    eager = getattr(sys.modules[base.__module__], "eager_attention_forward", None)
    if eager is None:
        return "its module has no eager_attention_forward"
    output = next(part for part in _OUTPUTS if part in module._modules)
    shift = _norm_shift(module._modules.get("k_norm"))
    if shift is None:
        return f"its key norm, {type(module.k_norm).__name__}, is of no known kind"
    return Structure(name, output, heads, kv_heads, rotary, prefix, shift, eager)


def _unknown_parts(module: Any) -> str | None:
    children = {name for name, child in module.named_children() if any(True for _ in child.parameters())}
    if children & set(_LATENT_ATTENTION):
        return f"{type(module).__name__} has a latent cache of its own (multi-head latent attention)"
    projections = children & (_PROJECTIONS | {FUSED})
    outputs = children & set(_OUTPUTS)
    norms = children & _NORMS
    if projections not in (_PROJECTIONS, {FUSED}) or len(outputs) != 1 or norms not in (set(), _NORMS):
        return f"{type(module).__name__} consists of {', '.join(sorted(children)) or 'nothing'}, which is not known"
    unknown = children - projections - outputs - norms
    unknown |= {name for name, _ in module.named_parameters(recurse=False)}
    if unknown:
        return f"{type(module).__name__} has {', '.join(sorted(unknown))}, which is not known"
    missing = [name for name in ("config", "head_dim", "scaling", "layer_idx") if getattr(module, name, None) is None]
    return f"{type(module).__name__} has no {', '.join(missing)}" if missing else None


def _unknown_model(model: Any, module: Any) -> str | None:
    layer_types = get_layer_types_and_kwargs(module.config)[0]
    kind = layer_types[module.layer_idx] if module.layer_idx < len(layer_types) else "unknown"
    if DYNAMIC_LAYER_TYPE_MAPPING.get(kind) not in (DynamicLayer, DynamicSlidingWindowLayer):
        return f"its cache layer is of the kind {kind!r}, which is not known"
    if getattr(module.config, "clip_qkv", None) is not None:
        return "queries, keys and values that are clipped are not supported"
    for config in (module.config, getattr(model, "config", None)):
        if getattr(config, "is_encoder_decoder", False):
            return "encoder-decoder models are not supported"
        if getattr(config, "kv_sharing_modes", None) or getattr(config, "num_kv_shared_layers", 0):
            return "layers that share keys and values with others are not supported"
        if "mrope_section" in str(getattr(config, "rope_parameters", None)):
            return "rotary embeddings along several axes are not supported"
    return None


def _rotary(model: nn.Module, name: str, module: Any) -> tuple[Any, str]:
    """Return the nearest module with rotary frequencies above an attention module, and the prefix of their name."""
    parts = name.split(".")
    for depth in range(len(parts) - 1, -1, -1):
        holder = model.get_submodule(".".join(parts[:depth]))
        rotary = holder._modules.get("rotary_emb")
        for prefix in ("", f"{getattr(module, 'layer_type', '')}_"):
            if all(hasattr(rotary, f"{prefix}{part}") for part in ("inv_freq", "attention_scaling")):
                return rotary, prefix
    return None, ""


def _norm_shift(norm: Any) -> float | None:
    """Return what must be added to the weight of a norm to get its factor; None for a norm of no known kind."""
    if norm is None:
        return 0.0
    known = {name for name, _ in norm.named_parameters()} == {"weight"}
    if not known or not any(hasattr(norm, eps) for eps in ("variance_epsilon", "eps")):
        return None
    return norm_shift(norm)


def _tried_out(module: Any, structure: Structure) -> Structure | str:
    """Return the structure with which ours computes what a module computes, or why there is none."""
    kind, differences = type(module).__name__, []
    for rotated in [False] if structure.rotary is None else [True, False]:
        try:
            differences.append(difference(module, structure, rotated))
        except (TypeError, ValueError, RuntimeError, AttributeError, IndexError, KeyError) as error:
            first_line = (str(error).splitlines() or [""])[0]
            return f"{kind} could not be tried out ({type(error).__name__}: {first_line})"
        if differences[-1] < _TOLERANCE:
            return structure if rotated else dataclasses.replace(structure, rotary=None)
    least = min(differences)
    return f"{kind} computes something else than attention as it is known here (relative difference {least:.1e})"
