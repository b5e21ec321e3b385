"""The quantizer that transformers calls: compress while loading a dense checkpoint, or load a packed one.

Dense checkpoint: transformers hands each weight that is to be compressed to an op. A run without data compresses it
there and then; a calibrated run leaves a stub (weights are memory-mapped, so nothing is read) and reads the weights
block by block when everything else is in place. Packed checkpoint: the layers are replaced by packed ones on
``meta``, compared with the files' headers, filled by transformers, and checked.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable
from typing import Any

import torch
from transformers.core_model_loading import ConversionOps, revert_weight_conversion
from transformers.quantizers import auto as registry_of_transformers
from transformers.quantizers.base import HfQuantizer

from hf_lowbit.compress import Intake, Run, RunReport, compress_model
from hf_lowbit.compress.agreement import check_calibration
from hf_lowbit.compress.headers import names_metadata
from hf_lowbit.compress.runtime import attach_runtime, detach_runtime
from hf_lowbit.config import HfLowbitMethod, LowBitConfig, calibration_kind
from hf_lowbit.errors import CheckpointError
from hf_lowbit.hf.convs import (
    is_for_convs,
    latents_of,
    prepare_convs,
    refuse_float,
    refuse_unasked_latents,
    start_training,
    warn_untrained,
)
from hf_lowbit.hf.latent import (
    FusedOnTheWay,
    attach_cache,
    detach_cache,
    forget_cuts,
    prepare_cache,
    split_listed,
)
from hf_lowbit.hf.packed import (
    build_skeleton,
    check_stored_config,
    check_values,
    dense_source,
    dequantize_layers,
    name_in,
    safetensors_of,
    verify_files,
)
from hf_lowbit.hf.push_model import offer_push, withdraw_push
from hf_lowbit.hf.save import file_metadata
from hf_lowbit.layers import packed_modules

NAME = HfLowbitMethod.HF_LOWBIT.value
# Bytes of a weight when it is packed: 2.9 to 3.7 bits with the default options, and scales weigh more in small layers.
_PACKED_BYTES = 0.5


class _HandOver(ConversionOps):
    """Gives a dense weight to the compression run instead of to the model."""

    def __init__(self, intake: Intake) -> None:
        self._intake = intake

    def convert(self, input_dict: dict[str, Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Hand over the weights that are compressed and return the others."""
        stored = kwargs.get("source_patterns") or []  # of a tensor that is stored as it is, its name in the checkpoint
        missing = kwargs.get("missing_keys")
        rest = {}
        for name, value in input_dict.items():
            if not self._intake.wants(name):
                rest[name] = value
                continue
            self._intake.take(name, value[0] if isinstance(value, list) else value, *stored[:1])
            if missing is not None:
                missing.discard(name)
        return rest


