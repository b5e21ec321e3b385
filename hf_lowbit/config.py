"""Configs: frozen, validated, plain JSON with a version.

One class per method derives from :class:`LowBitConfig`, which is what transformers knows under the single
``quant_method`` "hf_lowbit"; the field ``method`` in the JSON says which class to build. Options are declared once,
with :func:`option`: the declaration gives type, default, allowed values and the help text of the command line.

A config never contains a path, a user name or calibration text: data that has no public name is written as a
:class:`CalibrationRecord` (what kind, how much, which hash).
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
import reprlib
import sys
from collections.abc import Callable, Mapping
from enum import Enum
from pathlib import Path
from typing import Any, ClassVar

from transformers.utils.quantization_config import QuantizationConfigMixin

FORMAT_VERSION = 1
# Text in a stored config ends up on a terminal: longer than this it is no name of a module and no reason.
_LONGEST = 1000
# Keys of the JSON that are not options: the first is transformers' own, the last is for the reader of the file only.
_ENVELOPE = ("quant_method", "method", "format_version", "hf_lowbit_version")
_SKIP_ELSEWHERE = "modules_to_not_convert"


class HfLowbitMethod(str, Enum):
    """The one ``quant_method`` of this package; an enum because diffusers reads ``.value``."""

    HF_LOWBIT = "hf_lowbit"


def option(
    default: Any,
    help: str,
    *,
    choices: tuple[Any, ...] | None = None,
    low: float | None = None,
    high: float | None = None,
    multiple_of: int | None = None,
    check: Callable[[Any], str | None] | None = None,
) -> Any:
    """Declare an option of a config: default (which fixes the type), help text and allowed values.

    ``low`` and ``high`` are inclusive. ``check`` stands in for all of them where a type and limits do not say what is
    allowed: it returns what is wrong with a value ("must be ..."), or None; what it wants belongs into the help text.
    Use it like :func:`dataclasses.field`.
    """
    rules = {"help": help, "choices": choices, "low": low, "high": high, "multiple_of": multiple_of, "check": check}
    return dataclasses.field(default=default, metadata={"option": rules})


_clipped = reprlib.Repr()
_clipped.maxstring = _clipped.maxother = 120
_MOST_PROBLEMS = 20


def shown(value: Any) -> str:
    """``repr`` for messages, cut short: what a file holds may be long, deeply nested or full of control characters."""
    return _clipped.repr(value)


def _listed(problems: list[str]) -> str:
    """Join problems, the first of very many."""
    more = len(problems) - _MOST_PROBLEMS
    return "; ".join(problems[:_MOST_PROBLEMS]) + (f"; {more} more" if more > 0 else "")


def planned_problems(layers: Any, symbol: str, fits: Callable[[Any], bool], want: str) -> list[str]:
    """Return what is wrong with the option ``layers`` of a method that decides on each decoder block.

    Args:
        layers: a number for each block by name, or None.
        symbol: what the number is called.
        fits: whether a number is allowed.
        want: what is allowed, in words.
    """
    if layers is None:
        return []
    if not isinstance(layers, Mapping):
        return [f"layers must map names of decoder blocks to {symbol}, got {shown(layers)}"]
    found = []
    for name, value in layers.items():
        if not is_text(name) or not name:
            found.append(f"layers: {shown(name)} is not the name of a module")
        elif not fits(value):
            found.append(f"layers[{shown(name)}] must be {want}, got {shown(value)}")
    return found


def planned_for(layers: Mapping[str, Any], symbol: str, module: str) -> Any:
    """Return the number of the innermost block around a module.

    Raises:
        ValueError: ``layers`` holds none.
    """
    path = module.split(".")
    for end in range(len(path), 0, -1):
        found = layers.get(".".join(path[:end]))
        if found is not None:
            return found
    raise ValueError(
        f"{module}: is in none of the blocks that layers gives {symbol} for; leave layers out to plan anew"
    )


def parse_json(text: str | bytes) -> Any:
    """Read JSON from somebody's file.

    Raises:
        ValueError: not JSON, nested too deeply, or a key given twice (readers differ on which one counts).
    """
    try:
        return json.loads(text, object_pairs_hook=_object_without_doubles)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def _object_without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {shown(key)} is given twice")
        found[key] = value
    return found


def _option_problem(name: str, value: Any, default: Any, rules: Mapping[str, Any]) -> str | None:
    if rules["check"] is not None:
        problem = rules["check"](value)
        return f"{name} {problem}" if problem else None
    if rules["choices"] is not None:
        allowed = ", ".join(map(repr, rules["choices"]))
        # 4.0 equals 4, and True equals 1, but neither counts bits
        fits = any(type(value) is type(choice) and value == choice for choice in rules["choices"])
        return None if fits else f"{name} must be one of {allowed}, got {shown(value)}"
    want = type(default)
    if type(value) is not want and not (want is float and type(value) is int):
        return f"{name} must be of type {want.__name__}, got {shown(value)}"
    low, high, step = rules["low"], rules["high"], rules["multiple_of"]
    # `not (low <= value)` rather than `value < low`, so that NaN is refused too
    if (low is not None and not low <= value) or (high is not None and not value <= high):
        limits = f"from {low} to {high}" if high is not None else f"at least {low}"
        return f"{name} must be {limits}, got {shown(value)}"
    if step is not None and value % step:
        return f"{name} must be a multiple of {step}, got {shown(value)}"
    return None


@dataclasses.dataclass(frozen=True)
class RunOptions:
    """How a compression run behaves on this machine; never saved and never part of a comparison.

    Attributes:
        batch_size: calibration sequences per forward pass.
        progress: show a progress bar.
        report: file that receives one JSON line per layer, or None.
        tokenizer: tokenizer for calibration text; None loads the model's own.
        journal: folder that records finished layers, so that a run can be resumed; None for no journal.
        resume: go on with the run that the journal records.
        on_plan: called with the rows of the plan when a budget has chosen, before anything is compressed.
        verify: compare checksums when a packed model is loaded; False puts that off (see ``hf-lowbit verify``).
    """

    batch_size: int = 4
    progress: bool = True
    report: Path | str | None = None
    tokenizer: Any = None
    journal: Path | str | None = None
    resume: bool = False
    verify: bool = True
    on_plan: Callable[[Any], Any] | None = None


@dataclasses.dataclass(frozen=True)
class CalibrationRecord:
    """What a model was calibrated on, without saying where it lay.

    Attributes:
        kind: "dataset", "text file", "text folder", "texts", "tokens"; of images see :mod:`hf_lowbit.image_config`.
        name: public name of a dataset, else None.
        sha256: hash of the token ids, or of the pixels, that were used, None before a run.
        tokens: number of tokens used, or of pixels, None before a run.
    """

    kind: str
    name: str | None = None
    sha256: str | None = None
    tokens: int | None = None


class _ByMethodName(type):
    """Builds the config of a method when a common base is called with its name, as pipelines of diffusers do.

    ``PipelineQuantizationConfig(quant_backend="hf_lowbit", quant_kwargs={"method": "arb", ...})`` calls the class that
    is registered, which is one for all methods.
    """

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        if getattr(cls, "method", ""):
            return super().__call__(*args, **_with_preset(cls, _with_skip(cls, kwargs)))
        if "method" not in kwargs:
            raise TypeError(
                f"{cls.__name__} is a common base; use the config of a method, such as ARBConfig, or name the method: "
                "method='arb'"
            )
        from hf_lowbit import registry

        return registry.config_class(kwargs.pop("method"))(*args, **kwargs)


def _with_skip(config_class: Any, options: dict[str, Any]) -> dict[str, Any]:
    """Return options with ``skip`` where it is called ``modules_to_not_convert``, as other quantizers call it.

    Raises:
        ValueError: both are given.
    """
    if _SKIP_ELSEWHERE not in options:
        return options
    names = options[_SKIP_ELSEWHERE]
    if options.get("skip"):
        raise ValueError(f"{config_class.__name__}: skip and {_SKIP_ELSEWHERE} mean the same, give one of them")
    others = {key: value for key, value in options.items() if key != _SKIP_ELSEWHERE}
    return {**others, "skip": (names,) if isinstance(names, str) else names or ()}


def _with_preset(config_class: Any, options: dict[str, Any]) -> dict[str, Any]:
    """Return options with those of ``preset`` filled in where they are not given.

    Raises:
        ValueError: the class has no preset of this name.
    """
    presets = getattr(config_class, "presets", {})
    if "preset" not in options or not presets:
        return options
    name = options["preset"]
    if not isinstance(name, str) or name not in presets:
        raise ValueError(f"{config_class.__name__}: preset must be one of {', '.join(presets)}, got {shown(name)}")
    return {**presets[name], **{key: value for key, value in options.items() if key != "preset"}}


@dataclasses.dataclass(kw_only=True)
class LowBitConfig(QuantizationConfigMixin, metaclass=_ByMethodName):
    """What all configs share; also the class that transformers registers, so ``from_dict`` builds the right subclass.

    Attributes:
        skip: module patterns to leave dense, besides the defaults (output head, embeddings, tied weights). A pattern
            is a dotted name or a glob; it matches a module, or any module below it. ``modules_to_not_convert``, as it
            is called elsewhere, is taken, too.
        modules: filled by compression: for each packed module its method, format, spec and error.
        left_dense: filled by compression: for each other linear-like module why it is dense.
        run: behaviour of the run on this machine; not saved.
    """

    # transformers declares a field here; it is constant for us
    quant_method: ClassVar[HfLowbitMethod] = HfLowbitMethod.HF_LOWBIT  # type: ignore[assignment,misc]
    method: ClassVar[str] = ""
    # Sets of other defaults by name: DVDQuantConfig(preset="w4a4") stores their values, not the name.
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}

    skip: tuple[str, ...] = ()
    modules: Mapping[str, Mapping[str, Any]] | None = None
    left_dense: Mapping[str, str] | None = None
    run: RunOptions = dataclasses.field(default=RunOptions(), compare=False, repr=False)

    def __post_init__(self) -> None:
        if isinstance(self.skip, list):
            self.skip = tuple(self.skip)
        problems = self.problems()
        if problems:
            raise ValueError(f"{type(self).__name__}: {_listed(problems)}")
        object.__setattr__(self, "_frozen", True)

    # transformers' mixin is an unfrozen dataclass, from which a frozen one may not inherit
    def __setattr__(self, name: str, value: Any) -> None:
        # transformers sets loading attributes on the stored config, see get_loading_attributes
        if getattr(self, "_frozen", False) and not (name == "run" and isinstance(value, RunOptions)):
            raise dataclasses.FrozenInstanceError(
                f"{type(self).__name__} is frozen; use dataclasses.replace(config, {name}=...)"
            )
        super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        raise dataclasses.FrozenInstanceError(f"{type(self).__name__} is frozen; {name} cannot be deleted")

    @property
    def modules_to_not_convert(self) -> list[str]:
        """``skip``, under the name that quantizers of transformers and diffusers have for it; also as an argument."""
        return list(self.skip)

    @property
    def needs(self) -> str:
        """Data that a run with these options needs: "none" or "tokens"."""
        return "none"

    @property
    def method_info(self) -> Any:
        """Return the record of the method (``hf_lowbit.methods``); None for a recipe, whose rules have their own."""
        from hf_lowbit import registry

        return None if self.method == "recipe" else registry.method_info(self.method)

    @property
    def streams(self) -> frozenset[str]:
        """Whose inputs a calibrated run gathers: those in the "dense" model, in the "compressed" one so far, or both.

        With "cross" also the products of the one with the other, except of experts, which see other tokens in each.
        With "gradients", which only methods of unit "attention" are given, also those of the dense model's loss with
        respect to outputs, of ``gradient_samples`` sequences of ``gradient_length`` tokens.
        """
        return frozenset({"compressed"})

    @property
    def in_order(self) -> bool:
        """Whether a calibrated run compresses the layers of a block in the order in which they run.

        Each is then calibrated on what the compressed ones before it in the block produce, too, at the price of
        running the block once for each group of layers with the same input. One such layer makes its block be
        compressed so.
        """
        return False

    @property
    def stack_into(self) -> int:
        """Number of averages of the calibration samples that are gathered beside their sums; 0 for none."""
        return 0

    def get_loading_attributes(self) -> dict[str, Any]:
        """Return what of a config passed to ``from_pretrained`` counts for a packed checkpoint: ``run`` alone."""
        return {"run": self.run}

    @classmethod
    def options(cls) -> dict[str, dataclasses.Field[Any]]:
        """Return the method's options by name."""
        return {field.name: field for field in dataclasses.fields(cls) if "option" in field.metadata}

    def problems(self) -> list[str]:
        """Return what is wrong with the values, empty if nothing is."""
        found = []
        for name, field in self.options().items():
            problem = _option_problem(name, getattr(self, name), field.default, field.metadata["option"])
            found += [problem] if problem else []
        if not isinstance(self.skip, tuple) or not all(isinstance(item, str) and item for item in self.skip):
            found.append(f"skip must be a list of non-empty strings, got {shown(self.skip)}")
        if self.modules is not None:
            found += _module_table_problems(self.modules)
        reasons = self.left_dense
        if reasons is not None and not (isinstance(reasons, Mapping) and all(is_text(*i) for i in reasons.items())):
            found.append("left_dense must map module names to reasons, in printable characters")
        if not isinstance(self.run, RunOptions):
            found.append(f"run must be RunOptions, got {self.run!r}")
        elif type(self.run.batch_size) is not int or self.run.batch_size < 1:
            found.append(f"run.batch_size must be an integer of at least 1, got {self.run.batch_size!r}")
        return found

    def _values(self) -> dict[str, Any]:
        """Return the saved fields as JSON types; subclasses extend it for fields that are not options."""
        values: dict[str, Any] = {name: getattr(self, name) for name in self.options()}
        values["skip"] = list(self.skip)
        if self.modules is not None:
            values["modules"] = {name: dict(row) for name, row in self.modules.items()}
        if self.left_dense is not None:
            values["left_dense"] = dict(self.left_dense)
        return values

    def to_dict(self) -> dict[str, Any]:
        """Return the config as JSON types, version included."""
        from hf_lowbit import __version__  # here, because the package imports this module first

        return {
            "quant_method": self.quant_method.value,
            "method": self.method,
            "format_version": FORMAT_VERSION,
            "hf_lowbit_version": __version__,
            **self._values(),
        }

    def to_diff_dict(self) -> dict[str, Any]:
        """Return :meth:`to_dict`: every option is written out, so a file does not depend on later defaults."""
        return self.to_dict()

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """Build the config of ``config_dict["method"]``.

        Args:
            config_dict: what :meth:`to_dict` returned.
            return_unused_kwargs: return ``(config, kwargs)``, as transformers may ask for.
            kwargs: returned untouched.

        Raises:
            ValueError: unknown method, newer version, unknown keys or bad values; all of them are named.
        """
        from hf_lowbit import registry

        if not isinstance(config_dict, Mapping):
            raise ValueError(f"a config must be an object, got {type(config_dict).__name__}")
        data = dict(config_dict)
        method = data.get("method", cls.method or None)
        if method is not None and not is_text(method):
            raise ValueError(f"unknown method {shown(method)}")
        target: type[LowBitConfig] = registry.config_class(method)
        if not issubclass(target, cls):
            raise ValueError(f"this is a config of method {method!r}, not a {cls.__name__}")
        version = data.get("format_version", FORMAT_VERSION)
        if type(version) is not int or not 1 <= version <= FORMAT_VERSION:
            raise ValueError(
                f"format_version {shown(version)} is not supported (this release reads 1 to {FORMAT_VERSION}); "
                "a newer hf-lowbit may"
            )
        if data.get("quant_method", HfLowbitMethod.HF_LOWBIT.value) != HfLowbitMethod.HF_LOWBIT.value:
            raise ValueError(f"quant_method must be 'hf_lowbit', got {shown(data['quant_method'])}")
        values = _with_skip(target, {key: value for key, value in data.items() if key not in _ENVELOPE})
        known = {field.name for field in dataclasses.fields(target) if field.init} - {"run"}
        unknown = sorted(set(values) - known)
        if unknown:  # finding what was meant takes time, so not for very many
            hints = [_unknown_key(key, known) for key in unknown[:_MOST_PROBLEMS]]
            raise ValueError(f"{target.__name__}: {_listed(hints + unknown[_MOST_PROBLEMS:])}")
        config = target._from_values(values)
        known_methods = registry.methods()
        for name, row in (config.modules or {}).items():
            if row["method"] not in known_methods:
                raise ValueError(f"{target.__name__}: modules[{shown(name)}]: unknown method {shown(row['method'])}")
        return (config, kwargs) if return_unused_kwargs else config

    @classmethod
    def _from_values(cls, values: dict[str, Any]) -> Any:
        """Build the config from the saved fields, unknown keys already refused."""
        return cls(**values)


