"""Bits of weights under a budget, for a diffusion transformer (QuantCache's offline part).

    with record_calls(pipe.transformer) as calls:        # a few states of a sampler
        pipe(prompt, ...)
    plan = plan_weight_bits(pipe.transformer, calls, b_avg=4.5)
    hf_lowbit.quantize(pipe.transformer, plan.recipe())

What is decided upon is a part of a block: its self-attention, its cross-attention, its feed-forward. Each is quantized
alone, at each number of bits, and the transformer runs on the recorded calls; nothing of the transformer is changed in
the end. The plan becomes a recipe of DVD-Quant configs, so that saving and loading are those of any recipe.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hf_lowbit import registry
from hf_lowbit.compress.targets import select
from hf_lowbit.config import LowBitConfig
from hf_lowbit.errors import UnsupportedModelError
from hf_lowbit.hf.quantcache_blocks import find_blocks
from hf_lowbit.layers import PackedLinear, dense_weight, set_act_bits
from hf_lowbit.methods.quantcache.allocation import (
    EQUAL,
    Damage,
    allocate,
    perceptual_damage,
    sensitivities,
    temporal_damage,
)
from hf_lowbit.recipe import LowBitRecipe

logger = logging.getLogger(__name__)

DENSE = 16
Call = tuple[tuple[Any, ...], dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class WeightPlan:
    """Bits of each part of a transformer.

    Attributes:
        bits: by name of the part ("blocks.3.attn1"), 16 for dense.
        parameters: by name of the part.
        damage: what was measured, by name and bits.
        sensitivity: the one number made of it.
        configs: by bits, what a part is quantized with.
    """

    bits: Mapping[str, int]
    parameters: Mapping[str, int]
    damage: Mapping[str, Mapping[int, Damage]]
    sensitivity: Mapping[str, Mapping[int, float]]
    configs: Mapping[int, LowBitConfig]

    @property
    def mean_bits(self) -> float:
        """Bits per parameter of the parts, scales not counted."""
        return sum(self.parameters[part] * bits for part, bits in self.bits.items()) / sum(self.parameters.values())

    def recipe(self) -> LowBitRecipe:
        """Return the recipe that quantizes the transformer by this plan; layers outside of its parts stay dense.

        Raises:
            ValueError: all parts stay dense, too.
        """
        rules = {part: self.configs[bits] for part, bits in self.bits.items() if bits != DENSE}
        if not rules:
            raise ValueError("the plan leaves every part dense, so there is nothing to quantize; lower b_avg")
        make: Any = LowBitRecipe
        recipe: LowBitRecipe = make(rules)
        return recipe


@contextlib.contextmanager
def record_calls(transformer: nn.Module, count: int = 4) -> Iterator[list[Call]]:
    """Record the arguments of some of the calls that a transformer gets in this context.

    Args:
        transformer: of a pipeline that runs in the context.
        count: how many are wanted, from the first to the last at even distances.

    Yields:
        A list that is filled when the context ends.
    """
    every: list[Call] = []
    chosen: list[Call] = []
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}")

    def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        every.append((_kept(args), _kept(kwargs)))

    handle = transformer.register_forward_pre_hook(record, with_kwargs=True)
    try:
        yield chosen
    finally:
        handle.remove()
    places = {round(i * (len(every) - 1) / max(1, count - 1)) for i in range(count)}
    chosen.extend(every[place] for place in sorted(places) if place < len(every))


def _kept(value: Any) -> Any:
    """Return arguments with tensors of their own: a sampler may write into those it passes."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {key: _kept(item) for key, item in value.items()}
    return tuple(_kept(item) for item in value) if isinstance(value, tuple) else value


