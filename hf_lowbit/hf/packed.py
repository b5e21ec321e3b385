"""What loading a packed model means in any library: layers put in place before the weights come, checked afterwards.

The quantizers of transformers and diffusers call this; it knows neither of them. A packed model is loaded in three
steps: :func:`build_skeleton` compares the module table of the config with the files' headers and puts empty packed
layers into a model on ``meta``; the library fills them; :func:`check_values` looks at every value before it is used.
"""

from __future__ import annotations

import contextlib
import contextvars
import os
from collections.abc import Container, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from hf_lowbit.compress import CheckpointSource
from hf_lowbit.compress.checksums import problems_on_load
from hf_lowbit.compress.headers import TensorHeader, compare, packed_layer_spec, read_all_headers, unlisted
from hf_lowbit.config import LowBitConfig
from hf_lowbit.errors import CheckpointError
from hf_lowbit.experts import expert_lists, fused_name, fused_parameters, is_supported, put_together, take_apart
from hf_lowbit.hf.convs import CONV_FORMATS, place_empty
from hf_lowbit.layers import DENSE_TYPES, PackedLinear, features, packed_modules

_verifying = contextvars.ContextVar("hf_lowbit_verifying", default=True)

# Before the weights come ---------------------------------------------------------------------------------------------


def check_stored_config(config: LowBitConfig) -> None:
    """Refuse a stored config that is not one of a finished model.

    Raises:
        CheckpointError: it lists no packed modules.
    """
    if config.modules is None:
        raise CheckpointError(
            "config.json names hf_lowbit but its quantization_config lists no packed modules; "
            "it is not the config of a compressed model"
        )


def safetensors_of(checkpoint_files: Iterable[str] | None) -> list[str]:
    """Return the files of a packed checkpoint.

    Raises:
        CheckpointError: some are not safetensors files, or there are none; named.
    """
    given = list(checkpoint_files or [])
    files = [file for file in given if str(file).endswith(".safetensors")]
    if checkpoint_files is not None and (not files or len(files) < len(given)):
        others = sorted({os.path.basename(file) for file in given} - set(map(os.path.basename, files)))
        raise CheckpointError(f"packed checkpoints are safetensors files; not opened: {others[:5]}")
    return files


def dense_source(checkpoint_files: Iterable[str] | None, base_prefix: str = "") -> CheckpointSource | None:
    """Return where dense weights can be read one by one; None if not all files are safetensors.

    Raises:
        CheckpointError: as :class:`CheckpointSource`.
    """
    files = list(checkpoint_files or [])
    named = bool(files) and all(str(file).endswith(".safetensors") for file in files)
    return CheckpointSource(files, base_prefix) if named else None


def build_skeleton(model: Any, table: Mapping[str, Any], files: Iterable[str]) -> dict[str, TensorHeader]:
    """Put empty packed layers where the module table says, after comparing it with the files' headers.

    Args:
        model: on ``meta``, as the library has built it.
        table: ``modules`` of the stored config.
        files: safetensors files; none if they are not of that kind.

    Returns:
        The headers of all tensors, by the names they have in the model.

    Raises:
        CheckpointError: a file cannot be read, or table, files and model disagree; names layers and files.
    """
    headers, problems = read_all_headers(files)
    _take_apart_listed(model, table)
    known = {name for name, _ in model.named_modules()}
    for stored, row in table.items():
        name = name_in(model, stored, known)
        if name is None and _belongs_to_other_part(model, stored):
            continue
        if name is not None and row["format"] in CONV_FORMATS:
            try:
                place_empty(model, name, stored, row, headers)
            except ValueError as error:
                problems.append(str(error))
            continue
        dense: Any = None if name is None else model.get_submodule(name)
        if name is None or type(dense) not in DENSE_TYPES:
            problems.append(f"{stored}: the model has no linear layer of this name")
            continue
        try:
            model.set_submodule(name, _empty_layer(stored, row, dense, headers))
        except ValueError as error:
            problems.append(str(error))
    raise_first(problems + unlisted(table, headers) + _size_problems(model, headers))
    return headers


def verify_files(files: Iterable[str], config: LowBitConfig, way: str) -> None:
    """Compare all files with their checksums, unless that is switched off.

    Args:
        files: safetensors files of one model.
        config: of the model; ``run.verify`` counts.
        way: how the user switches it off, for messages.

    Raises:
        CheckpointError: names what is damaged.
    """
    if config.run.verify and _verifying.get():
        raise_first(problems_on_load(files, way))


@contextlib.contextmanager
def unverified() -> Iterator[None]:
    """Load packed models inside this block without comparing checksums.

    It is for models whose ``config.json`` was edited on purpose, and for libraries that let no options through to a
    packed model. Names, shapes, indices and values are checked all the same; saving the model records it as it is.
    """
    token = _verifying.set(False)
    try:
        yield
    finally:
        _verifying.reset(token)


def name_in(model: Any, stored: str, names: Container[str]) -> str | None:
    """Return the name that a stored module has in this model: a base model lacks the prefix, a head model has it."""
    prefix = getattr(model, "base_model_prefix", "")
    candidates = [stored, stored.removeprefix(f"{prefix}."), f"{prefix}.{stored}"]
    return next((name for name in candidates if name in names), None)


