"""Which modules are compressed, by which method, and why the others stay dense. Decided before any work starts."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterator
from typing import Any

from torch import nn

from hf_lowbit import registry
from hf_lowbit.calibration import capture
from hf_lowbit.compress.projections import NOT_CACHED, check_projections, covering, takes
from hf_lowbit.config import LowBitConfig
from hf_lowbit.errors import UnsupportedModelError
from hf_lowbit.experts import expert_names, fused_parameters, is_supported
from hf_lowbit.image_config import ImageConfig
from hf_lowbit.layers import DENSE_TYPES, features
from hf_lowbit.recipe import matches, optional_patterns, rules_of

OUTPUT_HEAD, TIED, FP32 = "output head", "tied weight", "kept in float32 by the model"
CONVOLUTION = "convolution"
NOT_TEXT, ROUTER = "not part of the text model", "router of experts"

Stacks = list[dict[str, nn.Module]]


@dataclasses.dataclass(frozen=True)
class Targets:
    """Outcome of the selection.

    Attributes:
        methods: config of the method for each module that is compressed, in model order.
        dense: reason for each linear-like layer that is not.
        unwanted: those of ``dense`` that nobody asked to leave dense; the user is warned of them.
    """

    methods: dict[str, LowBitConfig]
    dense: dict[str, str]
    unwanted: dict[str, str]


def plan_run(model: nn.Module, config: LowBitConfig, calibrated: bool) -> tuple[Stacks, Targets]:
    """Return the stacks of blocks (none for a run without data) and what is compressed.

    Raises:
        UnsupportedModelError: nothing can be compressed, or a calibrated run does not find the blocks.
        ValueError: a skip pattern or a rule matches no module, or a method is one of training.
    """
    trained = [rule.method for _, rule in rules_of(config) if registry.get(rule.method).needs == "training"]
    if trained:
        raise ValueError(
            f"{trained[0]} makes convolutions binary by training, not in a compression run; use "
            "hf_lowbit.binarize_convs(model, config), train, then hf_lowbit.pack_convs(model)"
        )
    targets = select(model, config, None)
    stacks = capture.find_stacks(model) if calibrated else []
    if calibrated:
        targets = select(model, config, [name for stack in stacks for name in stack])
    check_projections(model, config, targets.methods, len(stacks))
    return stacks, targets


def default_skips(model: nn.Module) -> dict[str, str]:
    """Return names that stay dense unless nothing speaks against them, with the reason: head, tied weights."""
    found: dict[str, str] = {}
    find_head: Any = getattr(model, "get_output_embeddings", None)
    head = None if find_head is None else find_head()
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    tied_modules = {key.rpartition(".")[0] for pair in dict(tied).items() for key in pair}
    for name, module in model.named_modules():
        if name in tied_modules:
            found[name] = TIED
        if head is not None and module is head:
            found[name] = OUTPUT_HEAD
    return found


def select(model: nn.Module, config: LowBitConfig, blocks: list[str] | None) -> Targets:
    """Decide for every linear layer of a model.

    Args:
        model: the model; weights are not looked at, ``meta`` will do.
        config: a method's config or a recipe.
        blocks: names of the decoder blocks for a calibrated run, which can only compress what lies inside; None for a
            run without data.

    Raises:
        UnsupportedModelError: nothing is left to compress.
        ValueError: a skip pattern or a rule matches no module, earlier rules have all that a rule matches, or a rule
            is of a method that compresses no weights.
    """
    for _, own in rules_of(config):
        if registry.get(own.method).unit == "pipeline":
            kind = type(own).__name__
            raise ValueError(
                f"{kind} compresses no weights; on a transformer of diffusers, call transformer.enable_cache({kind}())"
            )
    skips = default_skips(model)
    fp32 = sorted(getattr(model, "_keep_in_fp32_modules", None) or ())
    methods: dict[str, LowBitConfig] = {}
    dense: dict[str, str] = {}
    unwanted: dict[str, str] = {}
    roots = capture.text_roots(model) if capture.other_towers(model) else [""]
    modules = dict(model.named_modules())
    first: dict[str, str | None] = {}  # pattern of the rule that covers a layer
    for name, reason in _units(model):
        pattern = next((p for p in config.skip if matches(p, name)), None)
        first[name], rule, passed = covering(model, config, name)
        if name in skips:
            dense[name] = skips[name]
        elif reason == ROUTER:
            dense[name] = reason
        elif pattern is not None:
            dense[name] = f"skip pattern {pattern!r}"
        elif any(part in fp32 for part in name.split(".")):
            dense[name] = FP32
        elif rule is None:
            dense[name] = NOT_CACHED if passed else "no rule of the recipe matches"
        elif not any(root == "" or name.startswith(f"{root}.") for root in roots):
            dense[name] = NOT_TEXT
        elif reason and isinstance(rule, ImageConfig) and reason.startswith("layers of type Conv"):
            dense[name] = CONVOLUTION
        elif reason:
            dense[name] = unwanted[name] = reason
        elif blocks is not None and not any(name.startswith(f"{block}.") for block in blocks):
            dense[name] = unwanted[name] = "outside the decoder blocks"
        elif (misfit := _misfit(name, modules.get(name), rule)) is not None:
            dense[name] = unwanted[name] = misfit
        else:
            methods[name] = rule
    _refuse_idle_patterns(model, config, [*methods, *dense])
    _refuse_shadowed_rules(model, config, first)
    if not methods and NOT_CACHED in dense.values():
        return Targets({}, dense, unwanted)  # check_projections says what is missing
    if not methods:
        listed = "; ".join(f"{name}: {reason}" for name, reason in list(dense.items())[:5])
        raise UnsupportedModelError(f"nothing to compress in {type(model).__name__} ({listed or 'no linear layers'})")
    return Targets(methods, dense, unwanted)


def _misfit(name: str, module: nn.Module | None, rule: LowBitConfig) -> str | None:
    """Return why the method of a layer cannot take it, None if it can; experts in one parameter are no modules."""
    cannot_take = registry.get(rule.method).cannot_take
    return None if cannot_take is None or module is None else cannot_take(name, features(module), rule)


def _units(model: nn.Module) -> Iterator[tuple[str, str]]:
    """Yield every linear-like layer with "" if it can be compressed, else the reason why not.

    Experts that transformers keeps in one parameter are listed one by one, under the names they will have.
    """
    for name, module in model.named_modules():
        if type(module) in DENSE_TYPES:
            yield name, ""
            continue
        fused = {} if isinstance(module, nn.Conv1d) else fused_parameters(module)
        if not is_supported(module):  # a table of positions or shifts has one "expert", and is no layer
            fused = {leaf: part for leaf, part in fused.items() if len(part) > 1 and part[0].numel() > 1}
        if fused and is_supported(module):
            for parameter, weights in fused.items():
                yield from ((expert, "") for expert in expert_names(name, parameter, len(weights)))
        elif fused:
            yield name, f"fused weights of {type(module).__name__} are not supported"
        elif not isinstance(module, nn.Embedding):
            weight: Any = dict(module.named_parameters(recurse=False)).get("weight")
            kind = type(module).__name__
            if weight is not None and weight.dim() >= 2:
                # a router is small and decides which experts run at all
                yield name, ROUTER if kind.endswith("Router") else f"layers of type {kind} are not supported"


def _refuse_idle_patterns(model: nn.Module, config: LowBitConfig, layers: list[str]) -> None:
    """A pattern that matches nothing is a spelling mistake that would silently change what is compressed.

    A rule must match a linear-like layer; a skip may also name an embedding or a norm, which stay dense anyway.
    """
    names = [*(name for name, _ in model.named_modules() if name), *layers]
    patterns = [("skip", p, names) for p in config.skip]
    patterns += [("rule", p, layers) for p, _ in rules_of(config)] if layers else []
    may_idle = optional_patterns(config)
    idle = [
        f"{kind} {pattern!r}{_close_names(pattern, among)}"
        for kind, pattern, among in patterns
        if pattern not in may_idle and not any(matches(pattern, n) for n in among)
    ]
    if idle:
        raise ValueError(f"{', '.join(idle)}: no module of {type(model).__name__} matches")


def _close_names(pattern: str, names: list[str]) -> str:
    """Return " (close: ...)" with parts of names, as long as a misspelt pattern, that it may mean; "" without any."""
    wanted = [part for part in pattern.split(".") if part != "*"]
    paths = [name.split(".") for name in names]
    windows = {".".join(path[i : i + len(wanted)]) for path in paths for i in range(len(path) - len(wanted) + 1)}
    close = difflib.get_close_matches(".".join(wanted), sorted(windows), n=3, cutoff=0.65)
    return f" (close: {', '.join(close)})" if close else ""


def _refuse_shadowed_rules(model: nn.Module, config: LowBitConfig, first: dict[str, str | None]) -> None:
    """A rule that comes too late to get a single layer is a mistake of order: what it says would count for nothing.

    Args:
        model: the model.
        config: a method's config or a recipe.
        first: for each layer the pattern of the rule that covers it.

    Raises:
        ValueError: names such rules with those that have their layers.
    """
    had = set(first.values())
    problems = []
    for pattern, rule in rules_of(config):
        if pattern in had or pattern in optional_patterns(config):
            continue
        mine = [name for name in first if matches(pattern, name) and takes(model, rule, name)]
        takers = dict.fromkeys(other for name in mine if (other := first[name]))
        if takers:
            problems.append(f"rule {pattern!r} comes after {', '.join(map(repr, takers))}")
    if problems:
        raise ValueError(
            f"{'; '.join(problems)}: the first rule that matches a layer has it, and nothing is left; put the rule "
            "before them, or take it out"
        )
