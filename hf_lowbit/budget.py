"""What a recipe says of a budget: how large a model may become, and what a run chose for that.

A rule of a recipe may hold several configs, its *candidates*; a run with a budget chooses one of them for each layer
that the rule covers, so that the errors measured layer by layer add up to as little as the budget allows.

>>> two_or_four = [DVDQuantConfig(w_bits=2), DVDQuantConfig(w_bits=4)]  # doctest: +SKIP
>>> LowBitRecipe({"*": two_or_four}, target_bits_per_weight=3)  # doctest: +SKIP

``target_bits_per_weight`` is about the layers that the recipe covers: all bytes stored for them (codes, scales,
bitmaps, factors, padding) by their weights, the "bits per weight" of ``hf-lowbit inspect``. ``target_bytes`` is about
the weight files: those layers, everything that stays dense, and the files' headers. Either is never exceeded.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from hf_lowbit.config import CalibratedConfig, LowBitConfig, is_finite, is_text, shown

# What a run that chose among candidates leaves in the config: a row for each kind of layer and choice.
_ROW = {
    "layers": str,  # last part of their names
    "number": int,
    "method": str,
    "settings": str,
    "weights": int,
    "bytes": int,  # the most that they can take
    "error": float,  # predicted, see compress.budget
}
_MOST_ROWS = 10_000
_MOST_BYTES = 2**60
# Fields of a config that say what data it is calibrated on, or what a run has filled in.
_NO_SETTINGS = {"calibration", "samples", "sequence_length", "seed", "layers", "skip", "modules", "left_dense", "run"}


def default_candidates(calibration: Any = None, **data: Any) -> list[LowBitConfig]:
    """Return what a budget chooses from where nobody says: integers of 2 to 8 bits, with groups of several sizes.

    Args:
        calibration: as for any method; None for a run without data.
        data: ``samples``, ``sequence_length`` and ``seed`` of it.
    """
    from hf_lowbit import registry

    integers: Any = registry.config_class("dvd_quant")
    # each costs about a run; more would lie between these
    pairs = ((2, -1), (2, 64), (2, 32), (3, 64), (3, 32), (4, 64), (4, 32), (8, 128))
    found = [integers(w_bits=bits, group_size=group, preset="weights") for bits, group in pairs]
    if calibration is not None:
        found = [dataclasses.replace(one, calibration=calibration, **data) for one in found]
    return list(found)


def settings_text(config: LowBitConfig, beside: Sequence[LowBitConfig] = ()) -> str:
    """Return the options of a config as one would type them.

    Args:
        config: of a method.
        beside: other candidates; of those of the same method the options in which they differ are shown, and without
            any the options that are not the defaults.
    """
    alike = [one for one in beside if type(one) is type(config) and one is not config]
    fields = {field.name: field.default for field in dataclasses.fields(config) if field.name not in _NO_SETTINGS}
    if alike:
        shown_too = [name for name in fields if any(getattr(one, name) != getattr(config, name) for one in alike)]
    else:
        shown_too = [name for name, default in fields.items() if getattr(config, name) != default]
    return ", ".join(f"{name}={_short(getattr(config, name))}" for name in shown_too) or "defaults"


def _short(value: Any) -> str:
    return f"{type(value).__name__}({settings_text(value)})" if isinstance(value, LowBitConfig) else str(value)


def candidate_problems(pattern: str, candidates: Sequence[Any]) -> list[str]:
    """Return what is wrong with the candidates of a rule."""
    from hf_lowbit import registry

    where, found = f"rule {shown(pattern)}", []
    if len(candidates) < 2:
        found.append(f"{where}: a list must hold two configs or more to choose from, got {len(candidates)}")
    for config in candidates:
        if not isinstance(config, LowBitConfig) or config.method not in registry.methods():
            found.append(f"{where}: candidates must be configs of methods, got {type(config).__name__}")
        elif registry.get(config.method).largest is None:
            found.append(f"{where}: a budget cannot choose {config.method}, whose size is not known from a shape")
        elif config.skip or config.modules is not None or config.left_dense is not None:
            found.append(f"{where}: put skip on the recipe, not on a candidate")
        elif getattr(config, "layers", None) and isinstance(config.layers, Mapping):  # type: ignore[attr-defined]
            found.append(f"{where}: a candidate has no layers of its own, the budget decides for each layer")
    if not found and len({repr(one.to_dict()) for one in candidates}) < len(candidates):
        found.append(f"{where}: a candidate is given twice")
    return found


def target_problems(bits: Any, size: Any, choosing: bool, plan: Any) -> list[str]:
    """Return what is wrong with the budget of a recipe.

    Args:
        bits: ``target_bits_per_weight``.
        size: ``target_bytes``.
        choosing: whether any rule has candidates.
        plan: what a run has chosen.
    """
    found = []
    if bits is not None and not (type(bits) in (int, float) and 0 < bits <= 64):
        found.append(f"target_bits_per_weight must be a number above 0 and at most 64, got {shown(bits)}")
    if size is not None and not (type(size) is int and 0 < size <= _MOST_BYTES):
        found.append(f"target_bytes must be a whole number of at least 1, got {shown(size)}")
    if bits is not None and size is not None:
        found.append("give either target_bits_per_weight or target_bytes")
    if choosing and bits is None and size is None:
        found.append("a rule with several configs needs target_bits_per_weight or target_bytes, to choose by")
    if not choosing and plan is None and (bits is not None or size is not None):
        found.append("a target needs a rule with several configs to choose from, such as {'*': [one, other]}")
    return found + ([] if plan is None else _plan_problems(plan))


def _plan_problems(plan: Any) -> list[str]:
    """A plan may come from somebody's file, and is shown: only what this package writes is taken."""
    if not isinstance(plan, tuple) or len(plan) > _MOST_ROWS:
        return [f"plan must be a list of at most {_MOST_ROWS} rows, got {type(plan).__name__}"]
    found = []
    for number, row in enumerate(plan):
        if not isinstance(row, Mapping) or set(row) != set(_ROW):
            found.append(f"plan[{number}] must have {', '.join(_ROW)}")
            continue
        for key, kind in _ROW.items():
            value = row[key]
            sound = is_text(value) if kind is str else type(value) in (int, kind) and is_finite(value) and value >= 0
            found += [] if sound else [f"plan[{number}].{key} must be of type {kind.__name__}, got {shown(value)}"]
    return found


def is_calibrated(config: LowBitConfig) -> bool:
    """Return whether a candidate looks at data."""
    return isinstance(config, CalibratedConfig) and config.needs != "none"
