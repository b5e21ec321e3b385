"""Models with binary convolutions: from a float model to the training form, from that to the packed one, and loading.

A float checkpoint is never silently taken for a binary model: binarized in one step it computes nothing of use. It is
accepted with ``BiDRNConfig(for_training=True)``, becomes the training form, and is packed only after it was trained.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from hf_lowbit import registry
from hf_lowbit.compress.headers import TensorHeader, compare, packed_layer_spec, read_headers
from hf_lowbit.config import LowBitConfig
from hf_lowbit.conv_layers import DENSE_CONVS, PackedConv2d
from hf_lowbit.errors import CheckpointError
from hf_lowbit.formats import BinaryConvFormat
from hf_lowbit.kernels.geometry import ConvGeometry
from hf_lowbit.methods.bidrn.convert import (
    Selection,
    drop_stem_activation,
    make_binary,
    replace_conv,
    select,
    units,
    untrained,
)
from hf_lowbit.methods.bidrn.modules import BinaryUnit
from hf_lowbit.methods.bidrn.options import BiDRNConfig

logger = logging.getLogger(__name__)
CONV_FORMATS = (BinaryConvFormat.name,)


def _default(**options: Any) -> BiDRNConfig:
    made: Any = BiDRNConfig
    config: BiDRNConfig = made(**options)
    return config


def is_for_convs(config: Any) -> bool:
    """Return whether a config is of a method that works on convolutions, by training."""
    return config.method != "recipe" and registry.get(config.method).unit == "conv2d"


def latents_of(config: Any) -> tuple[str, ...]:
    """Return the names of the convolutions that are binary, of a model in training form; empty of any other."""
    return tuple(getattr(config, "latents", ()))


def refuse_unasked_latents(config: Any) -> None:
    """Refuse to save a model in training form unless its config asks for that.

    Raises:
        ValueError: it does not; says what to do.
    """
    if latents_of(config) and not config.save_latents:
        raise ValueError(
            "the model is in training form; hf_lowbit.pack_convs(model) makes the packed model that is to be saved, "
            "BiDRNConfig(save_latents=True) saves the real-valued weights to go on training"
        )


def refuse_float(config: Any) -> None:
    """Refuse a float checkpoint, unless it is meant as a start for training.

    Raises:
        ValueError: it is not.
    """
    if not config.for_training:
        raise ValueError(
            "the checkpoint is a float model; binarized in one step it computes nothing of use. "
            "BiDRNConfig(for_training=True) takes its weights as a start for training"
        )


def binarize_convs(model: nn.Module, config: BiDRNConfig | None = None) -> Selection:
    """Make the convolutions of a model binary, in place, as a start for training.

    Args:
        model: any module with ``nn.Conv2d`` or ``nn.ConvTranspose2d``; a ``PreTrainedModel`` can be saved with its
            latents (``save_latents=True``) or, trained, with :func:`pack_convs`.
        config: of the method.

    Returns:
        Which are binary now, and why the others are not.

    Raises:
        TypeError: ``model`` is no module, ``config`` none of this method.
        ValueError: nothing would become binary, a skip pattern matches nothing, a convolution is used under two
            names, or a block shares its ReLU between binary and other convolutions.
    """
    _check_arguments(model, config)
    config = config or _default(for_training=True)
    found = select(model, config)
    make_binary(model, found.binary, config.unit)
    trained = dataclasses.replace(
        config, for_training=True, latents=found.binary, left_dense=found.dense, modules=None
    )
    _attach(model, trained)
    logger.warning(
        "%d convolutions are binary and not trained: the model computes nothing of use before it is trained (%d stay "
        "as they are)", len(found.binary), len(found.dense),
    )  # fmt: skip
    return found


def pack_convs(
    model: nn.Module, config: BiDRNConfig | None = None, *, allow_untrained: bool = False
) -> dict[str, int]:
    """Pack all binary convolutions of a model, in place, with batch normalization folded in; latents are dropped.

    Args:
        model: in training form, trained.
        config: whose ``side_dtype`` counts; None takes that of the model, or the default.
        allow_untrained: pack also what has never run in training; for tests and measurements.

    Returns:
        Bytes by name of each packed convolution.

    Raises:
        TypeError: ``model`` is no module, ``config`` none of this method.
        ValueError: there is nothing to pack, a unit was never trained, or holds NaN or infinity.
    """
    _check_arguments(model, config)
    found = units(model)
    if not found:
        raise ValueError(f"{type(model).__name__} has no binary convolutions in training form")
    if "" in found:
        raise ValueError("the model is one binary convolution itself; pass the module that holds it")
    idle = [] if allow_untrained else untrained(model)
    if idle:
        raise ValueError(
            f"{len(idle)} of {len(found)} binary convolutions have never been trained, first {idle[0]}; an untrained "
            "binary model computes nothing of use, so it is not packed"
        )
    stored = getattr(getattr(model, "config", None), "quantization_config", None)
    config = config or (stored if isinstance(stored, BiDRNConfig) else _default())
    packed = {name: unit.packed(config.side_dtype, name) for name, unit in found.items()}
    rows = {}
    for name, one in packed.items():
        dtype = found[name].weight.dtype
        model.set_submodule(name, PackedConv2d(one, dtype).train(found[name].training))
        rows[name] = {"method": config.method, "format": one.name, "spec": one.spec.to_json(), "error": None}
    own: Any = config
    finished = dataclasses.replace(own, for_training=False, latents=(), modules=rows)
    _attach(model, finished)
    return {name: one.nbytes for name, one in packed.items()}


def _check_arguments(model: Any, config: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if config is not None and not isinstance(config, BiDRNConfig):
        raise TypeError(f"config must be a BiDRNConfig, got {type(config).__name__}")


def _attach(model: Any, config: BiDRNConfig) -> None:
    """Let transformers know what a model of its kind is; other modules need no mark."""
    if not hasattr(model, "save_pretrained") or not hasattr(model, "config"):
        return
    from hf_lowbit.hf.transformers import LowBitHfQuantizer

    model.hf_quantizer = LowBitHfQuantizer(config, pre_quantized=True)
    model.config.quantization_config = config
    model.config._is_quantized = model.is_quantized = True
    model.quantization_method = config.quant_method


# Loading -------------------------------------------------------------------------------------------------------------


def start_training(model: Any, config: Any) -> BiDRNConfig:
    """Binarize a float model that was just loaded; return the config that it has now."""
    binarize_convs(model, config)
    finished: BiDRNConfig = model.config.quantization_config
    return finished


def prepare_convs(model: Any, config: LowBitConfig, files: Iterable[str], name_in: Any) -> None:
    """Bring a model on ``meta`` into the structure that a stored one has; of a training form, put its units in place.

    Args:
        model: as transformers has built it.
        config: stored in the checkpoint.
        files: safetensors files.
        name_in: see :func:`hf_lowbit.hf.packed.name_in`.

    Raises:
        CheckpointError: config, model and files disagree; the first ten problems are named.
    """
    known = {name for name, _ in model.named_modules()}
    packed = [name for name, row in (config.modules or {}).items() if row["format"] in CONV_FORMATS]
    if packed:
        drop_stem_activation(model, {name_in(model, name, known) for name in packed})
    latents = latents_of(config)
    if not latents:
        return
    headers: dict[str, TensorHeader] = {}
    for file in files:
        headers |= read_headers(file)
    names = {stored: name_in(model, stored, known) for stored in latents}
    problems = [
        f"{stored}: the model has no convolution of this name"
        for stored, name in names.items()
        if name is None or type(model.get_submodule(name)) not in DENSE_CONVS
    ]
    if not problems:
        made = make_binary(model, tuple(names.values()), config.unit)  # type: ignore[attr-defined]
        problems = [
            problem for stored, name in names.items() for problem in _header_problems(stored, made[name], headers)
        ]
    if problems:
        more = f"; {len(problems) - 10} more" if len(problems) > 10 else ""
        raise CheckpointError("; ".join(problems[:10]) + more)


def _header_problems(stored: str, unit: BinaryUnit, headers: Mapping[str, TensorHeader]) -> list[str]:
    """Return what is wrong with the tensors of a unit in training form, buffers included."""
    found = []
    for leaf, tensor in unit.state_dict().items():
        header = headers.get(f"{stored}.{leaf}")
        if header is None:
            found.append(f"{stored}.{leaf} is in none of the weight files")
        elif header.shape != tuple(tensor.shape):
            found.append(f"{stored}.{leaf} is {list(header.shape)}, config.json says {list(tensor.shape)}")
    return found


def warn_untrained(model: Any) -> None:
    """Say that a model in training form is no usable one, if it was never trained."""
    idle = untrained(model)
    if idle:
        logger.warning(
            "%d binary convolutions have never been trained, first %s: the model computes nothing of use before it is",
            len(idle), idle[0],
        )  # fmt: skip


def place_empty(model: Any, name: str, stored: str, row: Mapping[str, Any], headers: dict[str, TensorHeader]) -> None:
    """Put an empty packed convolution into a model on ``meta``, where the module table says.

    Args:
        model: changed in place.
        name: of the convolution in this model.
        stored: its name in the checkpoint.
        row: of the module table.
        headers: of the files.

    Raises:
        ValueError: the row, the model's layer and the files' headers disagree.
    """
    format_type, spec = packed_layer_spec(stored, row)
    dense: Any = model.get_submodule(name)
    if type(dense) not in DENSE_CONVS and not isinstance(dense, BinaryUnit):
        raise ValueError(f"{stored}: the model has no convolution of this name")
    own = ConvGeometry.of_module(dense)
    if own != spec.geometry:  # type: ignore[attr-defined]
        raise ValueError(f"{stored}: stored as {spec.geometry}, the model's layer is {own}")  # type: ignore[attr-defined]
    _, problems = compare(stored, format_type, spec, headers) if headers else (set(), [])
    if problems:
        raise ValueError("; ".join(problems))
    with torch.device("meta"):
        empty: Any = format_type.empty(spec)
        replace_conv(model, name, lambda conv, _: PackedConv2d(empty, conv.weight.dtype))
