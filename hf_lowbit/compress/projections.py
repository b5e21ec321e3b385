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
from hf_lowbit.recipe import matches, optional_patterns, rules_of

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


def covering(model: nn.Module, config: LowBitConfig, name: str) -> tuple[str | None, LowBitConfig | None, bool]:
    """Return the first rule that covers a layer with its pattern, and whether a rule that matches passed it over.

    A rule of unit "attention" covers key and value projections alone, so that another rule may have the layers beside
    them.
    """
    passed = False
    for pattern, rule in rules_of(config):
        if matches(pattern, name):
            if takes(model, rule, name):
                return pattern, rule, passed
            passed = True
    return None, None, passed


def takes(model: nn.Module, rule: LowBitConfig, name: str) -> bool:
    """Return whether a rule covers a layer that its pattern matches."""
    return not is_for_attention(rule) or projection_of(model, name) is not None


def check_projections(model: nn.Module, config: LowBitConfig, methods: dict[str, LowBitConfig], stacks: int) -> None:
    """Refuse a run in which a rule of unit "attention" cannot do its work, before that work.

    Args:
        model: the model.
        config: a method's config or a recipe.
        methods: config of the method for each layer that is compressed.
        stacks: how many stacks of blocks text runs through; 0 in a run without data, which does not look.

    Raises:
        UnsupportedModelError: no attention is found, or the model is an encoder and a decoder.
        ValueError: keys and values of an attention are not of one rule, or the method refuses sizes; everything is
            named.
    """
    for pattern, rule in rules_of(config):
        if not is_for_attention(rule):
            continue
        own = [name for name, method in methods.items() if method is rule]
        if not own and pattern in optional_patterns(config):
            continue
        if not own:
            raise UnsupportedModelError(
                f"rule {pattern!r} ({rule.method}): {type(model).__name__} has no attention there with a k_proj, a "
                "v_proj and a head_dim; fused or shared keys and values are not supported"
            )
        if stacks > 1 or bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False)):
            raise UnsupportedModelError(
                f"{type(model).__name__} is an encoder and a decoder; {rule.method} is for decoders alone"
            )
        problems = _halves(model, config, own, methods)
        check = registry.get(rule.method).check
        found = [projection for name in own if (projection := projection_of(model, name)) is not None]
        problems += check(found, rule) if check is not None else []
        if problems:
            more = f"; {len(problems) - 10} more" if len(problems) > 10 else ""
            raise ValueError("; ".join(problems[:10]) + more)


def _halves(model: nn.Module, config: LowBitConfig, names: list[str], methods: dict[str, LowBitConfig]) -> list[str]:
    """Return what is wrong where keys and values of one attention are not compressed by the same rule.

    A cache layer keeps latents of both or of none, with ranks under the one budget of their rule.
    """
    known = set(names)
    problems: dict[str, list[str]] = {}  # what is wrong, and with which attention modules
    for name in names:
        owner, _, leaf = name.rpartition(".")
        other = next(part for part in PARTS if part != leaf)
        twin = f"{owner}.{other}"
        if twin in methods and twin not in known:
            mine, its = covering(model, config, name)[0], covering(model, config, twin)[0]
            problem = (
                f"{leaf} belongs to rule {mine!r} and {other} to rule {its!r} ({methods[twin].method}); keys and "
                "values of an attention share a cache, so one rule must have both"
            )
            problems.setdefault(problem, []).append(owner)
        elif twin not in methods:
            problems[f"stays dense while {leaf} is compressed; skip {owner} as a whole"] = [twin]
    more = {problem: f" and {len(where) - 1} more" if len(where) > 1 else "" for problem, where in problems.items()}
    return [f"{where[0]}{more[problem]}: {problem}" for problem, where in problems.items()]