def raise_first(problems: list[str]) -> None:
    """Raise one error that names the first ten problems, if there are any."""
    if problems:
        more = f"; {len(problems) - 10} more" if len(problems) > 10 else ""
        raise CheckpointError("; ".join(problems[:10]) + more)


def _size_problems(model: Any, headers: Mapping[str, TensorHeader]) -> list[str]:
    """Compare sizes before the library makes room for what is missing. Tied tensors count twice at most."""
    wanted = sum(parameter.numel() for parameter in model.parameters())
    stored = sum(tensor.count for tensor in headers.values())
    if headers and wanted > 2 * stored:
        return [f"config.json describes a model of {wanted:,} elements, the files hold {stored:,}"]
    return []


def _take_apart_listed(model: Any, table: Iterable[str]) -> None:
    """Take the experts apart, on ``meta``, that a module table lists one by one."""
    modules = dict(model.named_modules())
    for stored in dict.fromkeys(filter(None, map(fused_name, table))):
        owner, _, leaf = stored.rpartition(".")
        name = name_in(model, owner, modules)
        module = modules.get(name) if name is not None else None
        if name is not None and module is not None and leaf in fused_parameters(module) and is_supported(module):
            take_apart(module, leaf, (), name)


def _belongs_to_other_part(model: Any, stored: str) -> bool:
    """Return whether a stored module lies outside the part that is being loaded (a head that a base model lacks)."""
    prefix = getattr(model, "base_model_prefix", "")
    is_base = getattr(model, "base_model", None) is model
    return is_base and not stored.startswith(f"{prefix}.")


def _empty_layer(name: str, row: Any, dense: nn.Module, headers: dict[str, TensorHeader]) -> PackedLinear:
    """Return the packed layer of a row in the module table, on ``meta``.

    Files that are not safetensors have no headers here; the library then compares the shapes.

    Raises:
        ValueError: the row, the model's layer and the files' headers disagree.
    """
    format_type, spec = packed_layer_spec(name, row)
    rows, columns = features(dense)
    if (spec.out_features, spec.in_features) != (rows, columns):
        raise ValueError(
            f"{name}: stored as {spec.out_features} x {spec.in_features}, the model's layer is {rows} x {columns}"
        )
    _, problems = compare(name, format_type, spec, headers) if headers else (set(), [])
    if problems:
        raise ValueError("; ".join(problems))
    return PackedLinear.empty_like(dense, format_type, spec)


# When they are there -------------------------------------------------------------------------------------------------


def check_values(model: Any, files: Iterable[str]) -> None:
    """Check all values of all packed layers, and freeze them.

    Args:
        model: with its weights; those offloaded to disk are on ``meta``.
        files: that it was loaded from.

    Raises:
        CheckpointError: names layer and tensor.
    """
    offloaded = any(parameter.device.type == "meta" for parameter in model.parameters())
    source = CheckpointSource(files, getattr(model, "base_model_prefix", "")) if offloaded else None
    for name, layer in packed_modules(model).items():
        _validated(name, layer, source)
    for name, module in model.named_modules():  # what methods store beside packed layers
        check = getattr(module, "stored_problems", None)
        if check is not None and (problems := check()):
            raise CheckpointError(f"damaged checkpoint: {name}: {'; '.join(problems)}")


def _validated(name: str, layer: PackedLinear, source: CheckpointSource | None) -> None:
    """Check all values of a layer; one that stays on disk is read for that, since nothing looks at it later."""
    packed = layer.packed
    if source is not None and any(parameter.device.type == "meta" for _, parameter in layer.packed_tensors()):
        shapes = packed.shapes(packed.spec)
        state = {part: source.read(f"{name}.weight_{part}", dtype) for part, (_, dtype) in shapes.items()}
        packed = layer.format_type.from_state(state, layer.spec)
    try:
        packed.validate(name)
    except ValueError as error:
        raise CheckpointError(f"damaged checkpoint: {error}") from error
    for _, parameter in layer.packed_tensors():
        parameter.requires_grad_(False)
    layer.weight.requires_grad_(False)


def dequantize_layers(model: Any, dtype: torch.dtype | None = None) -> None:
    """Replace the packed layers of a model by dense ones with the same weights.

    Args:
        model: in memory; adapters on packed layers stay what is trained.
        dtype: of the dense layers; by default the compute dtype of each.

    Raises:
        ValueError: layers are offloaded; their number and the first are named.
    """
    layers = packed_modules(model)
    away = [name for name, layer in layers.items() if any(p.device.type == "meta" for p in layer.parameters())]
    if away:  # their hooks would go with them, and the dense layers would compute on nothing
        raise ValueError(
            f"{len(away)} packed layers are offloaded, first {away[0]}; load the model without offloading, then "
            "call dequantize()"
        )
    under_adapters = any(name.endswith("base_layer") for name in layers)
    for name, layer in layers.items():
        model.set_submodule(name, layer.dequantize(dtype).requires_grad_(not under_adapters))
    for module, parameter in expert_lists(model):
        put_together(module, parameter)
