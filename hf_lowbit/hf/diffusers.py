"""The quantizer that diffusers calls: compress while loading a dense model, or load a packed one.

It does what the one of transformers does, with the same code; what differs is the order of calls:

* Only runs without data (``calibration=None``) compress a diffusers model: calibration sends text through a language
  model block by block, which a diffusion model does not have.
* Without ``dtype=`` a model gets the dtype it was stored in. diffusers would take float32, transformers takes the
  stored one, and a pipeline of both would then fail over dtypes.
* Scales are taken from the file as they are. diffusers casts every floating tensor to the load dtype first; where it
  writes offloaded tensors to disk, nobody is asked, so that a cast which would round the scales is refused there.
* diffusers only warns of tensors that are missing or left over; here both are errors, before weights are read.
* Checksums of all tensors and of ``config.json`` go into every weight file that ``save_pretrained`` writes, through
  the one hook it has. It writes into the target folder file by file, the config first, so an interrupted save leaves
  a folder that does not load; and an index of shards that lies there already stays beside a save into one file.
  :func:`hf_lowbit.hf.save.save_model` has neither flaw, but saves one model, not a pipeline.
* diffusers passes no options on to a packed model; :func:`hf_lowbit.unverified` is how checksums are put off.
"""

from __future__ import annotations

import re
import weakref
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from accelerate.utils import CustomDtype
from diffusers.configuration_utils import FrozenDict
from diffusers.quantizers import auto as registry_of_diffusers
from diffusers.quantizers.base import DiffusersQuantizer
from torch import Tensor, nn

from hf_lowbit.compress import Intake, Run, RunReport, compress_model
from hf_lowbit.compress.checksums import CONFIG, metadata_of
from hf_lowbit.compress.headers import DTYPES, TensorHeader, packed_leaves, read_headers
from hf_lowbit.config import HfLowbitMethod, LowBitConfig
from hf_lowbit.errors import CheckpointError, UnsupportedModelError
from hf_lowbit.hf import quantcache
from hf_lowbit.hf.fusing import offer_fusing, refuse_fused, withdraw_fusing
from hf_lowbit.hf.packed import (
    build_skeleton,
    check_stored_config,
    check_values,
    dense_source,
    dequantize_layers,
    raise_first,
    safetensors_of,
    verify_files,
)
from hf_lowbit.hf.push_model import offer_push, withdraw_push
from hf_lowbit.layers import packed_modules

NAME = HfLowbitMethod.HF_LOWBIT.value
_WITHOUT_CHECKSUMS = "a block `with hf_lowbit.unverified():`"
_ON_DISK = "disk"
_COMPUTED_IN = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