def _unknown_key(key: str, known: set[str]) -> str:
    close = difflib.get_close_matches(key[:100], known, n=1)
    return f"unknown key {shown(key)}" + (f" (did you mean {close[0]!r}?)" if close else "")


def is_text(*values: Any) -> bool:
    """Whether all are strings that may be shown as they are: no control characters, no page of text."""
    return all(isinstance(value, str) and len(value) <= _LONGEST and value.isprintable() for value in values)


def is_finite(number: Any) -> bool:
    return bool(abs(number) <= sys.float_info.max)  # also for integers that no float can hold


def _is_module_name(name: Any) -> bool:
    return is_text(name) and all(name.split("."))


_MODULE_KEYS = {"method": str, "format": str, "spec": Mapping, "error": float}


def _module_table_problems(table: Any) -> list[str]:
    if not isinstance(table, Mapping):
        return [f"modules must be an object, got {type(table).__name__}"]
    found = []
    for name, row in table.items():
        where = f"modules[{shown(name)}]"
        if not _is_module_name(name):
            found.append(f"{where}: not the name of a module")
            continue
        if not isinstance(row, Mapping):
            found.append(f"{where} must be an object")
            continue
        if unknown := sorted(set(row) - set(_MODULE_KEYS)):
            found.append(f"{where} has unknown keys {', '.join(map(shown, unknown[:_MOST_PROBLEMS]))}")
        for key, kind in _MODULE_KEYS.items():
            value = row.get(key)
            if value is None and key == "error":  # a data-free run has no inputs to measure it on
                continue
            if not isinstance(value, kind) and not (kind is float and type(value) is int):
                found.append(f"{where}.{key} must be of type {kind.__name__}, got {shown(value)}")
            elif kind is float and not is_finite(value):
                found.append(f"{where}.{key} must be finite, got {shown(value)}")
    return found


