"""What a packed checkpoint holds, for an engine that reads it in its own way: looked at before a weight is read.

Nothing here knows an engine. An engine gets a table of layers, and may rely on the files being those that were saved:
every tensor that the table calls for is there, in shape, dtype and checksum, and none beside them.
"""

from __future__ import annotations

import dataclasses
import json
import os
import reprlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from hf_lowbit import registry
from hf_lowbit.compress.checksums import absent_tensors, problems_on_load
from hf_lowbit.compress.headers import TensorHeader, compare, packed_layer_spec, read_all_headers, unlisted
from hf_lowbit.config import LowBitConfig
from hf_lowbit.errors import CheckpointError
from hf_lowbit.experts import fused_name
from hf_lowbit.formats import FORMATS, Format, Spec
from hf_lowbit.recipe import rules_of

FORMATS_SERVED = ("binary", "integer", "low_rank")
# Rounding with scales over all tokens of a call: an engine puts tokens of several requests into one.
_OVER_TOKENS = ("channel", "channel_token", "dynamic")
# What methods work on, of those that packed linear layers alone do not carry.
_UNITS_REFUSED = {
    "attention": "its cache holds latents, the engine's own holds keys and values",
    "conv2d": "its convolutions are binary, and only linear layers are served",
    "pipeline": "it works on pipelines of diffusers, not on language models",
}
_WAY_ON = "it can be used with transformers"


@dataclasses.dataclass(frozen=True)
class StoredLayer:
    """One packed layer of a checkpoint.

    Attributes:
        name: of the module, as the config has it; for messages.
        format_type: of the weight.
        spec: of the weight.
    """

    name: str
    format_type: type[Format]
    spec: Any


def stored_layers(stored_config: Mapping[str, Any]) -> dict[str, StoredLayer]:
    """Read the ``quantization_config`` of a packed model, and refuse what cannot be served.

    Args:
        stored_config: as it stands in ``config.json``.

    Returns:
        The packed layers by name.

    Raises:
        ValueError: it is no valid config, or something in it is not served: method, format, rounding or experts.
        CheckpointError: it is not the config of a finished model.
    """
    try:
        config: LowBitConfig = LowBitConfig.from_dict(stored_config)
    except ValueError as error:
        raise ValueError(f"quantization_config in config.json: {error}") from error
    problems = _refused_methods(config)
    if not problems and not config.modules:
        raise CheckpointError(
            "config.json names hf_lowbit but its quantization_config lists no packed modules; "
            "it is not the config of a compressed model"
        )
    found = {}
    for name, row in (config.modules or {}).items():
        if row["format"] in FORMATS and row["format"] not in FORMATS_SERVED:
            problems.append(f"{name}: format {row['format']!r} is not served, only {', '.join(FORMATS_SERVED)} are")
            continue
        format_type, spec = packed_layer_spec(name, row)
        problems += _refused_layer(name, spec)
        found[name] = StoredLayer(name, format_type, spec)
    if problems:
        more = f"; {len(problems) - 3} more" if len(problems) > 3 else ""
        raise ValueError(f"this model cannot be served: {'; '.join(problems[:3])}{more}; {_WAY_ON}")
    return found


def _refused_methods(config: LowBitConfig) -> list[str]:
    problems = []
    for _, rule in rules_of(config):
        method = registry.get(rule.method)
        if method.unit in _UNITS_REFUSED:
            problems.append(f"method {method.name!r} is not served ({_UNITS_REFUSED[method.unit]})")
        elif method.needs == "images":
            problems.append(f"method {method.name!r} is not served (it is for models of images)")
    return problems


def _refused_layer(name: str, spec: Spec) -> list[str]:
    if fused_name(name) is not None:
        return [f"{name}: experts of a mixture are not served"]
    rounding = getattr(spec, "activation", "none")
    if rounding in _OVER_TOKENS:
        return [
            f"{name}: activations are rounded with scales over all tokens of a call ({rounding}), in which an engine "
            "puts those of several requests"
        ]
    return []


def weight_files(folder: str | Path) -> list[Path]:
    """Return the safetensors files of a model folder: those that the index names, or all where there is none.

    Raises:
        CheckpointError: there are none, the index is damaged, or it names a file that is not there.
    """
    place = Path(folder)
    index = place / SAFE_WEIGHTS_INDEX_NAME
    if not index.is_file():
        files = sorted(place.glob("*.safetensors"))
        if not files:
            raise CheckpointError(f"{place.name}: has no safetensors files; packed checkpoints are of that kind only")
        return files
    try:
        names = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError):
        names = []
    odd = [name for name in names if not isinstance(name, str) or Path(name).name != name]
    if odd or not names:
        raise CheckpointError(f"{index.name}: is damaged")
    absent = [name for name in names if not os.path.isfile(place / name)]  # a Path's own refuses what is too long
    if absent:
        raise CheckpointError(f"{index.name}: names {reprlib.repr(absent[0])}, which is not there")
    return [place / name for name in names]


def check_files(folder: str | Path, layers: Mapping[str, StoredLayer]) -> dict[str, str]:
    """Compare the files of a model with its table of layers and with their checksums, before an engine reads them.

    Args:
        folder: of the model.
        layers: as :func:`stored_layers` returns them.

    Returns:
        The names that the files have for the layers, by the names of these.

    Raises:
        CheckpointError: a file cannot be read, a tensor is missing, damaged, of another shape or too many; named.
    """
    files = weight_files(folder)
    headers, problems = read_all_headers(files)
    for layer in layers.values():
        problems += compare(layer.name, layer.format_type, layer.spec, headers)[1]
    problems += unlisted(layers, headers)
    if not problems:
        problems = problems_on_load(files, "transformers with RunOptions(verify=False)") + absent_tensors(files)
    if problems:
        more = f"; {len(problems) - 10} more" if len(problems) > 10 else ""
        raise CheckpointError("; ".join(problems[:10]) + more)
    return {name: _stored_name(layer, headers) for name, layer in layers.items()}


def _stored_name(layer: StoredLayer, headers: Mapping[str, TensorHeader]) -> str:
    """Return the name of a layer in the files, where its tensors may be called otherwise than its module."""
    part = next(iter(layer.format_type.shapes(layer.spec)))
    return headers[f"{layer.name}.weight_{part}"].key.removesuffix(f".weight_{part}")


def renamed(layers: Mapping[str, StoredLayer], names: Iterable[str]) -> dict[str, StoredLayer]:
    """Return the layers under other names, given in the same order.

    Raises:
        CheckpointError: two of them get one name.
    """
    found = dict(zip(names, layers.values(), strict=True))
    if len(found) < len(layers):
        raise CheckpointError("config.json lists layers that are one and the same in the engine's model")
    return found