class LowBitDiffusersQuantizer(DiffusersQuantizer):
    """One quantizer for every method; the config says what to do.

    Attributes:
        report: of the compression run, after a dense model was compressed.
    """

    use_keep_in_fp32_modules = True
    quantization_config: Any  # LowBitConfig; the base class declares its own

    def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.report: RunReport | None = None
        self._intake: Intake | None = None
        self._files: list[str] = []
        self._dtype: torch.dtype | None = None
        self._packed: dict[str, torch.dtype] = {}  # tensors of packed layers, taken from the files as they are
        self._model: weakref.ref[Any] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the model, so that a copied model does not point at the original."""
        return {**self.__dict__, "_model": None}

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Refuse what cannot work before the model is built; called again when the places of modules are known."""
        if not hasattr(DiffusersQuantizer, "maybe_update_loaded_keys"):
            raise ImportError("hf_lowbit needs a diffusers that names a quantizer its files: 0.42 or newer")
        device_map = kwargs.get("device_map")
        if self.pre_quantized and (kwargs or self.quantization_config.modules is not None):
            check_stored_config(self.quantization_config)
            self._refuse_rounding(device_map)
            return
        # for a single file diffusers says that it is packed, and gives no arguments; the tensors tell later
        _refuse_calibrated(self.quantization_config)
        if _on_disk(device_map):
            raise ValueError("hf_lowbit: compressing while loading cannot be combined with disk offload")

    def update_torch_dtype(self, torch_dtype: Any) -> Any:
        """Remember the dtype to load in; None is settled when the files are known.

        Raises:
            ValueError: nothing is computed in it.
        """
        if isinstance(torch_dtype, torch.dtype) and torch_dtype not in _COMPUTED_IN:
            raise ValueError(
                f"hf_lowbit: dtype must be one to compute in, {', '.join(map(str, _COMPUTED_IN))}, got {torch_dtype}"
            )
        self._dtype = torch_dtype
        return torch_dtype

    def maybe_update_loaded_keys(self, loaded_keys: list[str], checkpoint_files: list[str]) -> list[str]:
        """Remember the files; no other call names them."""
        self._files = [*map(str, checkpoint_files)]
        return loaded_keys

    # Loading ---------------------------------------------------------------------------------------------------------

    def _process_model_before_weight_loading(
        self,
        model: Any,
        device_map: Any = None,
        keep_in_fp32_modules: Iterable[str] = (),
        state_dict: Mapping[str, Tensor] | None = None,
        **kwargs: Any,
    ) -> Any:
        fp32 = tuple(keep_in_fp32_modules or ())
        if state_dict is not None:
            self._refuse_packed_file(state_dict)
            self.pre_quantized = False
        if self.pre_quantized:
            self._files = safetensors_of(self._files)
            headers = build_skeleton(model, self.quantization_config.modules or {}, self._files)
            raise_first(_differences(model, headers))
            stubs = {f"{name}.weight" for name in packed_modules(model)}
            self._packed = {
                f"{name}.{leaf}": parameter.dtype
                for name, layer in packed_modules(model).items()
                for leaf, parameter in layer.packed_tensors()
            }
            self._settle_dtype(model, _most_common({name: headers[name] for name in stubs & headers.keys()}), fp32)
            self._refuse_rounding(device_map)
            verify_files(self._files, self.quantization_config, _WITHOUT_CHECKSUMS)
            return model
        quantcache.check_config(model, self.quantization_config)
        source = dense_source(self._files)
        if state_dict is not None:
            self._settle_dtype(model, _most_common(state_dict), fp32)
        elif source is not None:
            headers = {name: header for file in source.files for name, header in read_headers(file).items()}
            self._settle_dtype(model, _most_common(headers), fp32)
        try:
            self._intake = Intake(Run(model, self.quantization_config, source))
        except UnsupportedModelError as error:  # diffusers offers the config to every model of a pipeline
            raise UnsupportedModelError(
                f"{error}; in a pipeline, name what is compressed with components_to_quantize or quant_mapping"
            ) from error
        return model

    def _settle_dtype(self, model: Any, stored: torch.dtype | None, fp32: tuple[str, ...]) -> None:
        """Give an empty model the dtype of its file if no other was asked for; diffusers then loads it in that."""
        if self._dtype is not None or stored not in _COMPUTED_IN:
            return
        for name, parameter in list(model.named_parameters()):
            wanted = torch.float32 if set(fp32) & set(name.split(".")) else stored
            if parameter.is_floating_point() and parameter.dtype != wanted and name not in self._packed:
                _put(model, name, parameter.detach().to(wanted), parameter.requires_grad)

    def update_missing_keys(self, model: Any, missing_keys: list[str], prefix: str) -> list[str]:
        """Refuse a checkpoint without some of the model's parameters, which would stay empty."""
        without = set(missing_keys)
        missing = [name for name, _ in model.named_parameters() if name in without]
        if missing:
            raise CheckpointError(
                f"{len(missing)} tensors are missing from the checkpoint and would be random, first {missing[0]!r}"
            )
        return missing_keys

    def get_special_dtypes_update(self, model: Any, torch_dtype: torch.dtype) -> dict[str, Any]:
        """Say how much room weights will take that are about to be compressed: half a byte each."""
        wants = self._intake.wants if self._intake is not None else (lambda name: False)
        return {name: CustomDtype.INT4 for name, _ in model.named_parameters() if wants(name)}

    def get_cuda_warm_up_factor(self) -> int:
        """Return how to make room in advance: for elements of two bytes, as many as parameters through this."""
        return 2 if self.pre_quantized else 4

    def check_if_quantized_param(
        self, model: Any, param_value: Tensor, param_name: str, state_dict: Mapping[str, Tensor], **kwargs: Any
    ) -> bool:
        """Return whether a tensor is taken by :meth:`create_quantized_param`."""
        if self._intake is not None:
            return self._intake.wants(param_name)
        return param_name in self._packed

    def create_quantized_param(self, *args: Any, **kwargs: Any) -> Any:
        """Take a dense weight to be compressed, or a packed tensor as the file has it.

        Raises:
            ValueError: the weight has another shape than the layer, or is not finite; the layer is named.
        """
        model, value, name, device, state_dict = args[:5]
        if self._intake is None:  # `value` is cast to the dtype of the model, which would round scales
            _put(model, name, state_dict[name].to(device), False)
            return
        self._intake.take(name, value.to(device))
        if self._intake.failure is not None:
            raise self._intake.failure

    @property
    def supports_parallel_loading(self) -> bool:
        """Several threads may load a packed model; a compression run takes one weight after the other."""
        return self._intake is None

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        if self._intake is None:
            _refuse_unloaded(model)
            check_values(model, self._files)
        else:
            intake, self._intake = self._intake, None
            intake.close()
            _refuse_unloaded(model)
            self.quantization_config = intake.run.complete()
            self.report = intake.run.report
            self.pre_quantized = True
        self.mark(model)
        return model

    def mark(self, model: Any) -> None:
        """Say on a packed model that it is one, in the ways that diffusers looks for."""
        self._model = weakref.ref(model)
        model.is_quantized = True
        model.quantization_method = self.quantization_config.quant_method
        model.register_to_config(quantization_config=self.quantization_config)
        # layerwise casting would store the scales in eight bits: packed layers are linear layers to it
        names = tuple(f"^{re.escape(name)}$" for name in packed_modules(model))
        model._skip_layerwise_casting_patterns = (*(type(model)._skip_layerwise_casting_patterns or ()), *names)
        offer_push(model)
        offer_fusing(model)
        # here, since it loads diffusers' models, and that while diffusers may still be loading this module
        from hf_lowbit.hf.delta_gbs import follow_config

        follow_config(model, self.quantization_config)
        quantcache.follow_config(model, self.quantization_config)

    def _refuse_packed_file(self, state_dict: Mapping[str, Tensor]) -> None:
        """Refuse a single packed file: its module table and checksums lie in a folder, which is not named then."""
        leaves = packed_leaves()
        sign = next((name for name in state_dict if name.rpartition(".")[2] in leaves), None)
        if sign is not None or self.quantization_config.modules is not None:
            raise ValueError(
                f"from_single_file reads dense files, this one is packed ({sign or 'as its config says'}); load the "
                "folder with from_pretrained"
            )

    def _refuse_rounding(self, device_map: Any) -> None:
        """Refuse a disk map together with a dtype that cannot hold the scales: diffusers casts what goes to disk."""
        asked = self._dtype
        if asked is None or not _on_disk(device_map):
            return
        rounded = {d for d in self._packed.values() if d.is_floating_point and torch.promote_types(asked, d) != asked}
        if rounded:
            raise ValueError(
                f"hf_lowbit: disk offload with dtype={asked} would round scales stored as "
                f"{', '.join(sorted(map(str, rounded)))}; leave out dtype, and the model is loaded as it was saved"
            )

    # Later life ------------------------------------------------------------------------------------------------------

    def get_state_dict_and_metadata(
        self, state_dict: dict[str, Any], safe_serialization: bool = False
    ) -> tuple[dict[str, Any], dict[str, str]]:
        """Return what is saved, and the metadata of the files: a checksum for every tensor and for ``config.json``.

        Raises:
            ValueError: it cannot be loaded again: pickled files, adapters inside, tensors that are offloaded.
        """
        if not safe_serialization:
            raise ValueError(
                "hf_lowbit: packed models are saved as safetensors files; safe_serialization=False is not"
            )
        adapted = next((name for name in state_dict if ".base_layer." in name), None)
        if adapted is not None:
            raise ValueError(
                f"the model holds adapters ({adapted}); save them with save_lora_weights() of the pipeline, and the "
                "model after unload_lora()"
            )
        away = next((name for name, tensor in state_dict.items() if tensor.device.type == "meta"), None)
        if away is not None:
            raise ValueError(f"{away} is offloaded; load the model without offloading, then save it")
        model = None if self._model is None else self._model()
        if model is not None:
            _refuse_groups_on_disk(model)
            state_dict = _without_widening(model, state_dict)
        if model is None or getattr(model, "hf_quantizer", None) is not self:
            return state_dict, metadata_of(state_dict)
        return state_dict, metadata_of(state_dict, {CONFIG: model.to_json_string()})

    def _dequantize(self, model: Any) -> Any:
        _refuse_groups_on_disk(model)
        from hf_lowbit.hf.delta_gbs import disable_delta_gbs

        disable_delta_gbs(model)
        dequantize_layers(model)
        withdraw_push(model)
        withdraw_fusing(model)
        del model._skip_layerwise_casting_patterns, model.quantization_method
        config = {name: value for name, value in model.config.items() if name != "quantization_config"}
        model._internal_dict = FrozenDict(config)  # diffusers would leave the entry, and save it
        return model

    @property
    def is_serializable(self) -> bool:
        """Packed models can be saved."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters can be trained; packed weights are frozen."""
        return True

    @property
    def is_compileable(self) -> bool:
        """The ops have shape rules."""
        return True


