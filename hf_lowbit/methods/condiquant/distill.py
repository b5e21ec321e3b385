"""DQC: the ends of all grids are learned, so that the quantized model does what the dense one does; nothing else is.

Source: 2DQuant (arXiv 2406.06649), distillation quantization calibration, whose code was read.
Differs: (1) the code divides the pixel term, a mean already, by C·H·W again, and the features' term by its number of
elements, which leaves a millionth of it; here pixels count by their mean and features by their squared distance after
each sample's were brought to length 1. (2) It divides features (B, L, C) by norms of shape (B, 1, 1, 1), which gives
(B, B, L, C): every sample is compared with every other. (3) The ends of a grid move in units of its range, so that
one learning rate suits ranges of 0.1 and of 10, and the rate falls in a cosine.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from tqdm.auto import tqdm

from hf_lowbit.formats import IntegerFormat
from hf_lowbit.kernels.rounding import range_codes
from hf_lowbit.layers import PackedLinear
from hf_lowbit.methods.condiquant.attention import PARTS, AttentionGrids
from hf_lowbit.methods.condiquant.options import CondiQuantConfig
from hf_lowbit.numerics.bounds import LEAST_RANGE, learned_grid
from hf_lowbit.registry import ModelUnit

BETAS = (0.9, 0.99)


class Ends(nn.Module):
    """Ends of grids that are learned, in units of the range that each had at first.

    Attributes:
        start: (k, 2), float32.
        moved: (k, 2), what is learned, 0 at first.
    """

    start: Tensor

    def __init__(self, start: Tensor) -> None:
        super().__init__()
        self.register_buffer("start", start.detach().clone().float())
        self.moved = nn.Parameter(torch.zeros_like(self.start))

    def of(self, index: int) -> tuple[Tensor, Tensor]:
        """Return both ends of a grid, the lower first and at least 1e-8 apart."""
        low, high = self.start[index]
        span = (high - low).clamp(min=LEAST_RANGE)
        one, other = low + span * self.moved[index, 0], high + span * self.moved[index, 1]
        lower = torch.minimum(one, other)
        return lower, torch.maximum(torch.maximum(one, other), lower + LEAST_RANGE)

    def values(self) -> Tensor:
        """Return the ends as they are now, (k, 2), without gradients."""
        with torch.no_grad():
            return torch.stack([torch.stack(self.of(index)) for index in range(len(self.start))])


class LearnedLinear(nn.Module):
    """A linear layer whose weight and inputs are put on grids that are learned."""

    def __init__(self, packed: PackedLinear, weight: Tensor) -> None:
        super().__init__()
        form: Any = packed.packed
        self.spec, self.bias = packed.spec, packed.bias
        self.register_buffer("weight", weight.detach().float())
        self.weight_ends = Ends(form.bounds)
        self.input_ends = None if form.act_bounds is None else Ends(form.act_bounds.view(1, 2))

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the product of what both are on their grids, computed in float32, in the dtype of the inputs."""
        bits, dtype, inputs = self.spec.bits, inputs.dtype, inputs.float()
        parts = self.weight.chunk(self.spec.parts)  # type: ignore[operator]
        weight = torch.cat([learned_grid(p, self.weight_ends.of(i), bits) for i, p in enumerate(parts)])
        if self.input_ends is not None:
            inputs = learned_grid(inputs, self.input_ends.of(0), self.spec.act_bits)
        elif self.spec.activation == "dynamic":
            inputs = learned_grid(inputs, inputs.detach().aminmax(), self.spec.act_bits)
        return linear(inputs, weight, None if self.bias is None else self.bias.float()).to(dtype)

    def repacked(self) -> IntegerFormat:
        """Return the layer on the grids that were learned."""
        bounds = self.weight_ends.values()
        weight: Any = self.weight
        codes = [
            range_codes(part, ends, self.spec.bits)
            for part, ends in zip(weight.chunk(self.spec.parts), bounds, strict=True)
        ]
        return IntegerFormat.pack(
            self.spec,
            torch.cat(codes).to(torch.uint8),
            bounds=bounds,
            act_bounds=None if self.input_ends is None else self.input_ends.values()[0],
        )