def noise_calls(transformer: Any, steps: int = 4, seed: int = 0) -> list[Call]:
    """Return calls with Gaussian latents and text at evenly spaced timesteps, where there is no data at all.

    Raises:
        ValueError: ``steps`` is below 1, or what such a call looks like is not known for the transformer's class.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    kind, config = type(transformer).__name__, getattr(transformer, "config", None)
    if kind not in _NOISE:
        raise ValueError(
            f"what {kind} is called with is not known ({', '.join(_NOISE)} are); record calls of a pipeline with "
            "record_calls"
        )
    logger.warning("no calls given: sensitivities are measured on Gaussian noise, which is worse than a few states")
    generator = torch.Generator().manual_seed(seed)
    parameter = next(transformer.parameters())

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(parameter.device, transformer.dtype)

    calls: list[Call] = []
    for step in range(steps):
        timestep = torch.tensor([1000.0 * (steps - step) / steps], device=parameter.device)
        calls.append(((), {**_NOISE[kind](config, draw), "timestep": timestep, "return_dict": False}))
    return calls


def _wan(config: Any, draw: Any) -> dict[str, Any]:
    sizes = [4 * patch for patch in config.patch_size]
    return {"hidden_states": draw(1, config.in_channels, *sizes), "encoder_hidden_states": draw(1, 8, config.text_dim)}


def _cogvideox(config: Any, draw: Any) -> dict[str, Any]:
    side, frames = 4 * config.patch_size, 4 * (config.patch_size_t or 1)
    text = draw(1, config.max_text_seq_length, config.text_embed_dim)
    return {"hidden_states": draw(1, frames, config.in_channels, side, side), "encoder_hidden_states": text}


def _ltx(config: Any, draw: Any) -> dict[str, Any]:
    text, mask = draw(1, 8, config.caption_channels), torch.ones(1, 8)
    sizes = {"num_frames": 4, "height": 4, "width": 4}
    return {
        "hidden_states": draw(1, 64, config.in_channels), "encoder_hidden_states": text,
        "encoder_attention_mask": mask, **sizes,
    }  # fmt: skip


_NOISE = {
    "WanTransformer3DModel": _wan,
    "CogVideoXTransformer3DModel": _cogvideox,
    "LTXVideoTransformer3DModel": _ltx,
}


def plan_weight_bits(
    transformer: Any,
    calls: Sequence[Call] | None = None,
    *,
    b_avg: float = 4.5,
    choices: Sequence[int] = (4, 8, DENSE),
    config: LowBitConfig | None = None,
    sensitivity_weights: Sequence[float] = EQUAL,
    frame_axis: int | None = None,
) -> WeightPlan:
    """Give each part of a transformer's blocks its bits of weights, under a budget of bits per parameter.

    Args:
        transformer: dense, in memory.
        calls: arguments of calls, see :func:`record_calls`; None for noise.
        b_avg: most bits per parameter, scales not counted.
        choices: bits to choose from; 16 leaves a part dense.
        config: a method with an option ``w_bits``; None for ``DVDQuantConfig``.
        sensitivity_weights: of the error of layers, of the output and of its differences between frames.
        frame_axis: axis of frames in the output; None finds it for the classes of diffusers.

    Returns:
        The plan; its ``recipe()`` goes into ``hf_lowbit.quantize`` or ``from_pretrained``.

    Raises:
        TypeError: ``transformer`` is no model, or ``config`` no config.
        ValueError: an argument is out of range; the method has no ``w_bits`` or not these.
        UnsupportedModelError: no layer of a block can be quantized.

    Source: Section AIGQ and Eq. (7).
    """
    if config is None:
        make: Any = registry.config_class("dvd_quant")
        config = make()
    if not isinstance(config, LowBitConfig):
        raise TypeError(f"config must be a config of one method, got {type(config).__name__}")
    if not isinstance(choices, Sequence) or any(type(bits) is not int for bits in choices):
        raise ValueError(f"choices must be numbers of bits, such as (4, 8, {DENSE}), got {choices!r}")
    quantized = sorted({bits for bits in choices if bits != DENSE})
    if not quantized or "w_bits" not in type(config).options():
        raise ValueError(f"choices must hold bits that {type(config).__name__} stores weights in, besides {DENSE}")
    configs = {bits: dataclasses.replace(config, w_bits=bits) for bits in quantized}  # type: ignore[call-arg]
    parts = _parts(transformer, configs[quantized[0]])
    parameters = {
        part: sum(transformer.get_submodule(name).weight.numel() for name in names) for part, names in parts.items()
    }
    # both refuse before the long work
    allocate(parameters, {part: {} for part in parts}, choices, b_avg)
    sensitivities({}, sensitivity_weights)
    found = [*(calls if calls is not None else noise_calls(transformer))]
    if not found:
        raise ValueError("calls is empty: the transformer was not called while they were recorded")
    if not all(isinstance(call, tuple) and [*map(type, call)] == [tuple, dict] for call in found):
        raise ValueError("calls must be pairs of a tuple and a dict, the arguments of one call each")
    with torch.no_grad():
        outputs = [_output(transformer, call) for call in found]
        _with_frames(transformer, found[0], outputs[0], outputs[0], frame_axis)  # refuses, too
        damage = {
            part: {
                bits: _damage(transformer, names, rule, found, outputs, frame_axis) for bits, rule in configs.items()
            }
            for part, names in parts.items()
        }
    sensitivity = sensitivities(damage, sensitivity_weights)
    return WeightPlan(allocate(parameters, sensitivity, choices, b_avg), parameters, damage, sensitivity, configs)


def _parts(transformer: nn.Module, config: LowBitConfig) -> dict[str, list[str]]:
    """Return the layers to be quantized by the part of a block that they lie in."""
    blocks = find_blocks(transformer)
    leaves_dense = registry.get(config.method).leaves_dense
    parts: dict[str, list[str]] = {}
    for name in select(transformer, config, None).methods:
        layer: Any = transformer.get_submodule(name)
        block = next((block for block in blocks if name.startswith(f"{block}.")), None)
        shape = (layer.out_features, layer.in_features) if isinstance(layer, nn.Linear) else None
        if block is None or shape is None or (leaves_dense is not None and leaves_dense(name, shape, config)):
            continue
        kind = name.removeprefix(f"{block}.").split(".")[0]
        parts.setdefault(f"{block}.{kind}", []).append(name)
    if not parts:
        raise UnsupportedModelError(
            f"{type(transformer).__name__}: {config.method} quantizes no layer of its blocks, so no bits are planned"
        )
    return parts


def _damage(
    transformer: nn.Module,
    names: Sequence[str],
    config: LowBitConfig,
    calls: Sequence[Call],
    outputs: Sequence[Tensor],
    frame_axis: int | None,
) -> Damage:
    """Quantize some layers, run the calls, and put the layers back."""
    dense: dict[str, Any] = {name: transformer.get_submodule(name) for name in names}
    errors = torch.zeros(2, dtype=torch.float64)

    def compare(layer: nn.Linear) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            exact = layer(args[0]).double()
            errors.add_(torch.stack([(output.double() - exact).square().sum(), exact.square().sum()]).cpu())

        return hook

    perceptual = temporal = 0.0
    try:
        for name, layer in dense.items():
            unit = registry.LinearUnit(name, dense_weight(layer))
            packed = PackedLinear.replacing(layer, registry.get(config.method).compress(unit, None, config))
            if packed.format_type.rounds_activations(packed.spec):
                set_act_bits(packed, DENSE)  # weights alone are judged
            packed.register_forward_hook(compare(layer))
            transformer.set_submodule(name, packed)
        for call, expected in zip(calls, outputs, strict=True):
            found = _output(transformer, call)
            a, b, axis = _with_frames(transformer, call, expected, found, frame_axis)
            perceptual += perceptual_damage(a, b) / len(calls)
            temporal += temporal_damage(a, b, axis) / len(calls)
    finally:
        for name, layer in dense.items():
            transformer.set_submodule(name, layer)
    return Damage(float(errors[0] / errors[1]) if errors[1] else 0.0, perceptual, temporal)


def _output(transformer: nn.Module, call: Call) -> Tensor:
    args, kwargs = call
    output: Any = transformer(*args, **kwargs)
    found: Tensor = output[0] if isinstance(output, tuple) else output.sample
    return found


def _with_frames(
    transformer: nn.Module, call: Call, expected: Tensor, found: Tensor, frame_axis: int | None
) -> tuple[Tensor, Tensor, int]:
    """Return two outputs and the axis of their frames; tokens are taken apart by the number that the call gives."""
    if frame_axis is not None:
        if type(frame_axis) is not int or not -expected.dim() <= frame_axis < expected.dim():
            raise ValueError(f"frame_axis must be an axis of the output {tuple(expected.shape)}, got {frame_axis!r}")
        return expected, found, frame_axis
    if expected.dim() == 5:
        return expected, found, 1 if type(transformer).__name__.startswith("CogVideoX") else 2
    frames = call[1].get("num_frames")
    if expected.dim() == 3 and isinstance(frames, int) and expected.shape[1] % frames == 0:
        shape = (expected.shape[0], frames, -1, expected.shape[2])
        return expected.reshape(shape), found.reshape(shape), 1
    raise ValueError(
        f"{type(transformer).__name__} returns {tuple(expected.shape)}: which axis are its frames? Give frame_axis"
    )
