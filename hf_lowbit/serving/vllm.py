"""Packed checkpoints in vLLM, unchanged: ``vllm serve FOLDER`` finds ``quant_method`` "hf_lowbit" in ``config.json``.

What vLLM asks of a quantization is a config, which is read once from the model's, and a method for each linear layer.
The config is read and the files are compared with it in the process that the user has started, before any engine is;
the layers are made and filled in the processes of the engine. Their products are those of
:class:`hf_lowbit.layers.PackedLinear`, so tokens are those of transformers but for the order in which sums are made.

Written for and tested with vLLM 0.32 on CPUs.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import get_current_vllm_config_or_none
from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS, register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.model_executor.model_loader.weight_utils import download_weights_from_hf

from hf_lowbit.errors import CheckpointError
from hf_lowbit.serving.checkpoint import StoredLayer, check_files, renamed, stored_layers
from hf_lowbit.serving.parts import Part, Parts, parts_of

logger = logging.getLogger(__name__)
NAME = "hf_lowbit"
_PARTS = "hf_lowbit_parts"  # of an engine's layer: where its weights are
_SHARDS = {"q": 0, "k": 1, "v": 2}
# Ways of loading that hand tensors over one by one, by name, as the files have them.
_LOAD_FORMATS = ("auto", "hf", "safetensors")
_FILES = ["*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json"]


class HfLowbitServed(QuantizationConfig):
    """The ``quantization_config`` of a packed model, as vLLM wants it."""

    def __init__(self, layers: Mapping[str, StoredLayer]) -> None:
        """Take the packed layers by name; see :func:`hf_lowbit.serving.checkpoint.stored_layers`."""
        super().__init__()
        self._layers = dict(layers)
        self._names: dict[str, str] | None = None  # in the files; known when these were compared
        self._mappers: list[Any] = []
        self._placed: dict[str, StoredLayer] | None = None
        self._wanted: set[str] = set()  # names of packed layers that no layer of the engine has taken yet

    def __repr__(self) -> str:
        """Return how vLLM shows it in its log."""
        return f"{type(self).__name__}({len(self._layers)} packed layers)"

    # Read once, where the user has started the engine ----------------------------------------------------------------

    def get_name(self) -> Any:
        """Return "hf_lowbit"."""
        return NAME

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """Return all dtypes that packed layers take."""
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """Return 0: what a device can do, the kernels find out themselves."""
        return 0

    @staticmethod
    def get_config_filenames() -> list[str]:
        """Return none: all is in ``config.json``."""
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> HfLowbitServed:
        """Read the config of a packed model.

        Raises:
            ValueError: it is not valid, or something in it is not served.
            CheckpointError: it is not that of a finished model.
        """
        return cls(stored_layers(config))

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        """Compare the files of a local folder with the config; those of a Hub model are when they have come.

        Raises:
            CheckpointError: they do not fit, or are damaged.
        """
        if os.path.isdir(model_name):
            self._names = check_files(model_name, self._layers)

    # In the processes of the engine ----------------------------------------------------------------------------------

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Take note of how vLLM renames what the files hold."""
        self._mappers.append(hf_to_vllm_mapper)

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """Return what is done with a layer: the method for packed ones, vLLM's own for all others.

        Raises:
            ValueError: the layer is packed and none that can be served, or the engine was started with something that
                packed layers cannot do.
            CheckpointError: the files do not fit the config, or are damaged.
        """
        layers = self._table()
        if not isinstance(layer, LinearBase):
            below = next((name for name in layers if name == prefix or name.startswith(f"{prefix}.")), None)
            experts = hasattr(layer, "local_num_experts") or "Expert" in type(layer).__name__
            if below is not None and (isinstance(layer, VocabParallelEmbedding) or experts):
                raise ValueError(f"{below}: packed layers in a {type(layer).__name__} are not served by hf_lowbit")
            return None
        parent, _, leaf = prefix.rpartition(".")
        joined = self.packed_modules_mapping.get(leaf, [leaf])
        names = [f"{parent}.{each}" if parent else each for each in joined]
        if not any(name in layers for name in (prefix, *names)):
            return UnquantizedLinearMethod()
        self._wanted -= {prefix, *names}
        return PackedLinearMethod(self, names)

    def layers(self) -> dict[str, StoredLayer]:
        """Return the packed layers by the names that they have in the engine."""
        return self._table()

    def refuse_left_over(self) -> None:
        """Raise CheckpointError if packed layers have found no place in the model."""
        config = get_current_vllm_config_or_none()
        several = config is not None and config.parallel_config.pipeline_parallel_size > 1  # each has its own layers
        left, self._wanted = sorted(self._wanted), set()
        if left and not several:
            raise CheckpointError(
                f"{len(left)} packed layers have no place in vLLM's model, first {left[0]}; this model is not served"
            )

    def _table(self) -> dict[str, StoredLayer]:
        """Return the packed layers by the names in the engine, found when the first layer asks."""
        if self._placed is None:
            config = get_current_vllm_config_or_none()
            if config is not None:
                refuse_engine(config)
            if self._names is None and config is not None:
                self._names = check_files(_fetched(config), self._layers)
            names = list((self._names or {name: name for name in self._layers}).values())
            for mapper in self._mappers:
                names = [mapper.map_name(name) or name for name in names]
            self._placed = renamed(self._layers, names)
            self._wanted = set(self._placed)
        return self._placed


