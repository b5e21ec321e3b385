"""Key and value projections of a model, found by its structure: what methods of unit "attention" compress.

An attention is a module that holds ``k_proj`` and ``v_proj``, two linear layers, and says how wide a head is
(``head_dim``). Where keys and values come from one fused layer, or from a latent of the model's own, there is nothing
that a cache of latents could replace, and the run is refused.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from hf_lowbit import registry
from hf_lowbit.config import LowBitConfig
from hf_lowbit.errors import UnsupportedModelError
from hf_lowbit.layers import DENSE_TYPES, features
from hf_lowbit.recipe import matches, rules_of

PARTS = {"k_proj": "key", "v_proj": "value"}
NOT_CACHED = "not a key or value projection"


def projection_of(model: nn.Module, name: str) -> registry.Projection | None:
    """Return what a linear layer is in its attention, None if it is no key or value projection.

    Args:
        model: the model; weights are not looked at, ``meta`` will do.
        name: of a layer in it.
    """
    owner, _, leaf = name.rpartition(".")
    if leaf not in PARTS:
        return None
    attention: Any = model.get_submodule(owner)
    width = getattr(attention, "head_dim", None)
    pair = [getattr(attention, part, None) for part in PARTS]
    if type(width) is not int or width < 1 or not all(isinstance(layer, DENSE_TYPES) for layer in pair):
        return None
    rows, columns = features(getattr(attention, leaf))
    return None if rows % width else registry.Projection(name, PARTS[leaf], rows // width, (rows, columns))


def is_for_attention(rule: LowBitConfig) -> bool:
    """Return whether a rule's method compresses key and value projections, and nothing else."""
    return registry.get(rule.method).unit == "attention"


def rule_for(model: nn.Module, config: LowBitConfig, name: str) -> tuple[LowBitConfig | None, bool]:
    """Return the first rule that covers a layer, and whether a rule that matches its name passed it over.

    A rule of unit "attention" covers key and value projections alone, so that another rule may have the layers beside
    them.
    """
    passed = False
    for pattern, rule in rules_of(config):
        if matches(pattern, name):
            if not is_for_attention(rule) or projection_of(model, name) is not None:
                return rule, passed
            passed = True
    return None, passed


def check_projections(model: nn.Module, config: LowBitConfig, methods: dict[str, LowBitConfig], stacks: int) -> None:
    """Refuse a run in which a rule of unit "attention" cannot do its work, before that work.

    Args:
        model: the model.
        config: a method's config or a recipe.
        methods: config of the method for each layer that is compressed.
        stacks: how many stacks of blocks text runs through; 0 in a run without data, which does not look.

    Raises:
        UnsupportedModelError: no attention is found, or the model is an encoder and a decoder.
        ValueError: half an attention is left dense, or the method refuses sizes; everything is named.
    """
    for pattern, rule in rules_of(config):
        if not is_for_attention(rule):
            continue
        own = [name for name, method in methods.items() if method is rule]
        if not own:
            raise UnsupportedModelError(
                f"rule {pattern!r} ({rule.method}): {type(model).__name__} has no attention there with a k_proj, a "
                "v_proj and a head_dim; fused or shared keys and values are not supported"
            )
        if stacks > 1 or bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False)):
            raise UnsupportedModelError(
                f"{type(model).__name__} is an encoder and a decoder; {rule.method} is for decoders alone"
            )
        problems = _halves(own)
        check = registry.get(rule.method).check
        found = [projection for name in own if (projection := projection_of(model, name)) is not None]
        problems += check(found, rule) if check is not None else []
        if problems:
            more = f"; {len(problems) - 10} more" if len(problems) > 10 else ""
            raise ValueError("; ".join(problems[:10]) + more)


def _halves(names: list[str]) -> list[str]:
    """Return what is wrong where one of an attention's two projections is compressed and the other is not."""
    known = set(names)
    problems = []
    for name in names:
        owner, _, leaf = name.rpartition(".")
        twin = next(part for part in PARTS if part != leaf)
        if f"{owner}.{twin}" not in known:
            problems.append(f"{owner}.{twin}: stays dense while {leaf} is compressed; skip {owner} as a whole")
    return problems
