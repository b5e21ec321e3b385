"""The quantizer that transformers calls: compress while loading a dense checkpoint, or load a packed one.

Dense checkpoint: the linear layers to be compressed are not loaded at first. transformers hands their tensors to an op
that drops them (they are memory-mapped, so nothing is read), and when everything else is in place the compression run
reads them block by block. Packed checkpoint: the layers are replaced by packed ones on ``meta``, compared with the
files' headers, filled by transformers, and checked.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn
from transformers.core_model_loading import ConversionOps
from transformers.quantizers import auto as registry_of_transformers
from transformers.quantizers.base import HfQuantizer

from hf_lowbit.compress import CheckpointSource, compress_model
from hf_lowbit.compress.checksums import damaged_tensors, metadata_of
from hf_lowbit.compress.engine import RunReport, check_calibration
from hf_lowbit.compress.headers import TensorHeader, compare, packed_layer_spec, read_headers
from hf_lowbit.compress.targets import plan_run
from hf_lowbit.config import HfLowbitMethod, LowBitConfig, calibration_kind
from hf_lowbit.errors import CheckpointError
from hf_lowbit.formats import FORMATS
from hf_lowbit.layers import PackedLinear, packed_modules

logger = logging.getLogger(__name__)
NAME = HfLowbitMethod.HF_LOWBIT.value


class _Defer(ConversionOps):
    """Puts a stub in the place of a dense weight that the compression run will read itself."""

    def convert(self, input_dict: dict[str, Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
        first = {key: value[0] if isinstance(value, list) else value for key, value in input_dict.items()}
        return {key: tensor.new_zeros(1) for key, tensor in first.items()}


class LowBitHfQuantizer(HfQuantizer):
    """One quantizer for every method; the config says what to do.

    Attributes:
        report: of the compression run, after a dense checkpoint was compressed.
    """

    quantization_config: LowBitConfig

    def __init__(self, quantization_config: LowBitConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.report: RunReport | None = None
        self._source: CheckpointSource | None = None
        self._deferred: set[str] = set()

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Refuse what cannot work before the model is built."""
        device_map = kwargs.get("device_map")
        if self.pre_quantized:
            if self.quantization_config.modules is None:
                raise CheckpointError(
                    "config.json names hf_lowbit but its quantization_config lists no packed modules; "
                    "it is not the config of a compressed model"
                )
            return
        if isinstance(device_map, dict) and "disk" in map(str, device_map.values()):
            raise ValueError("hf_lowbit: compressing while loading cannot be combined with disk offload")

    def update_parallel_plan(self, model: Any, plan: Any) -> None:
        """Refuse tensor parallelism, which would cut packed rows apart."""
        distributed = getattr(model.config, "distributed_config", None)
        if (getattr(distributed, "tp_size", None) or 1) > 1:
            raise ValueError("hf_lowbit: tensor parallelism is not supported")

    # Loading -----------------------------------------------------------------------------------------------------

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> Any:
        files = [file for file in checkpoint_files or [] if str(file).endswith(".safetensors")]
        if self.pre_quantized:
            self._build_skeleton(model, files)
            if self.quantization_config.run.verify:
                problems, _ = damaged_tensors(files)
                _raise_first(problems)
            return model
        config = self.quantization_config
        _, targets = plan_run(model, config, check_calibration(config) is not None)  # refuses bad patterns early
        if files and len(files) == len(checkpoint_files or []):
            self._source = CheckpointSource(files, getattr(model, "base_model_prefix", ""))
            self._deferred = {
                f"{name}.weight" for name in targets.methods if self._source.locate(f"{name}.weight") is not None
            }
        return model

    def _build_skeleton(self, model: Any, files: list[str]) -> None:
        """Put empty packed layers where the config's module table says, after comparing it with the files' headers."""
        headers = {key: tensor for file in files for key, tensor in read_headers(file).items()}
        problems = []
        for stored, row in (self.quantization_config.modules or {}).items():
            name = _name_in(model, stored)
            linear = None if name is None else model.get_submodule(name)
            if name is None or type(linear) is not nn.Linear:
                if name is None and _belongs_to_other_part(model, stored):
                    continue
                problems.append(f"{stored}: the model has no linear layer of this name")
                continue
            try:
                model.set_submodule(name, _empty_layer(stored, row, linear, headers))
            except ValueError as error:
                problems.append(str(error))
        leaves = {f"weight_{name}" for format_type in FORMATS.values() for name in format_type.tensor_names}
        left_over = {key.rpartition(".")[0] for key in headers if key.rpartition(".")[2] in leaves}
        for stored in sorted(left_over - set(self.quantization_config.modules or {})):
            problems.append(f"{stored}: the files hold packed tensors of it, config.json does not list it")
        _raise_first(problems)

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        """Return whether a dense tensor is put off until the compression run."""
        return param_name in self._deferred

    def param_element_size(self, model: Any, param_name: str, param: torch.Tensor) -> float:
        """Return the bytes that an element will take: deferred weights are not held, so they count nothing."""
        return 0 if param_name in self._deferred else param.element_size()

    def get_quantize_ops(self) -> ConversionOps:
        """Return the op for deferred tensors."""
        return _Defer()

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        if self.pre_quantized:
            _refuse_unloaded(model)
            for name, layer in packed_modules(model).items():
                if all(parameter.device.type != "meta" for _, parameter in layer.packed_tensors()):
                    _validated(name, layer)
            return model
        tokenizer = _tokenizer_for(self.quantization_config, model)
        config, self.report = compress_model(model, self.quantization_config, self._source, tokenizer)
        self._deferred, self._source = set(), None
        self.quantization_config = model.config.quantization_config = config
        self.pre_quantized = True
        return model

    # Later life --------------------------------------------------------------------------------------------------

    def get_state_dict_and_metadata(self, model: Any) -> tuple[None, dict[str, str]]:
        """Return the metadata of the files to be written: a checksum for every tensor."""
        return None, metadata_of(model.state_dict())

    def is_serializable(self) -> bool:
        """Packed models can be saved."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters can be trained; packed weights are frozen."""
        return True

    @property
    def is_compileable(self) -> bool:
        """The ops have shape rules, so ``generate`` may compile."""
        return True

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        for name, layer in packed_modules(model).items():
            model.set_submodule(name, layer.dequantize(dtype))
        return model


