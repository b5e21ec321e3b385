"""Configs from what was typed: options as text, recipe files; and a look at the data before the long work."""

from __future__ import annotations

import dataclasses
import difflib
from pathlib import Path
from typing import Any

from hf_lowbit import registry
from hf_lowbit.budget import default_candidates
from hf_lowbit.calibration.data import load_texts
from hf_lowbit.calibration.images import load_images
from hf_lowbit.compress.agreement import check_calibration
from hf_lowbit.config import DATASETS, CalibrationRecord, LowBitConfig, RunOptions, parse_json
from hf_lowbit.image_config import WITH_DATA
from hf_lowbit.recipe import LowBitRecipe, with_each

TRUE, FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")


def config_of(
    method: str | None,
    options: list[str],
    recipe: Path | None,
    skip: list[str],
    fields: dict[str, Any],
    run: RunOptions,
    targets: dict[str, Any] | None = None,
) -> LowBitConfig:
    """Return the config of a run, from a method with options, a recipe file, or a budget alone.

    Args:
        method: name of a method.
        options: "name=value" each, of that method.
        recipe: file instead of it.
        skip: patterns to leave dense.
        fields: calibration and its sizes.
        run: how the run behaves.
        targets: ``target_bits_per_weight`` or ``target_bytes`` of a recipe; with neither method nor recipe the default
            candidates are chosen from.

    Raises:
        ValueError: what is wrong with the options, the file or the calibration data.
    """
    if targets and method is not None:
        raise ValueError(
            "a target chooses among configs, so leave --method out, or give candidates in --recipe FILE.json"
        )
    if (method is None) == (recipe is None) and not (targets and method is None):
        raise ValueError("give either --method NAME (see `hf-lowbit methods`) or --recipe FILE.json")
    if targets and recipe is None:
        if options:
            raise ValueError("--option belongs to --method")
        own = default_candidates(**{"calibration": None, **fields})
        config: LowBitConfig = LowBitRecipe(rules={"*": own}, **{**targets, "skip": tuple(skip), "run": run})
    elif recipe is not None:
        if options:
            raise ValueError("--option belongs to --method; write the options of a recipe into its file")
        config = dataclasses.replace(read_recipe(recipe, skip, fields, targets), run=run)
    else:
        config = build_config(str(method), options, {**fields, "skip": tuple(skip), "run": run})
    check_data(config)
    return config


def parse_option(text: str, default: Any) -> Any:
    """Turn the text of an option's value into the type of its default.

    Raises:
        ValueError: it is none of that type.
    """
    if isinstance(default, bool):
        if text.lower() not in (*TRUE, *FALSE):
            raise ValueError(f"must be true or false, got {text!r}")
        return text.lower() in TRUE
    if isinstance(default, (int, float)):
        try:
            return type(default)(text)
        except ValueError:
            kind = "an integer" if isinstance(default, int) else "a number"
            raise ValueError(f"must be {kind}, got {text!r}") from None
    return text


def parse_checked(text: str) -> Any:
    """Turn the text of an option that checks its own values into what JSON says it is, lists into tuples."""
    if text.lower() == "none":
        return None
    try:
        value = parse_json(text)
    except ValueError:
        return text
    return tuple(value) if isinstance(value, list) else value


def build_config(method: str, options: list[str], fields: dict[str, Any]) -> LowBitConfig:
    """Build the config of a method from what was typed.

    Args:
        method: name of the method.
        options: "name=value" each.
        fields: values that were given by a flag of their own.

    Raises:
        ValueError: all that is wrong, in one message.
    """
    config_class = registry.get(method).config
    known = config_class.options()
    accepted = {field.name for field in dataclasses.fields(config_class)}
    problems = [f"takes no {name}" for name in fields if name not in accepted]
    values = {name: value for name, value in fields.items() if name in accepted}
    for pair in options:
        name, equals, text = (part.strip() for part in pair.partition("="))
        if not equals or not text:
            problems.append(f"--option {pair!r} must be name=value")
        elif name == "preset" and config_class.presets and name not in values:
            values[name] = text
        elif name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            problems.append(f"unknown option {name!r}" + (f" (did you mean {close[0]!r}?)" if close else ""))
        elif name in values:
            problems.append(f"{name} is given twice")
        else:
            try:
                checked = known[name].metadata["option"]["check"] is not None
                values[name] = parse_checked(text) if checked else parse_option(text, known[name].default)
            except ValueError as error:
                problems.append(f"{name} {error}")
    try:
        config = config_class(**values)
    except ValueError as error:
        problems.append(str(error).removeprefix(f"{config_class.__name__}: "))
    if problems:
        raise ValueError(f"method {method!r}: {'; '.join(problems)}; see `hf-lowbit methods {method}`")
    return config


def read_recipe(
    file: Path, skip: list[str], fields: dict[str, Any], targets: dict[str, Any] | None = None
) -> LowBitConfig:
    """Read a config from a JSON file, either of a recipe or of one method.

    Args:
        file: what ``to_dict`` returned, or less: all that has a default may be left out.
        skip: further patterns.
        fields: calibration and its sizes, set in every rule that uses them.
        targets: a budget in place of that of the file.

    Raises:
        ValueError: not JSON, or not a config.
    """
    budgets = ("target_bits_per_weight", "target_bytes")
    try:
        content = parse_json(file.read_text(encoding="utf-8"))
        if not isinstance(content, dict) or "method" not in content:
            raise ValueError('must be an object with a "method"')
        if targets:
            content = {**{key: value for key, value in content.items() if key not in budgets}, **targets}
        config = LowBitConfig.from_dict(content)
    except (TypeError, ValueError) as error:
        raise ValueError(f"recipe {file.name}: {error}") from error

    def with_fields(rule: LowBitConfig) -> LowBitConfig:
        own = {name: value for name, value in fields.items() if name in {f.name for f in dataclasses.fields(rule)}}
        return dataclasses.replace(rule, **own) if isinstance(rule, WITH_DATA) else rule

    more: dict[str, Any] = {"skip": (*config.skip, *skip), "modules": None, "left_dense": None}  # of another run
    if isinstance(config, LowBitRecipe):
        more |= {"rules": with_each(config, with_fields), "plan": None}
        if not config.is_open:  # of a model that was chosen before: its rules are plain ones now
            if targets:
                raise ValueError(f"recipe {file.name}: no rule has several configs for a target to choose from")
            more |= dict.fromkeys(budgets)
        return dataclasses.replace(config, **more)
    return dataclasses.replace(with_fields(config), **more)


def check_data(config: LowBitConfig) -> None:
    """Refuse calibration data that cannot be read, before a model is loaded.

    Raises:
        ValueError: it is missing, empty or no text; or the config only records what another run used.
    """
    calibrated = check_calibration(config)
    if calibrated is None:
        return
    if isinstance(calibrated.calibration, CalibrationRecord):
        raise ValueError("the recipe only records what a run was calibrated on; name the data with --calibration")
    if calibrated.needs == "images":
        load_images(calibrated.calibration, most=1)
    elif calibrated.calibration not in DATASETS:
        load_texts(calibrated.calibration)