# Text datasets that calibration and evaluation know by name; loaded through `datasets`, which needs a network.
DATASETS = ("c4", "wikitext2")
# Far beyond any use; a larger product is a slip, or a file made to fill the memory.
_MOST_TOKENS = 2**31


@dataclasses.dataclass(kw_only=True)
class CalibratedConfig(LowBitConfig):
    """Adds where calibration tokens come from.

    Attributes:
        calibration: a name in :data:`DATASETS`, a text file or folder, a list of strings, token ids (a tensor of shape
            (sequences, length) or a list of 1-D tensors), or None for a run without data.
    """

    calibration: Any = dataclasses.field(default="c4", repr=False)
    samples: int = option(128, "calibration sequences", low=1)
    sequence_length: int = option(2048, "tokens per calibration sequence", low=2)
    seed: int = option(0, "seed of the calibration sample", low=0, high=2**63 - 1)

    def __post_init__(self) -> None:
        self.calibration = _plain_calibration(self.calibration)
        super().__post_init__()

    @property
    def needs(self) -> str:
        """Data that a run with these options needs: "none" or "tokens"."""
        return "none" if self.calibration is None else "tokens"

    def problems(self) -> list[str]:
        """Return what is wrong with the values, empty if nothing is."""
        found = super().problems()
        if isinstance(self.calibration, str) and not self.calibration:
            found.append("calibration must not be an empty string; use None for a run without data")
        if isinstance(self.calibration, (bool, int, float)):
            found.append(f"calibration must be a name, a path, texts or token ids, got {shown(self.calibration)}")
        elif isinstance(self.calibration, Mapping):
            found.append("calibration must not be a mapping; of a tokenizer's output, pass its ['input_ids']")
        elif isinstance(self.calibration, CalibrationRecord):
            found += record_problems(self.calibration, KINDS)
        if not found and self.samples * self.sequence_length > _MOST_TOKENS:
            found.append(f"samples × sequence_length must be at most {_MOST_TOKENS} tokens")
        return found

    def _values(self) -> dict[str, Any]:
        values = super()._values()
        data = self.calibration
        if data is not None and not isinstance(data, CalibrationRecord) and data not in DATASETS:
            data = CalibrationRecord(kind=calibration_kind(data))
        values["calibration"] = dataclasses.asdict(data) if isinstance(data, CalibrationRecord) else data
        return values

    @classmethod
    def _from_values(cls, values: dict[str, Any]) -> Any:
        data = values.get("calibration")
        if isinstance(data, Mapping):
            values = {**values, "calibration": calibration_record(data, cls.__name__)}
        elif data is not None and data not in DATASETS:
            # A stored config names public data only; anything else would be somebody else's path.
            raise ValueError(
                f"{cls.__name__}: a stored calibration is one of {', '.join(DATASETS)}, got {shown(data)}"
            )
        return cls(**values)


