"""The dense weights of a run: what size they have, where they lie, and when they are in memory.

A weight that is put off is a stub of one element in the model until its turn comes; the checkpoint has it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hf_lowbit.compress.source import CheckpointSource
from hf_lowbit.experts import fused_name, fused_parameters, take_apart
from hf_lowbit.layers import features, stored_shape


class DenseWeights:
    """The weights of layers by name, in the model or in a checkpoint.

    Attributes:
        source: the checkpoint, None if the model is all there is.
    """

    def __init__(self, model: nn.Module, source: CheckpointSource | None) -> None:
        self._model, self.source = model, source

    def shape_of(self, name: str) -> tuple[int, int]:
        """Return (out_features, in_features) of a layer; an expert may still be part of a parameter."""
        if self._has_module(name):
            return features(self._model.get_submodule(name))
        experts, weights = self._fused(name)
        rows, columns = weights.shape[1:]
        return (columns, rows) if experts.is_transposed else (rows, columns)

    def dtype_of(self, name: str) -> torch.dtype:
        """Return the dtype that the weight of a layer has, or will have when it is loaded."""
        if self._has_module(name):
            weight: Any = self._model.get_submodule(name).weight
            return weight.dtype  # type: ignore[no-any-return]
        return self._fused(name)[1].dtype

    def check(self, names: Iterable[str]) -> None:
        """Refuse non-finite or misshapen weights before the long work starts; all of them are named.

        Weights that arrive later, because transformers makes them from several tensors, are checked then.

        Raises:
            ValueError: there are such weights.
        """
        problems = []
        for name in names:
            weight = self._known(name)
            if weight is not None:
                problems += weight_problems(name, weight, stored_shape(self._model.get_submodule(name)))
        if problems:
            raise ValueError("; ".join(problems))

    def take_apart_experts(self, names: Mapping[str, Any]) -> None:
        """Take those experts apart that are among the names and whose weights are in memory."""
        for parameter in dict.fromkeys(filter(None, map(fused_name, names))):
            module_name, _, leaf = parameter.rpartition(".")
            module = self._model.get_submodule(module_name)
            fused = fused_parameters(module).get(leaf)
            if fused is not None and fused.device.type != "meta":
                take_apart(module, leaf, set(names), module_name)

    def materialize(self, names: Iterable[str]) -> list[str]:
        """Read the weights of layers that hold a stub; return which they were."""
        found = []
        for name in names:
            layer: Any = self._model.get_submodule(name)
            if layer.weight.dim() == 1:
                if self.source is None:
                    raise ValueError(f"{name}: there is no checkpoint to read it from")
                weight = self.source.read(f"{name}.weight", layer.weight.dtype).to(layer.weight.device)
                layer.weight = nn.Parameter(weight, requires_grad=False)
                found.append(name)
        return found

    def put_off(self, names: Iterable[str]) -> None:
        """Leave a stub in place of the weights of layers, which :meth:`materialize` reads again."""
        for name in names:
            layer: Any = self._model.get_submodule(name)
            layer.weight = nn.Parameter(layer.weight.new_zeros(1), requires_grad=False)

    def _known(self, name: str) -> Tensor | None:
        """Return the weight of a layer as it is stored, from memory or the checkpoint; None if it is in neither."""
        if fused_name(name) and not self._has_module(name):
            return None
        weight: Any = self._model.get_submodule(name).weight
        if weight.device.type != "meta":
            return weight.detach()
        if self.source is None or self.source.locate(f"{name}.weight") is None:
            return None
        return self.source.read(f"{name}.weight", weight.dtype)

    def _has_module(self, name: str) -> bool:
        try:
            self._model.get_submodule(name)
        except AttributeError:
            return False
        return True

    def _fused(self, name: str) -> tuple[Any, Tensor]:
        """Return the module and the parameter that an expert is part of."""
        owner, _, leaf = str(fused_name(name)).rpartition(".")
        experts = self._model.get_submodule(owner)
        return experts, fused_parameters(experts)[leaf]


def weight_problems(name: str, weight: Tensor, shape: tuple[int, ...]) -> list[str]:
    """Return what is wrong with a dense weight, empty if nothing is."""
    if tuple(weight.shape) != shape:
        return [f"{name}: weight has shape {tuple(weight.shape)}, the model's layer {shape}"]
    if weight.dtype.itemsize == 1:  # float8 and integers: rounded by another program, maybe with scales of its own
        return [f"{name}: weight is {weight.dtype}, not a dense one; load the model in bfloat16, float16 or float32"]
    return [] if bool(torch.isfinite(weight).all()) else [f"{name}: weight holds NaN or infinity"]
