"""Trial of an attention class: does our forward pass compute what the model's own does?

Both are run on the CPU with the same random weights, norms included, on a prompt and one more token. The projections
are replaced by narrow ones (only their inner side matters to attention), so the trial costs milliseconds for any model
and works for one whose weights are not there yet.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

from hf_lowbit.cache.attention import Structure, convert_attention, norm_eps
from hf_lowbit.cache.projection import LatentProjection
from hf_lowbit.kernels.latent_attention import rotation

_WIDTH, _PROMPT = 32, 5
# Standard deviation of the scores: large enough that a cap on them, as Gemma 2 has, is seen far above rounding.
_SCORES = 5.0
# The second row's positions: far out, where some models scale their queries.
_FAR = 100_003


def difference(module: Any, structure: Structure, rotated: bool) -> float:
    """Return the largest relative difference between the outputs of a module's own class and ours.

    Args:
        module: attention of a model, not converted; only copied, also from ``meta``.
        structure: as found for it.
        rotated: whether ours rotates queries and keys.
    """
    with torch.device("cpu"), torch.no_grad():
        generator = torch.Generator().manual_seed(0)
        own, parts = _copy(module, structure, generator)
        frequencies = None
        if structure.rotary is not None:
            count = getattr(structure.rotary, f"{structure.prefix}inv_freq").shape[-1]
            frequencies = 1 / 100 ** (torch.arange(count, dtype=torch.float32) / count)
        inputs = torch.randn(2, _PROMPT + 1, _WIDTH, generator=generator, dtype=torch.float32)
        expected = _outputs(own, inputs, frequencies)
        ours = _converted(own, parts, structure, frequencies if rotated else None)
        worst = 0.0
        for implementation in ("eager", "sdpa"):  # the second decodes through the op
            ours.config._attn_implementation = implementation
            for right, found in zip(expected, _outputs(ours, inputs, frequencies), strict=True):
                worst = max(worst, float((found - right).norm() / right.norm()), key=_nan_first)
    return worst


def norm_shift(norm: Any) -> float | None:
    """Return what must be added to the weight of an RMS norm to get its factor, None if it is no such norm."""
    with torch.device("cpu"), torch.no_grad():
        generator = torch.Generator().manual_seed(0)
        twin = copy.deepcopy(norm, _random_parameters(norm, generator))
        ones = torch.ones(1, twin.weight.shape[0], dtype=torch.float32)
        factor = twin(ones) * math.sqrt(1 + norm_eps(twin))
        shift = (factor - twin.weight).mean()
        return float(shift.round()) if torch.allclose(factor, twin.weight + shift.round(), atol=1e-4) else None


def _nan_first(value: float) -> float:
    return math.inf if math.isnan(value) else value


def _random_parameters(module: nn.Module, generator: torch.Generator) -> dict[int, Any]:
    """Return a memo for ``deepcopy`` that gives every parameter random values around 1, as float32 on the CPU."""
    return {
        id(parameter): nn.Parameter(
            0.5 + torch.rand(parameter.shape, generator=generator, dtype=torch.float32), requires_grad=False
        )
        for parameter in module.parameters()
    }


def _copy(module: Any, structure: Structure, generator: torch.Generator) -> tuple[Any, dict[str, nn.Linear]]:
    """Return a copy of an attention module with narrow random projections, and those of keys and values."""
    head_dim = module.head_dim
    rows = {"q_proj": structure.heads * head_dim, "k_proj": structure.kv_heads * head_dim}
    rows["v_proj"] = rows["k_proj"]
    rows["qkv_proj"] = sum(rows.values())
    memo = _random_parameters(module, generator)
    for name, child in module.named_children():
        has_bias = getattr(child, "bias", None) is not None
        if name == structure.output:
            memo[id(child)] = _linear(_WIDTH, structure.heads * head_dim, 1.0, has_bias, generator)
        elif name in rows:
            variance = _SCORES / (head_dim**0.5 * module.scaling)
            memo[id(child)] = _linear(rows[name], _WIDTH, variance, has_bias, generator)
    memo[id(module.config)] = config = copy.deepcopy(module.config)
    config._attn_implementation = "eager"
    twin = copy.deepcopy(module, memo).eval()
    if "qkv_proj" in twin._modules:
        weight = twin.qkv_proj.weight.split([rows[name] for name in ("q_proj", "k_proj", "v_proj")])
        bias = [None] * 3 if twin.qkv_proj.bias is None else twin.qkv_proj.bias.split(list(map(len, weight)))
        parts = {name: _of(weight[at], bias[at]) for at, name in enumerate(("q_proj", "k_proj", "v_proj"))}
    else:
        parts = {name: twin._modules[name] for name in ("q_proj", "k_proj", "v_proj")}
    return twin, parts


def _linear(rows: int, columns: int, variance: float, bias: bool, generator: torch.Generator) -> nn.Linear:
    """Return a layer whose outputs have this variance for inputs of variance 1."""
    weight = torch.randn(rows, columns, generator=generator, dtype=torch.float32) * (variance / columns) ** 0.5
    return _of(weight, torch.randn(rows, generator=generator, dtype=torch.float32) if bias else None)


def _of(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    linear.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)  # type: ignore[assignment]
    return linear


def _converted(own: Any, parts: dict[str, nn.Linear], structure: Structure, frequencies: Tensor | None) -> Any:
    """Return a copy of a module that works on latents of full rank."""
    ours = copy.deepcopy(own)
    ours._modules.pop("qkv_proj", None)
    ours.q_proj = parts["q_proj"]
    for name in ("k_proj", "v_proj"):
        weight = parts[name].weight
        up, down = torch.eye(len(weight)), weight
        if len(weight) > _WIDTH:
            up, down = weight, torch.eye(_WIDTH)
        heads = up.unflatten(0, (structure.kv_heads, -1))
        projection = LatentProjection.from_factors(
            [range(structure.kv_heads)], [heads], [down], parts[name].bias, torch.float32
        )
        ours.add_module(name, projection)
    rotary = None
    if frequencies is not None:
        rotary = SimpleNamespace(
            **{f"{structure.prefix}inv_freq": frequencies, f"{structure.prefix}attention_scaling": 1.0}
        )
    convert_attention(ours, dataclasses.replace(structure, rotary=rotary))
    return ours


def _outputs(attention: Any, inputs: Tensor, frequencies: Tensor | None) -> list[Tensor]:
    """Return what a module makes of a prompt and of one more token; the second row's positions are shifted."""
    cache = DynamicCache()
    positions = torch.arange(_PROMPT + 1) + torch.tensor([[0], [_FAR]])
    hidden = torch.ones(_PROMPT, _PROMPT, dtype=torch.bool).triu(1)
    mask = torch.zeros(1, 1, _PROMPT, _PROMPT, dtype=torch.float32).masked_fill(hidden, -1e9)
    outputs = []
    for tokens, visible in ((slice(0, _PROMPT), mask), (slice(_PROMPT, None), None)):
        places = positions[:, tokens]
        extra = {}
        if frequencies is not None:
            extra["position_embeddings"] = rotation(places, frequencies, 1.0)
        outputs.append(
            attention(
                hidden_states=inputs[:, tokens],
                attention_mask=visible,
                past_key_values=cache,
                position_ids=places,
                **extra,
            )[0]
        )
    return outputs