KINDS = ("dataset", "text file", "text folder", "texts", "tokens")


def calibration_record(data: Mapping[str, Any], owner: str) -> CalibrationRecord:
    """Read the record of a stored config.

    Raises:
        ValueError: it has other keys than a record.
    """
    fields = {field.name for field in dataclasses.fields(CalibrationRecord)}
    if set(data) - fields or "kind" not in data:
        raise ValueError(f"{owner}: a calibration record has {', '.join(sorted(fields))}, got {shown([*data])}")
    return CalibrationRecord(**data)


def record_problems(record: CalibrationRecord, kinds: tuple[str, ...]) -> list[str]:
    """A record comes from somebody's file: only what this package writes is kept, so nothing else is handed on."""
    found = []
    if record.kind not in kinds:
        found.append(f"calibration.kind must be one of {', '.join(kinds)}, got {shown(record.kind)}")
    if record.name is not None and record.name not in DATASETS:
        found.append(f"calibration.name must be one of {', '.join(DATASETS)}, got {shown(record.name)}")
    digest = record.sha256
    if digest is not None and not (isinstance(digest, str) and re.fullmatch(r"[0-9a-f]{64}", digest)):
        found.append(f"calibration.sha256 must be 64 hexadecimal digits, got {shown(digest)}")
    if record.tokens is not None and (type(record.tokens) is not int or not 0 <= record.tokens < 2**63):
        found.append(f"calibration.tokens must be a count, got {shown(record.tokens)}")
    return found


def _plain_calibration(data: Any) -> Any:
    """Turn paths into strings, and token ids in tensors or arrays into tuples, which compare, copy and hash."""
    if isinstance(data, Path):
        return str(data)
    if isinstance(data, (list, tuple)):
        return tuple(_plain_calibration(item) for item in data)
    return _plain_calibration(data.tolist()) if hasattr(data, "tolist") else data


def calibration_kind(data: Any) -> str:
    """Return in one word what ``data`` is: "dataset", "text folder", "text file", "texts" or "tokens"."""
    if isinstance(data, str):
        if data in DATASETS:
            return "dataset"
        return "text folder" if Path(data).is_dir() else "text file"
    if isinstance(data, (list, tuple)) and data and all(isinstance(item, str) for item in data):
        return "texts"
    return "tokens"
