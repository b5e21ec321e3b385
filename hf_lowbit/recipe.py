"""Recipes: different methods for different modules of one model.

>>> LowBitRecipe({"*.mlp.down_proj": ARBConfig(variant="x"), "*": ARBConfig()}, skip=["lm_head"])  # doctest: +SKIP

Patterns are tried in the order given and the first match wins. Every config can be asked for its ``rules()``, so the
rest of the package handles a single method as a recipe of one rule.

A rule may hold a list of configs, of which a run with a budget chooses one for each layer; see
:mod:`hf_lowbit.budget`.

A run refuses a pattern that matches no layer, or only layers that earlier rules have, unless ``optional`` names it:
either is a slip that would silently compress something else than was written down.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from typing import Any, ClassVar

from hf_lowbit.budget import candidate_problems, target_problems
from hf_lowbit.config import LowBitConfig, shown

Rules = tuple[tuple[str, LowBitConfig], ...]


def matches(pattern: str, name: str) -> bool:
    """Return whether a pattern covers a module.

    A pattern is a dotted name or a glob (``*`` crosses dots). It covers the module of that name, also when the name
    ends in it at a dot ("lm_head" covers "model.lm_head"), and everything below that module. Several patterns may
    stand in one, with ``|`` between them.
    """
    names, globs = _alternatives(pattern)
    parts = name.split(".")
    if any(".".join(parts[start:end]) in names for end in range(1, len(parts) + 1) for start in range(end)):
        return True
    ancestors = [".".join(parts[: end + 1]) for end in range(len(parts))] if globs else []
    return any(fnmatchcase(path, one) or fnmatchcase(path, f"*.{one}") for one in globs for path in ancestors)


@functools.lru_cache(maxsize=1024)
def _alternatives(pattern: str) -> tuple[frozenset[str], tuple[str, ...]]:
    """Return the plain names and the globs of a pattern: what a budget has chosen may list thousands of names."""
    parts = pattern.split("|")
    globs = tuple(part for part in parts if any(sign in part for sign in "*?["))
    return frozenset(parts) - set(globs), globs


def rules_of(config: LowBitConfig) -> Rules:
    """Return the rules of a config: its own, or for a single method one rule that covers everything.

    A rule with candidates is there once for each of them.
    """
    if not isinstance(config, LowBitRecipe):
        return (("*", config),)
    each = ((pattern, own if isinstance(own, tuple) else (own,)) for pattern, own in config.rules)
    return tuple((pattern, one) for pattern, candidates in each for one in candidates)


def with_each(recipe: LowBitRecipe, change: Callable[[Any], Any]) -> tuple[Any, ...]:
    """Return the rules of a recipe with every config, candidates too, replaced by what a function makes of it."""
    return tuple(
        (pattern, tuple(map(change, own)) if isinstance(own, tuple) else change(own)) for pattern, own in recipe.rules
    )


def optional_patterns(config: LowBitConfig) -> tuple[str, ...]:
    """Return the patterns of a config that may match nothing."""
    return config.optional if isinstance(config, LowBitRecipe) else ()


@dataclasses.dataclass(kw_only=True)
class LowBitRecipe(LowBitConfig):
    """Maps module patterns to method configs; first match wins.

    Attributes:
        rules: a mapping, or pairs, of pattern and config, or of pattern and a list of configs to choose from. Configs
            in a recipe have no ``skip`` of their own.
        optional: patterns of rules or of ``skip`` that may match nothing, so that one recipe serves several models.
        cache: of a transformer of diffusers, the config of what skips steps while it samples (``QuantCacheConfig``).
            It is stored with the weights and enabled when they are loaded; ``disable_cache()`` takes it away. The
            cache of keys and values of a language model is a rule (``ReCalKVConfig``).
        target_bits_per_weight: most bits that are stored for a weight of the layers that are compressed, all counted.
        target_bytes: most bytes of the weight files, with what stays dense; instead of the former.
        plan: filled by a run that has chosen: for each kind of layer and choice how many, bytes, predicted error.
    """

    method: ClassVar[str] = "recipe"

    rules: Any = dataclasses.field(default=(), kw_only=False)
    optional: tuple[str, ...] = ()
    cache: LowBitConfig | None = None
    target_bits_per_weight: float | None = None
    target_bytes: int | None = None
    plan: tuple[Mapping[str, Any], ...] | None = None

    def __post_init__(self) -> None:
        if isinstance(self.rules, Mapping):
            self.rules = tuple(self.rules.items())
        elif isinstance(self.rules, list):
            self.rules = tuple(tuple(pair) if isinstance(pair, list) else pair for pair in self.rules)
        if isinstance(self.optional, (list, str)):
            self.optional = (self.optional,) if isinstance(self.optional, str) else tuple(self.optional)
        if isinstance(self.rules, tuple):
            self.rules = _each_its_own(self.rules)
        if isinstance(self.plan, list):
            self.plan = tuple(self.plan)
        super().__post_init__()

    @property
    def needs(self) -> str:
        """Data that a run with these options needs: that of the first rule which needs any."""
        return next((config.needs for _, config in rules_of(self) if config.needs != "none"), "none")

    @property
    def is_open(self) -> bool:
        """Whether a run has to choose among candidates."""
        return any(isinstance(own, tuple) for _, own in self.rules)

    def problems(self) -> list[str]:
        """Return what is wrong with the values, empty if nothing is."""
        found = super().problems()
        if not self.rules:
            found.append("a recipe needs at least one rule")
        seen = set()
        for number, pair in enumerate(self.rules):
            if not isinstance(pair, tuple) or len(pair) != 2 or not isinstance(pair[0], str) or not pair[0]:
                found.append(f"rule {number} must be a pair of a non-empty pattern and a config")
                continue
            pattern, config = pair
            if isinstance(config, tuple):
                found += candidate_problems(pattern, config)
            elif not isinstance(config, LowBitConfig) or isinstance(config, LowBitRecipe):
                found.append(f"rule {shown(pattern)} must hold the config of a method, got {type(config).__name__}")
            elif config.skip or config.modules is not None or config.left_dense is not None:
                found.append(f"rule {shown(pattern)}: put skip on the recipe, not on a rule")
            if pattern in seen:
                found.append(f"rule {shown(pattern)} is given twice")
            seen.add(pattern)
        choosing = not found and self.is_open
        if not found or not isinstance(self.rules, tuple):
            found += target_problems(self.target_bits_per_weight, self.target_bytes, choosing, self.plan)
        if self.cache is not None and not _compresses_steps(self.cache):
            found.append(f"cache must be the config of a method for pipelines, got {type(self.cache).__name__}")
        if not isinstance(self.optional, tuple):
            found.append(f"optional must be a list of patterns, got {shown(self.optional)}")
        else:
            known = seen | set(self.skip if isinstance(self.skip, tuple) else ())
            strange = [shown(name) for name in self.optional if not isinstance(name, str) or name not in known]
            found += [f"optional: {', '.join(strange)} is the pattern of no rule and of no skip"] if strange else []
        return found

    def _values(self) -> dict[str, Any]:
        values = super()._values()
        values["rules"] = [
            {"pattern": pattern, "candidates": [one.to_dict() for one in own]}
            if isinstance(own, tuple)
            else {"pattern": pattern, "config": own.to_dict()}
            for pattern, own in self.rules
        ]
        targets = {"target_bits_per_weight": self.target_bits_per_weight, "target_bytes": self.target_bytes}
        values |= {name: value for name, value in targets.items() if value is not None}
        if self.plan is not None:
            values["plan"] = [dict(row) for row in self.plan]
        if self.optional:
            values["optional"] = list(self.optional)
        if self.cache is not None:
            values["cache"] = self.cache.to_dict()
        return values

    @classmethod
    def _from_values(cls, values: dict[str, Any]) -> LowBitRecipe:
        rules, cache = values.pop("rules", []), values.get("cache")
        if cache is not None:
            # before it is read, as below
            if not isinstance(cache, Mapping) or cache.get("method") == cls.method:
                raise ValueError("LowBitRecipe: cache must be the config of a method for pipelines")
            values = {**values, "cache": LowBitConfig.from_dict(cache)}
        if not isinstance(rules, list) or not all(_is_stored_rule(rule) for rule in rules):
            raise ValueError(
                'LowBitRecipe: rules must be a list of {"pattern": ..., "config": ...}, or of {"pattern": ..., '
                '"candidates": [...]}'
            )
        pairs = []
        for rule in rules:
            held = [rule["config"]] if "config" in rule else rule["candidates"]
            # before it is read: a recipe inside a recipe could go on for ever
            if any(isinstance(one, Mapping) and one.get("method") == cls.method for one in held):
                raise ValueError(
                    f"LowBitRecipe: rule {shown(rule['pattern'])} must hold the config of a method, got a recipe"
                )
            configs = tuple(LowBitConfig.from_dict(one) for one in held)
            pairs.append((rule["pattern"], configs[0] if "config" in rule else configs))
        return cls(rules=tuple(pairs), **values)


def _is_stored_rule(rule: Any) -> bool:
    keys = set(rule) if isinstance(rule, Mapping) else set()
    return keys == {"pattern", "config"} or (
        keys == {"pattern", "candidates"} and isinstance(rule["candidates"], list) and len(rule["candidates"]) < 1000
    )


def _compresses_steps(config: Any) -> bool:
    """Whether it is the config of a method of unit "pipeline", which compresses no weights."""
    from hf_lowbit import registry

    known = registry.methods().get(getattr(config, "method", ""))
    return isinstance(config, LowBitConfig) and known is not None and known.unit == "pipeline"


def _each_its_own(rules: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return rules of which no two share a config object: a run tells rules apart by it, and plans for each alone."""
    seen: set[int] = set()

    def own(config: Any) -> Any:
        if isinstance(config, (list, tuple)):
            return tuple(map(own, config))
        if not isinstance(config, LowBitConfig):
            return config
        found = copy.copy(config) if id(config) in seen else config
        seen.add(id(config))
        return found

    return tuple((pair[0], own(pair[1])) if isinstance(pair, tuple) and len(pair) == 2 else pair for pair in rules)