def distill(unit: ModelUnit, grids: dict[str, AttentionGrids]) -> dict[str, IntegerFormat]:
    """Learn the ends of all grids of a model.

    Args:
        unit: with the dense model, the conditioned weights, and patches to learn on.
        grids: of attention modules, by name; those that are stored are learned, too.

    Returns:
        The layers on their new grids, by name. The grids of attention are changed in place.
    """
    options: CondiQuantConfig = unit.options
    layers: dict[str, Any] = {name: unit.model.get_submodule(name) for name in unit.changed}
    learned = {name: LearnedLinear(layer, unit.changed[name]) for name, layer in layers.items()}
    inside = {name: Ends(one.bounds) for name, one in grids.items() if one.bounds is not None}
    modules: list[nn.Module] = [*learned.values(), *inside.values()]
    try:
        for name, layer in learned.items():
            unit.model.set_submodule(name, layer)
        for name, ends in inside.items():
            grids[name].replace = _replacement(ends, grids[name].bits)
        trained = [p for module in modules for p in module.parameters() if p.requires_grad]
        # the biases inside are the model's own
        ends_only = [p for p in trained if p.dim() == 2]
        with torch.enable_grad():
            _train(unit, ends_only, options)
    finally:
        for name, layer in layers.items():
            unit.model.set_submodule(name, layer)
        for name in inside:
            grids[name].replace = None
    for name, ends in inside.items():
        bounds: Any = grids[name].bounds
        bounds.data.copy_(ends.values())
    return {name: layer.repacked() for name, layer in learned.items()}


def _replacement(ends: Ends, bits: int) -> Any:
    return lambda part, values: learned_grid(values.float(), ends.of(PARTS.index(part)), bits).to(values.dtype)


def _train(unit: ModelUnit, ends: list[nn.Parameter], options: CondiQuantConfig) -> None:
    patches = torch.cat(unit.batches)
    generator = torch.Generator().manual_seed(options.seed)
    optimizer = torch.optim.Adam(ends, lr=options.refine_lr, betas=BETAS)
    steps = options.refine_steps
    bar = tqdm(range(steps), desc="learning grids", unit="step", disable=not options.run.progress)
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = options.refine_lr * 0.5 * (1 + math.cos(math.pi * step / steps))
        batch = _drawn(patches, options.refine_batch, generator)
        with torch.no_grad(), features_of(unit.dense, unit.blocks) as wanted:
            truth = unit.run(unit.dense, batch)
        with features_of(unit.model, unit.blocks) as found:
            own = unit.run(unit.model, batch)
        loss = (own.float() - truth.float()).abs().mean()
        if options.feature_weight and found:
            loss = loss + options.feature_weight * feature_distance(found, wanted)
        for parameter, gradient in zip(ends, torch.autograd.grad(loss, ends, allow_unused=True), strict=True):
            parameter.grad = gradient
        optimizer.step()
        if not bool(torch.isfinite(loss)):
            raise ValueError(f"dqc: the loss is not finite in step {step}; lower refine_lr")
        bar.set_postfix_str(f"loss {float(loss.detach()):.5f}", False)


def _drawn(patches: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Draw patches, mirrored and turned at random."""
    index = torch.randint(len(patches), (min(count, len(patches)),), generator=generator).to(patches.device)
    batch = patches[index]
    mirror, turns = torch.randint(4, (2,), generator=generator).tolist()
    return torch.rot90(batch.flip(-1) if mirror % 2 else batch, turns, (-2, -1))


def feature_distance(found: list[Tensor], wanted: list[Tensor]) -> Tensor:
    """Return the mean over samples and blocks of ``‖f / ‖f‖ - g / ‖g‖‖²``.

    Args:
        found: of each block (B, L, C), or any shape that starts with the samples.
        wanted: the same of the dense model.
    """
    terms = []
    for own, other in zip(found, wanted, strict=True):
        one, two = (
            part / part.norm(dim=1, keepdim=True).clamp(min=1e-12)
            for part in (own.flatten(1).float(), other.flatten(1).float())
        )
        terms.append((one - two).square().sum(1).mean())
    return torch.stack(terms).mean()


@contextlib.contextmanager
def features_of(model: Any, blocks: tuple[str, ...]) -> Iterator[list[Tensor]]:
    """Keep the outputs of blocks within the ``with`` statement."""
    kept: list[Tensor] = []

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        kept.append(output[0] if isinstance(output, tuple) else output)

    handles = [model.get_submodule(name).register_forward_hook(keep) for name in blocks]
    try:
        yield kept
    finally:
        for handle in handles:
            handle.remove()