def _refuse_calibrated(config: LowBitConfig) -> None:
    from hf_lowbit.hf.delta_gbs import options_of  # here, as in `mark`

    options_of(config)
    if config.needs not in ("none", "training"):  # the run itself says how what is trained is made
        raise ValueError(
            f"hf_lowbit: {type(config).__name__} asks for calibration ({config.needs}), which needs a language model; "
            "diffusers models are compressed without data: calibration=None"
        )


def _on_disk(device_map: Any) -> bool:
    return isinstance(device_map, dict) and _ON_DISK in map(str, device_map.values())


def _most_common(tensors: Mapping[str, TensorHeader | Tensor]) -> torch.dtype | None:
    """Return the floating dtype that most elements have, None if there are none."""
    counts: Counter[torch.dtype] = Counter()
    for tensor in tensors.values():
        dtype = DTYPES[tensor.dtype] if isinstance(tensor, TensorHeader) else tensor.dtype
        if dtype.is_floating_point:
            counts[dtype] += tensor.count if isinstance(tensor, TensorHeader) else tensor.numel()
    return counts.most_common(1)[0][0] if counts else None


def _differences(model: Any, headers: Mapping[str, TensorHeader]) -> list[str]:
    """Return which parameters the files lack, and which tensors the model has no place for and does not ignore."""
    ignored = model._keys_to_ignore_on_load_unexpected or ()
    places = model.state_dict().keys()
    absent = [f"{name} is in none of the weight files" for name, _ in model.named_parameters() if name not in headers]
    return absent + [
        f"{name}: is in {header.file}, the model has no such tensor"
        for name, header in headers.items()
        if name not in places and not any(re.search(pattern, name) for pattern in ignored)
    ]