class LowBitHfQuantizer(HfQuantizer):
    """One quantizer for every method; the config says what to do.

    Attributes:
        report: of the compression run, after a dense checkpoint was compressed.
    """

    quantization_config: LowBitConfig

    def __init__(self, quantization_config: LowBitConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.report: RunReport | None = None
        self._intake: Intake | None = None
        self._fused: FusedOnTheWay | None = None
        self._files: list[str] = []

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Refuse what cannot work before the model is built."""
        device_map = kwargs.get("device_map")
        _refuse_cache_of_steps(self.quantization_config)
        if self.pre_quantized:
            if kwargs.get("weights_only") is False:
                raise ValueError("hf_lowbit: packed checkpoints are safetensors files; weights_only=False is refused")
            if not latents_of(self.quantization_config):
                check_stored_config(self.quantization_config)
            return
        if is_for_convs(self.quantization_config):
            refuse_float(self.quantization_config)
        if isinstance(device_map, dict) and "disk" in map(str, device_map.values()):
            raise ValueError("hf_lowbit: compressing while loading cannot be combined with disk offload")

    def update_parallel_plan(self, model: Any, plan: Any) -> None:
        """Refuse tensor parallelism, which would cut packed rows apart."""
        distributed = getattr(model.config, "distributed_config", None)
        if (getattr(distributed, "tp_size", None) or 1) > 1:
            raise ValueError(
                "hf_lowbit: tensor parallelism is not supported, packed rows cannot be cut apart; leave out tp_plan"
            )

    # Loading -----------------------------------------------------------------------------------------------------

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> Any:
        self.update_parallel_plan(model, None)  # transformers before 5.21 does not ask
        _refuse_files_elsewhere(model, checkpoint_files or [])
        if self.pre_quantized:
            self._files = safetensors_of(checkpoint_files)
            split_listed(model, self.quantization_config.modules or {})
            prepare_convs(model, self.quantization_config, self._files, name_in)
            build_skeleton(model, self.quantization_config.modules or {}, self._files)
            self.quantization_config = _named_as_in(model, self.quantization_config)
            attach_cache(model, self.quantization_config)
            attach_runtime(model, self.quantization_config)
            verify_files(self._files, self.quantization_config, "RunOptions(verify=False)")
            return model
        config = self.quantization_config
        if is_for_convs(config):
            return model  # binarized when its weights are there
        source = dense_source(checkpoint_files, getattr(model, "base_model_prefix", ""))
        self._fused = FusedOnTheWay(model, prepare_cache(model, config), source)
        with torch.device("cpu"):  # transformers builds the model under "meta", which calibration data must not follow
            self._intake = Intake(Run(model, config, source, _tokenizer_for(config, model)))
        return model

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        """Return whether a dense tensor goes to the compression run, or parts of it may."""
        return self._wanted(param_name) or (self._fused is not None and param_name in self._fused)

    def _wanted(self, parameter: str) -> bool:
        return self._intake is not None and self._intake.wants(parameter)

    def update_weight_conversions(self, weight_conversions: Any, model: Any) -> Any:
        """Return the conversions of weights while they are loaded: fused projections may have to be cut."""
        found = super().update_weight_conversions(weight_conversions, model)
        return found if self._fused is None else [*found, *self._fused.conversions()]

    def param_element_size(self, model: Any, param_name: str, param: torch.Tensor) -> float:
        """Return the bytes that an element will take; a dense weight that is compressed takes those of the packed."""
        return _PACKED_BYTES if self._wanted(param_name) else param.element_size()

    def get_quantize_ops(self) -> ConversionOps:
        """Return the op for dense tensors that are compressed."""
        if self._intake is None:
            raise RuntimeError("asked for an op outside of loading")
        return _HandOver(self._intake)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        if self.pre_quantized:
            _refuse_unloaded(model)
            check_values(model, self._files)
            warn_untrained(model)
            offer_push(model)
            return model
        if is_for_convs(self.quantization_config):
            self.quantization_config = start_training(model, self.quantization_config)
            self.pre_quantized = True
            return model
        if self._intake is None:
            raise RuntimeError("the model was not prepared for compression")
        intake, self._intake, self._fused = self._intake, None, None
        intake.close()
        forget_cuts(model)
        self.quantization_config = model.config.quantization_config = intake.run.complete()
        self.report = intake.run.report
        self.pre_quantized = True
        attach_cache(model, self.quantization_config)
        offer_push(model)
        return model

    # Later life --------------------------------------------------------------------------------------------------

    def get_state_dict_and_metadata(self, model: Any) -> tuple[None, dict[str, str]]:
        """Return the metadata of the files to be written: a checksum for every tensor and for the configs."""
        return None, {**file_metadata(model), **names_metadata(_stored_names(model))}

    def is_serializable(self) -> bool:
        """Packed models can be saved; one in training form on request.

        Raises:
            ValueError: the model is in training form, and its config does not ask for latents to be saved.
        """
        refuse_unasked_latents(self.quantization_config)
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters can be trained; packed weights are frozen. Packed convolutions of signs have no gradient."""
        return bool(latents_of(self.quantization_config)) or not is_for_convs(self.quantization_config)

    @property
    def is_qat_trainable(self) -> bool:
        """A model in training form is trained as it is."""
        return bool(latents_of(self.quantization_config))

    @property
    def is_compileable(self) -> bool:
        """The ops have shape rules, so ``generate`` may compile."""
        return True

    def remove_quantization_config(self, model: Any) -> None:
        """Remove all marks of quantization; transformers forgets the one in the config."""
        super().remove_quantization_config(model)
        for module in model.modules():
            if hasattr(getattr(module, "config", None), "_is_quantized"):
                del module.config._is_quantized

    def _dequantize(self, model: Any, dtype: torch.dtype | str | None = None) -> Any:
        dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype  # as config.json has it
        dequantize_layers(model, dtype)
        detach_cache(model)
        detach_runtime(model, self.quantization_config)
        withdraw_push(model)
        return model


def _stored_names(model: Any) -> dict[str, str]:
    """Return under which names transformers will store the tensors of packed layers."""
    marks = {
        f"{name}.{leaf}": torch.empty(0) for name, layer in packed_modules(model).items() for leaf in layer._parameters
    }
    name_of = {id(mark): name for name, mark in marks.items()}
    return {name_of[id(mark)]: stored for stored, mark in revert_weight_conversion(model, dict(marks)).items()}


def _refuse_files_elsewhere(model: Any, files: Iterable[str]) -> None:
    """Refuse weight files outside the model's folder: transformers joins names from an index to it as they are.

    Files from the Hub lie in its cache, and its client refuses such names.
    """
    folder = str(getattr(model.config, "_name_or_path", ""))
    for file in map(str, files) if os.path.isdir(folder) else ():
        if os.path.relpath(file, folder).split(os.sep)[0] == os.pardir:
            raise CheckpointError(
                f"the index of the model names {os.path.relpath(file, folder)!r}, outside its folder"
            )


def _named_as_in(model: Any, config: LowBitConfig) -> LowBitConfig:
    """Return the config with its tables in the names of this model, under which a save writes the tensors.

    A base model lacks the prefix of the model with a head, and the modules outside of it.
    """
    known = {name for name, _ in model.named_modules()}
    names = {name: name_in(model, name, known) for name in (*(config.modules or {}), *(config.left_dense or {}))}
    if all(names[name] == name for name in config.modules or {}):
        return config
    modules = {own: row for name, row in (config.modules or {}).items() if (own := names[name]) is not None}
    dense = {names[name] or name: reason for name, reason in (config.left_dense or {}).items()}
    return dataclasses.replace(config, modules=modules, left_dense=dense)


def _refuse_unloaded(model: Any) -> None:
    """transformers only warns about parameters that were not in the files and fills them at random; this raises.

    A parameter read from a file carries a mark; tied ones are marked as well. Offloaded ones are on ``meta``. A new
    head that is to be trained, such as that of a classifier, is meant to start at random.
    """
    named = type(model).__name__ in (getattr(model.config, "architectures", None) or [])
    new_head = not named and model.get_output_embeddings() is None
    base = f"{getattr(model, 'base_model_prefix', '')}."
    missing = [
        name
        for name, parameter in model.named_parameters()
        if not getattr(parameter, "_is_hf_initialized", False)
        and parameter.device.type != "meta"
        and not (new_head and not name.startswith(base))
    ]
    if missing:
        raise CheckpointError(
            f"{len(missing)} tensors are missing from the checkpoint and would be random, first {missing[0]!r}"
        )


def _tokenizer_for(config: LowBitConfig, model: Any) -> Any:
    """Return the tokenizer for calibration text, loaded from where the model came from unless one was given."""
    calibrated = check_calibration(config)
    if calibrated is None or calibrated.needs != "tokens" or calibration_kind(calibrated.calibration) == "tokens":
        return None
    if config.run.tokenizer is not None:
        return config.run.tokenizer
    from transformers import AutoTokenizer  # here: the package may be imported while transformers itself still is

    return AutoTokenizer.from_pretrained(model.config._name_or_path)


def register() -> None:
    """Make transformers know the package; calling it again does nothing."""
    if NAME not in registry_of_transformers.AUTO_QUANTIZER_MAPPING:
        registry_of_transformers.register_quantization_config(NAME)(LowBitConfig)
        registry_of_transformers.register_quantizer(NAME)(LowBitHfQuantizer)
        # transformers has no call for this: it lets `run` count when a config is passed along with a packed checkpoint
        registry_of_transformers.LOADING_ATTRIBUTES_CONFIG_TYPES += (LowBitConfig,)  # type: ignore[assignment]


def _refuse_cache_of_steps(config: LowBitConfig) -> None:
    """Refuse a recipe with a cache that only a model of diffusers can have."""
    cache = getattr(config, "cache", None)
    if cache is not None:
        raise ValueError(
            f"cache={type(cache).__name__} skips steps of transformers of diffusers; the cache of a language model is "
            'a rule of the recipe, such as "*.self_attn": ReCalKVConfig()'
        )


def quantize(model: Any, config: LowBitConfig) -> RunReport:
    """Compress a transformers model that is already in memory, in place; see :func:`hf_lowbit.quantize`."""
    _refuse_cache_of_steps(config)
    prepare_cache(model, config)
    finished, report = compress_model(model, config, _tokenizer_for(config, model))
    attach_cache(model, finished)
    model.hf_quantizer = LowBitHfQuantizer(finished, pre_quantized=True)
    model.hf_quantizer.report = report
    model.config.quantization_config = finished
    model.config._is_quantized = model.is_quantized = True
    model.quantization_method = finished.quant_method
    offer_push(model)
    return report
