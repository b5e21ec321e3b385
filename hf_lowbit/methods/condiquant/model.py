"""What CondiQuant does with a model as a whole: grids inside attention, and grids learned from the dense model."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hf_lowbit.formats import IntegerFormat
from hf_lowbit.kernels.rounding import RANGE_MODES, UNROUNDED
from hf_lowbit.layers import PackedLinear
from hf_lowbit.methods.condiquant import attention
from hf_lowbit.methods.condiquant.algorithm import bounds_of
from hf_lowbit.methods.condiquant.distill import distill
from hf_lowbit.methods.condiquant.options import CondiQuantConfig
from hf_lowbit.numerics.bounds import MOST_VALUES, sample
from hf_lowbit.registry import ModelUnit

logger = logging.getLogger(__name__)


def attach(model: nn.Module, options: CondiQuantConfig) -> dict[str, attention.AttentionGrids]:
    """Give attention modules their grids whose queries, keys and values are quantized layers; works on ``meta``.

    Args:
        model: with packed layers.
        options: of the run that packed them.

    Returns:
        The grids by name of the module, still to be filled where they are stored and the module had none yet.
    """
    found: dict[str, attention.AttentionGrids] = {}
    if not options.quantize_attention or options.act_mode == "none":
        return found
    for name, module in list(model.named_modules()):
        known = isinstance(module, attention.QuantizedAttention) or attention.is_known(module)
        if known and all(_rounds(module._modules.get(part)) for part in attention.PARTS[:3]):
            own = module._modules.get(attention.CHILD)
            ready = isinstance(own, attention.AttentionGrids)
            found[name] = own if ready else attention.convert(module, options.act_bits, options.act_mode == "static")
    return found


def detach(model: nn.Module) -> None:
    """Take the grids away from attention modules whose projections are dense again."""
    for module in list(model.modules()):
        if isinstance(module, attention.QuantizedAttention) and not _rounds(module._modules.get("query")):
            attention.revert(module)


def finish(unit: ModelUnit) -> dict[str, IntegerFormat]:
    """Fill the grids inside attention, and learn all grids if that is asked for.

    Args:
        unit: the model with its packed layers, and what it is calibrated on.

    Returns:
        Layers that have changed since they were packed, by name.
    """
    options: CondiQuantConfig = unit.options
    grids = attach(unit.model, options)
    _state_unknown(unit.model, options, grids)
    if grids and options.act_mode == "static":
        _fill(unit, grids)
    if options.refine == "none":
        return {}
    return distill(unit, grids)


def _rounds(layer: Any) -> bool:
    return isinstance(layer, PackedLinear) and getattr(layer.spec, "activation", "none") in RANGE_MODES


def _state_unknown(model: nn.Module, options: CondiQuantConfig, grids: dict[str, Any]) -> None:
    """Say which attention stays in full precision although it should not."""
    if not options.quantize_attention or options.act_mode == "none":
        return
    others = {
        name: module
        for name, module in model.named_modules()
        if name not in grids and attention.looks_like_attention(module)
        if any(_rounds(child) for child in module._modules.values())
    }
    partial = [name for name, module in others.items() if attention.is_known(module)]
    unknown = sorted({type(module).__name__ for name, module in others.items() if name not in partial})
    if partial:
        logger.warning(
            "%d attention modules have no grids, because not all of their queries, keys and values are quantized (%s)",
            len(partial),
            ", ".join(partial[:3]),
        )
    if unknown:
        logger.warning(
            "%d attention modules (%s) are of no known kind: their linear layers are quantized, what happens between "
            "queries, keys, values and soft-max stays in full precision; quantize_attention=False states that",
            len(others) - len(partial),
            ", ".join(unknown),
        )
    elif not grids and not partial:
        logger.warning("the model has no attention of a known kind; only linear layers are quantized")


@dataclasses.dataclass
class Watched:
    """Values of a tensor, gathered over batches.

    Attributes:
        kept: samples, one for each batch.
        low: least value.
        high: largest value.
    """

    kept: list[Tensor] = dataclasses.field(default_factory=list)
    low: float = float("inf")
    high: float = float("-inf")

    def add(self, values: Tensor, most: int) -> None:
        """Add the values of a batch, of which at most so many are kept."""
        self.kept.append(sample(values, most).cpu())
        self.low, self.high = min(self.low, float(values.min())), max(self.high, float(values.max()))


def _fill(unit: ModelUnit, grids: dict[str, attention.AttentionGrids]) -> None:
    """Search the grids of attention modules, on what they see while nothing is rounded but weights."""
    options: CondiQuantConfig = unit.options
    most = -(-MOST_VALUES // len(unit.batches))
    seen: dict[tuple[str, str], Watched] = {}

    def watch(name: str) -> Any:
        return lambda part, values: seen.setdefault((name, part), Watched()).add(values, most)

    with unrounded(unit.model):
        for name, one in grids.items():
            one.watch = watch(name)
        for batch in unit.batches:
            unit.run(unit.model, batch)
        for one in grids.values():
            one.watch = None
    for (name, part), watched in seen.items():
        bounds = grids[name].bounds
        if bounds is None:
            raise AssertionError("stored grids have bounds")
        found = bounds_of(torch.cat(watched.kept), options.act_bits, options, (watched.low, watched.high))
        bounds.data[attention.PARTS.index(part)] = found.to(bounds.device)


@contextmanager
def unrounded(model: nn.Module) -> Iterator[None]:
    """Switch off all rounding of activations within a ``with`` statement."""
    layers: list[Any] = [module for module in model.modules() if _rounds(module)]
    grids = [grids for _, grids in attention.converted(model)]
    before = [layer.act_bits for layer in layers]
    try:
        for layer in layers:
            layer.act_bits = UNROUNDED
        for one in grids:
            one.off = True
        yield
    finally:
        for layer, bits in zip(layers, before, strict=True):
            layer.act_bits = bits
        for one in grids:
            one.off = False