def refuse_engine(config: Any) -> None:
    """Refuse what an engine was started with and packed layers cannot do.

    Args:
        config: ``VllmConfig``.

    Raises:
        ValueError: says what, and the way out.
    """
    parallel, load = config.parallel_config, config.load_config
    if parallel.tensor_parallel_size > 1:
        raise ValueError(
            f"hf_lowbit: tensor_parallel_size {parallel.tensor_parallel_size} is not served, since packed rows cannot "
            "be cut apart; use 1, and data_parallel_size for more throughput"
        )
    if parallel.enable_expert_parallel:
        raise ValueError("hf_lowbit: expert parallelism is not served; leave enable_expert_parallel out")
    if config.lora_config is not None:
        raise ValueError(
            "hf_lowbit: LoRA adapters are not served on packed layers; leave enable_lora out, or use transformers"
        )
    if str(load.load_format) not in _LOAD_FORMATS:
        raise ValueError(
            f"hf_lowbit: load_format {load.load_format!r} is not served; packed checkpoints are safetensors files "
            f"({', '.join(_LOAD_FORMATS)})"
        )
    if config.model_config.quantization_config is not None:
        raise ValueError("hf_lowbit: packed layers are not quantized again; leave quantization_config out")


def _fetched(config: Any) -> str:
    """Return the folder of a model from the Hub, fetched to where vLLM will look for it."""
    model, load = config.model_config, config.load_config
    if os.path.isdir(model.model):
        return str(model.model)
    folder: str = download_weights_from_hf(
        model.model, load.download_dir, _FILES, model.revision, ignore_patterns=load.ignore_patterns
    )
    return folder


class PackedLinearMethod(LinearMethodBase):
    """What vLLM does with a linear layer of which at least one part is packed."""

    def __init__(self, config: HfLowbitServed, names: list[str]) -> None:
        """Take the names of the modules that the layer joins, in order."""
        self._config, self._names = config, names
        self._parts: Parts | None = None  # of the one layer that this method is for, while tensors come

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Make room for the parts, and an empty parameter for each name under which the loader brings tensors.

        Raises:
            ValueError: the layer is sharded, or has other sizes than in the checkpoint.
        """
        name = getattr(layer, "prefix", self._names[0])
        if input_size_per_partition != input_size or sum(output_partition_sizes) != output_size:
            raise ValueError(f"{name}: packed rows cannot be cut apart for several processes")
        found = parts_of(name, self._names, output_partition_sizes, self._config.layers())
        parts = Parts(found, input_size, params_dtype, torch.get_default_device())
        # no submodule yet: vLLM's way for models without code of its own replaces all linear modules that it finds
        self._parts = parts
        for leaf, dtype in parts.slots.items():
            slot = nn.Parameter(torch.empty(0, dtype=dtype), requires_grad=False)
            slot.weight_loader = _loader(parts, leaf, found)  # type: ignore[attr-defined]
            layer.register_parameter(leaf, slot)

    def process_weights_after_loading(self, layer: Any) -> None:
        """Check what was loaded; from here on the layer has its parts, and in place of a weight a stub.

        Raises:
            CheckpointError: tensors are missing or hold values that the format does not allow.
            ValueError: the engine asks a second time, as it does to take other weights while it runs.
        """
        self._config.refuse_left_over()
        parts, self._parts = self._parts, None
        if parts is None:
            raise ValueError(f"{self._names[0]}: packed weights are loaded once; start another engine to load others")
        setattr(layer, _PARTS, parts)
        added_here = getattr(layer, "bias", None) is not None and not getattr(layer, "skip_bias_add", False)
        parts.finish(layer.bias if added_here else None)
        for leaf in parts.slots:
            delattr(layer, leaf)
        layer.weight = nn.Parameter(torch.zeros(1, dtype=layer.params_dtype), requires_grad=False)

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return the product with all parts, side by side, bias included."""
        out: Tensor = getattr(layer, _PARTS)(x)
        return out


def _loader(parts: Parts, leaf: str, found: list[Part]) -> Any:
    """Return what vLLM's loader calls with a tensor of a layer and, of a joined one, which part it belongs to."""

    def load(parameter: nn.Parameter, loaded: Tensor, shard: Any = None) -> None:
        index = _SHARDS.get(shard, -1) if isinstance(shard, str) else 0 if shard is None else shard
        if type(index) is not int or not 0 <= index < len(parts) or (shard is None and len(parts) > 1):
            raise CheckpointError(f"{found[0].name}: a tensor {leaf} of part {shard!r}, which the layer does not have")
        parts.take(leaf, index, loaded)

    return load


def register() -> None:
    """Make vLLM know the config; calling it again does nothing."""
    if NAME not in QUANTIZATION_METHODS:
        register_quantization_config(NAME)(HfLowbitServed)
