"""Recipes: different methods for different modules of one model.

>>> LowBitRecipe({"*.mlp.down_proj": ARBConfig(variant="x"), "*": ARBConfig()}, skip=["lm_head"])  # doctest: +SKIP

Patterns are tried in the order given and the first match wins. Every config can be asked for its ``rules()``, so the
rest of the package handles a single method as a recipe of one rule.

A run refuses a pattern that matches no layer, or only layers that earlier rules have, unless ``optional`` names it:
either is a slip that would silently compress something else than was written down.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any, ClassVar

from hf_lowbit.config import LowBitConfig, shown

Rules = tuple[tuple[str, LowBitConfig], ...]


def matches(pattern: str, name: str) -> bool:
    """Return whether a pattern covers a module.

    A pattern is a dotted name or a glob (``*`` crosses dots). It covers the module of that name, also when the name
    ends in it at a dot ("lm_head" covers "model.lm_head"), and everything below that module.
    """
    parts = name.split(".")
    ancestors = [".".join(parts[: end + 1]) for end in range(len(parts))]
    return any(fnmatchcase(path, pattern) or fnmatchcase(path, f"*.{pattern}") for path in ancestors)


def rules_of(config: LowBitConfig) -> Rules:
    """Return the rules of a config: its own, or for a single method one rule that covers everything."""
    return config.rules if isinstance(config, LowBitRecipe) else (("*", config),)


def optional_patterns(config: LowBitConfig) -> tuple[str, ...]:
    """Return the patterns of a config that may match nothing."""
    return config.optional if isinstance(config, LowBitRecipe) else ()


@dataclasses.dataclass(kw_only=True)
class LowBitRecipe(LowBitConfig):
    """Maps module patterns to method configs; first match wins.

    Attributes:
        rules: a mapping, or pairs, of pattern and config. Configs in a recipe have no ``skip`` of their own.
        optional: patterns of rules or of ``skip`` that may match nothing, so that one recipe serves several models.
        cache: of a transformer of diffusers, the config of what skips steps while it samples (``QuantCacheConfig``).
            It is stored with the weights and enabled when they are loaded; ``disable_cache()`` takes it away. The
            cache of keys and values of a language model is a rule (``ReCalKVConfig``).
    """

    method: ClassVar[str] = "recipe"

    rules: Any = dataclasses.field(default=(), kw_only=False)
    optional: tuple[str, ...] = ()
    cache: LowBitConfig | None = None

    def __post_init__(self) -> None:
        if isinstance(self.rules, Mapping):
            self.rules = tuple(self.rules.items())
        elif isinstance(self.rules, list):
            self.rules = tuple(tuple(pair) if isinstance(pair, list) else pair for pair in self.rules)
        if isinstance(self.optional, (list, str)):
            self.optional = (self.optional,) if isinstance(self.optional, str) else tuple(self.optional)
        if isinstance(self.rules, tuple):
            self.rules = _each_its_own(self.rules)
        super().__post_init__()

    @property
    def needs(self) -> str:
        """Data that a run with these options needs: that of the first rule which needs any."""
        return next((config.needs for _, config in self.rules if config.needs != "none"), "none")

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
            if not isinstance(config, LowBitConfig) or isinstance(config, LowBitRecipe):
                found.append(f"rule {shown(pattern)} must hold the config of a method, got {type(config).__name__}")
            elif config.skip or config.modules is not None or config.left_dense is not None:
                found.append(f"rule {shown(pattern)}: put skip on the recipe, not on a rule")
            if pattern in seen:
                found.append(f"rule {shown(pattern)} is given twice")
            seen.add(pattern)
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
        values["rules"] = [{"pattern": pattern, "config": config.to_dict()} for pattern, config in self.rules]
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
        if not isinstance(rules, list) or not all(
            isinstance(rule, Mapping) and set(rule) == {"pattern", "config"} for rule in rules
        ):
            raise ValueError('LowBitRecipe: rules must be a list of {"pattern": ..., "config": ...}')
        for rule in rules:  # before it is read: a recipe inside a recipe could go on for ever
            if isinstance(rule["config"], Mapping) and rule["config"].get("method") == cls.method:
                raise ValueError(
                    f"LowBitRecipe: rule {shown(rule['pattern'])} must hold the config of a method, got a recipe"
                )
        pairs = tuple((rule["pattern"], LowBitConfig.from_dict(rule["config"])) for rule in rules)
        return cls(rules=pairs, **values)


def _compresses_steps(config: Any) -> bool:
    """Whether it is the config of a method of unit "pipeline", which compresses no weights."""
    from hf_lowbit import registry

    known = registry.methods().get(getattr(config, "method", ""))
    return isinstance(config, LowBitConfig) and known is not None and known.unit == "pipeline"


def _each_its_own(rules: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return rules of which no two share a config object: a run tells rules apart by it, and plans for each alone."""
    seen: set[int] = set()
    found = []
    for pair in rules:
        if isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[1], LowBitConfig):
            pair = (pair[0], copy.copy(pair[1]) if id(pair[1]) in seen else pair[1])
            seen.add(id(pair[1]))
        found.append(pair)
    return tuple(found)
