"""Convolutions of a whole model: which become binary, what goes with them, and back to stored form.

Only the structure of a model is looked at. Three patterns are known: Hugging Face's ``convolution, normalization,
activation`` in one module; ``conv1, bn1, act1`` (timm) or ``conv1, bn1, relu`` side by side in a block; and neighbours
in an ``nn.Sequential``. Normalization moves into the unit, the ReLU behind it goes, and so do those behind a block's
sum and behind the first convolution: what a ReLU leaves is never negative, and its sign would be constant. A
convolution in any other place becomes a unit without normalization.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Container, Iterator, Mapping
from typing import Any

from torch import nn

from hf_lowbit.kernels.geometry import ConvGeometry
from hf_lowbit.methods.bidrn.modules import BinaryUnit, binary_like
from hf_lowbit.methods.bidrn.options import BiDRNConfig, UnitOptions
from hf_lowbit.recipe import matches

RECTIFIERS = (
    "ReLU",
    "ReLU6",
    "LeakyReLU",
    "Hardswish",
    "SiLU",
    "SiLUActivation",
    "GELU",
    "GELUActivation",
    "ReLUActivation",
)
_PROJECTIONS = ("shortcut", "downsample")
STEM, HEAD, DEPTHWISE, PROJECTION = (
    "first convolution", "last layer", "depth-wise convolution", "projection around a block, kept in full precision",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Selection:
    """Which convolutions become binary.

    Attributes:
        binary: names, in model order.
        dense: reason by name of all other convolutions.
    """

    binary: tuple[str, ...]
    dense: dict[str, str]


@dataclasses.dataclass(frozen=True)
class _Place:
    """A convolution in its surroundings: names of what belongs to it."""

    norm: str | None
    acts: tuple[str, ...]


def _is_rectifier(module: Any) -> bool:
    return type(module).__name__ in RECTIFIERS


def _join(parent: str, leaf: str) -> str:
    return f"{parent}.{leaf}" if parent else leaf


def _place(model: nn.Module, name: str) -> _Place:
    """Find normalization and activations that belong to a convolution."""
    parent, _, leaf = name.rpartition(".")
    owner = model.get_submodule(parent)
    children = dict(owner.named_children())
    norm: str | None = None
    acts: list[str] = []
    if leaf == "convolution" and "normalization" in children:
        norm = _join(parent, "normalization")
        acts += [_join(parent, "activation")] if _is_rectifier(children.get("activation")) else []
        block, above = _block_of(model, parent)
        if above is not None and _is_rectifier(getattr(above, "activation", None)):
            acts.append(_join(block, "activation"))
    elif isinstance(owner, nn.Sequential):
        behind = list(children)[list(children).index(leaf) + 1 :][:2]
        if behind and isinstance(children[behind[0]], nn.BatchNorm2d):
            norm = _join(parent, behind.pop(0))
        acts += [_join(parent, behind[0])] if behind and _is_rectifier(children[behind[0]]) else []
    elif number := re.fullmatch(r"conv_?(\d*)", leaf):
        names = [f"{stem}{number[1]}" for stem in ("bn", "norm", "bn_", "norm_")]
        norm = next((_join(parent, n) for n in names if n in children), None)
        known = {f"act{number[1]}", f"relu{number[1]}", "relu", "act"}
        acts += [_join(parent, n) for n, child in children.items() if n in known and _is_rectifier(child)]
    if norm is not None and not isinstance(model.get_submodule(norm), (nn.BatchNorm2d, nn.Identity)):
        norm, acts = None, []  # a normalization that cannot be folded stays, and what follows it as well
    return _Place(norm, tuple(acts))


def _block_of(model: nn.Module, name: str) -> tuple[str, nn.Module | None]:
    """Return the module with a ``shortcut`` around the layer, if it lies in one."""
    parts = name.split(".")
    for end in range(len(parts) - 1, max(len(parts) - 4, -1), -1):
        block = ".".join(parts[:end])
        module = model.get_submodule(block)
        if hasattr(module, "shortcut") and hasattr(module, "activation"):
            inside = parts[end] if end < len(parts) else ""
            return (block, module) if inside == "layer" else ("", None)
    return "", None


def _skip_reason(model: nn.Module, name: str, conv: Any, config: BiDRNConfig) -> str | None:
    """Return why a convolution stays as it is, by what it is alone."""
    pattern = next((p for p in config.skip if matches(p, name)), None)
    if pattern is not None:
        return f"skip pattern {pattern!r}"
    if type(conv) not in (nn.Conv2d, nn.ConvTranspose2d):
        return f"layers of type {type(conv).__name__} are not supported"
    if conv.groups > 1 and conv.groups == conv.in_channels:
        return DEPTHWISE
    if conv.in_channels // conv.groups < config.min_channels:
        return f"reads {conv.in_channels // conv.groups} channels, fewer than min_channels={config.min_channels}"
    if config.block_residual == "fp" and set(name.split(".")) & set(_PROJECTIONS):
        return PROJECTION
    try:
        problems = ConvGeometry.of_module(conv).problems()
    except ValueError as error:
        return str(error)
    return "; ".join(problems) or None


def select(model: nn.Module, config: BiDRNConfig) -> Selection:
    """Decide for every convolution of a model; weights are not looked at, ``meta`` will do.

    Raises:
        ValueError: a skip pattern matches no module, nothing would become binary, a convolution is used under two
            names, or a block shares one ReLU between convolutions of which only some would become binary.
    """
    convs = {n: m for n, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d))}
    idle = [p for p in config.skip if not any(matches(p, name) for name, _ in model.named_modules() if name)]
    if idle:
        raise ValueError(f"skip {', '.join(map(repr, idle))}: no module of {type(model).__name__} matches")
    if any(isinstance(conv, BinaryUnit) for conv in convs.values()):
        raise ValueError(f"{type(model).__name__} has binary convolutions already")
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)) and name not in convs:
            first = next(n for n, conv in convs.items() if conv is module)
            raise ValueError(f"{first} and {name} are the same convolution, which cannot be replaced in one place")
    dense: dict[str, str] = {}
    names = list(convs)
    later = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    for name, conv in convs.items():
        reason = _skip_reason(model, name, conv, config)
        if reason is None and name == names[0]:
            reason = STEM
        if reason is None and name == names[-1] and not later and _place(model, name).norm is None:
            reason = HEAD
        if reason is not None:
            dense[name] = reason
    binary = tuple(name for name in names if name not in dense)
    if not binary:
        listed = "; ".join(f"{name}: {reason}" for name, reason in list(dense.items())[:5])
        raise ValueError(f"no convolution of {type(model).__name__} becomes binary ({listed or 'it has none'})")
    _refuse_shared(model, binary, dense)
    return Selection(binary, dense)


def _refuse_shared(model: nn.Module, binary: tuple[str, ...], dense: Mapping[str, str]) -> None:
    """Refuse what would take a ReLU away from a convolution that stays as it is."""
    gone = {act: name for name in binary for act in _place(model, name).acts}
    for name, reason in dense.items():
        if reason == PROJECTION or type(model.get_submodule(name)) not in (nn.Conv2d, nn.ConvTranspose2d):
            continue
        shared = [act for act in _place(model, name).acts if act in gone]
        if shared:
            raise ValueError(
                f"{shared[0]} belongs to {gone[shared[0]]}, which would become binary, and to {name}, which would not "
                f"({reason}); add the whole block to skip"
            )


def replace_conv(model: nn.Module, name: str, make: Callable[[Any, nn.Module | None], nn.Module]) -> nn.Module:
    """Put something else in the place of a convolution; what belongs to it goes.

    Args:
        model: changed in place.
        name: of the convolution, dense or a unit already.
        make: ``(convolution, its normalization or None) -> module``.

    Returns:
        The new module.
    """
    conv = model.get_submodule(name)
    if isinstance(conv, BinaryUnit):
        new = make(conv, conv.norm)
        model.set_submodule(name, new)
        return new
    place = _place(model, name)
    norm: Any = None if place.norm is None else model.get_submodule(place.norm)
    new = make(conv, None if isinstance(norm, nn.Identity) else norm)
    model.set_submodule(name, new)
    for gone in (*([place.norm] if place.norm else []), *place.acts):
        model.set_submodule(gone, nn.Identity())
    return new


def drop_stem_activation(model: nn.Module, binary: Container[str]) -> None:
    """Take away the ReLU behind the first convolution, which stays real: the first sign would be constant after it.

    Source: ReActNet's code, whose stem has none.
    """
    first = next((n for n, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d))), None)
    if first is None or first in binary or isinstance(model.get_submodule(first), BinaryUnit):
        return
    for act in _place(model, first).acts:
        model.set_submodule(act, nn.Identity())


def make_binary(model: nn.Module, names: tuple[str, ...], options: UnitOptions) -> dict[str, BinaryUnit]:
    """Replace convolutions by units that train; weights become latents, normalization moves into the unit."""
    drop_stem_activation(model, names)
    made: dict[str, Any] = {}
    for name in names:
        own = _unit(options, name)
        made[name] = replace_conv(model, name, functools.partial(binary_like, options=own))
    return made


def _unit(options: UnitOptions, name: str) -> UnitOptions:
    """A projection around a block is itself what goes around: no residual and no activation of its own."""
    if set(name.split(".")) & set(_PROJECTIONS):
        return dataclasses.replace(options, lcr=False, act="none")
    return options


def units(model: nn.Module) -> dict[str, BinaryUnit]:
    """Return the units in training form by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, BinaryUnit)}


def dense_convs(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield name and module of all convolutions that are not binary."""
    for name, module in model.named_modules():
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)) and not isinstance(module, BinaryUnit):
            yield name, module


def untrained(model: nn.Module) -> list[str]:
    """Return the units that have never run in training."""
    return [name for name, unit in units(model).items() if int(unit.trained_batches) == 0]