def _refuse_unloaded(model: Any) -> None:
    """Refuse a model with parameters that no file has filled, such as by ``ignore_mismatched_sizes``."""
    places = set(map(str, (getattr(model, "hf_device_map", None) or {}).values()))
    if len(places) > 1 or _ON_DISK in places:  # offloaded ones are on "meta", too
        return
    empty = [name for name, parameter in model.named_parameters() if parameter.device.type == "meta"]
    if empty:
        raise CheckpointError(f"{len(empty)} tensors were not in the checkpoint, first {empty[0]!r}")


def _without_widening(model: Any, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return what is saved, with modules that diffusers keeps in float32 in the dtype of the others if that is exact.

    Loading makes them float32 again, whatever the file has; a file in half precision would grow by them.
    """
    layers = packed_modules(model)
    dtypes = {layer.weight.dtype for layer in layers.values()}
    kept, found = set(model._keep_in_fp32_modules or ()), dict(state_dict)
    if len(dtypes) != 1:
        return found
    dtype = dtypes.pop()
    packed = {f"{name}.{leaf}" for name, layer in layers.items() for leaf, _ in layer.packed_tensors()}
    for name, tensor in state_dict.items():
        if tensor.dtype == torch.float32 and name not in packed and kept & set(name.split(".")):
            narrow = tensor.to(dtype)
            if torch.equal(narrow.float(), tensor):
                found[name] = narrow
    return found


def _refuse_groups_on_disk(model: Any) -> None:
    """Refuse a model whose weights lie in the files of a group offload: its tensors hold whatever was in memory."""
    for name, module in model.named_modules():
        hooks = getattr(module, "_diffusers_hook", None)
        group = getattr(None if hooks is None else hooks.get_hook("group_offloading"), "group", None)
        if getattr(group, "offload_to_disk_path", None):
            raise ValueError(
                f"{name or type(model).__name__}: its weights are offloaded to disk by groups; load the model anew, "
                "without offloading"
            )


def _put(model: Any, name: str, tensor: Tensor, requires_grad: bool) -> None:
    """Make a tensor the parameter of this name."""
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    module._parameters[leaf] = nn.Parameter(tensor, requires_grad=requires_grad)


def register() -> None:
    """Make diffusers know the package; calling it again does nothing. It has no function for this, only two tables."""
    quantcache.register()
    registry_of_diffusers.AUTO_QUANTIZER_MAPPING.setdefault(NAME, LowBitDiffusersQuantizer)
    registry_of_diffusers.AUTO_QUANTIZATION_CONFIG_MAPPING.setdefault(NAME, LowBitConfig)


def quantize(model: Any, config: LowBitConfig) -> RunReport:
    """Compress a diffusers model that is already in memory, in place; see :func:`hf_lowbit.quantize`."""
    _refuse_calibrated(config)
    _refuse_groups_on_disk(model)
    refuse_fused(model)
    quantcache.check_config(model, config)
    finished, report = compress_model(model, config)
    model.hf_quantizer = LowBitDiffusersQuantizer(finished, pre_quantized=True)
    model.hf_quantizer.report = report
    model.hf_quantizer.mark(model)
    return report