def _raise_first(problems: list[str]) -> None:
    """Raise one error that names the first ten problems, if there are any."""
    if problems:
        more = f"; {len(problems) - 10} more" if len(problems) > 10 else ""
        raise CheckpointError("; ".join(problems[:10]) + more)


def _name_in(model: Any, stored: str) -> str | None:
    """Return the name that a stored module has in this model: a base model lacks the prefix, a head model has it."""
    prefix = getattr(model, "base_model_prefix", "")
    candidates = [stored, stored.removeprefix(f"{prefix}."), f"{prefix}.{stored}"]
    names = {name for name, _ in model.named_modules()}
    return next((name for name in candidates if name in names), None)


def _belongs_to_other_part(model: Any, stored: str) -> bool:
    """Return whether a stored module lies outside the part that is being loaded (a head that a base model lacks)."""
    prefix = getattr(model, "base_model_prefix", "")
    is_base = getattr(model, "base_model", None) is model
    return is_base and not stored.startswith(f"{prefix}.")


def _empty_layer(name: str, row: Any, linear: nn.Linear, headers: dict[str, TensorHeader]) -> PackedLinear:
    """Return the packed layer of a row in the module table, on ``meta``.

    Files that are not safetensors have no headers here; transformers then compares the shapes.

    Raises:
        ValueError: the row, the model's layer and the files' headers disagree.
    """
    format_type, spec = packed_layer_spec(name, row)
    if (spec.out_features, spec.in_features) != (linear.out_features, linear.in_features):
        raise ValueError(
            f"{name}: stored as {spec.out_features} x {spec.in_features}, "
            f"the model's layer is {linear.out_features} x {linear.in_features}"
        )
    _, problems = compare(name, format_type, spec, headers) if headers else (set(), [])
    if problems:
        raise ValueError("; ".join(problems))
    return PackedLinear.empty_like(linear, format_type, spec)


def _validated(name: str, layer: PackedLinear) -> None:
    try:
        layer.packed.validate(name)
    except ValueError as error:
        raise CheckpointError(f"damaged checkpoint: {error}") from error
    for _, parameter in layer.packed_tensors():
        parameter.requires_grad_(False)
    layer.weight.requires_grad_(False)


def _refuse_unloaded(model: Any) -> None:
    """transformers only warns about parameters that were not in the files and fills them at random; this raises.

    A parameter read from a file carries a mark; tied ones are marked as well. Offloaded ones are on ``meta``.
    """
    missing = [
        name
        for name, parameter in model.named_parameters()
        if not getattr(parameter, "_is_hf_initialized", False) and parameter.device.type != "meta"
    ]
    if missing:
        raise CheckpointError(
            f"{len(missing)} tensors are missing from the checkpoint and would be random, first {missing[0]!r}"
        )


def _tokenizer_for(config: LowBitConfig, model: Any) -> Any:
    """Return the tokenizer for calibration text, loaded from where the model came from unless one was given."""
    calibrated = check_calibration(config)
    if calibrated is None or calibration_kind(calibrated.calibration) == "tokens":
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


def quantize(model: Any, config: LowBitConfig) -> RunReport:
    """Compress a transformers model that is already in memory, in place.

    Args:
        model: a dense ``PreTrainedModel``.
        config: a method's config or a recipe.

    Returns:
        The report of the run; the model can be saved with ``save_pretrained`` afterwards.

    Raises:
        TypeError: ``config`` is no config of this package.
        ValueError: the model is quantized already; and all that :func:`compress_model` raises.
    """
    if not isinstance(config, LowBitConfig):
        raise TypeError(f"config must be a config of hf_lowbit, such as ARBConfig, got {type(config).__name__}")
    if getattr(model, "hf_quantizer", None) is not None:
        raise ValueError(f"{type(model).__name__} is quantized already; load the dense checkpoint instead")
    finished, report = compress_model(model, config, tokenizer=_tokenizer_for(config, model))
    model.hf_quantizer = LowBitHfQuantizer(finished, pre_quantized=True)
    model.hf_quantizer.report = report
    model.config.quantization_config = finished
    model.config._is_quantized = model.is_quantized = True
    model.quantization_method = finished.quant_method
    return report
