"""Modules that hold a packed weight, one class per kind of layer; the format decides what is stored and computed.

The module is a subclass of the dense one, its packed state are frozen parameters (so that device maps, offloading and
``num_parameters`` see them), and ``weight`` is a stub of one element. The stub makes a load *without* this package
fail with a shape error instead of running on random weights, and gives third-party code a dtype and a device to read.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hf_lowbit.formats import Format, Spec
from hf_lowbit.kernels.rounding import check_act_bits

_PREFIX = "weight_"
# Subclasses of these have a meaning of their own, which replacing them would lose; so types are compared exactly.
DENSE_TYPES = (nn.Linear, Conv1D)


class PackedModule(nn.Module):
    """What all packed layers share: tensors of a format as frozen parameters, and a stub in place of the weight."""

    weight: Any  # the stub
    format_type: type[Format]
    spec: Any

    def _hold(self, packed: Format, dtype: torch.dtype) -> None:
        """Take the tensors of a format, on their final device or ``meta``; ``dtype`` is carried by the stub."""
        self.format_type, self.spec = type(packed), packed.spec
        device = next(iter(packed.state().values())).device
        self.weight = nn.Parameter(torch.zeros(1, dtype=dtype, device=device), requires_grad=False)
        for name, tensor in packed.state().items():
            self.register_parameter(_PREFIX + name, nn.Parameter(tensor, requires_grad=False))
        self._stored = {_PREFIX + name: tensor.dtype for name, tensor in packed.state().items()}
        self._is_hf_initialized = True  # transformers must not initialise the stub

    def dequantize(self, dtype: torch.dtype | None = None) -> nn.Module:
        """Return a layer with the same weights, not packed, in ``dtype`` (default: that of the stub)."""
        raise NotImplementedError

    def packed_tensors(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield ``(parameter name, parameter)`` of the packed tensors, without stub and bias."""
        for name, dtype in self._stored.items():
            parameter: Any = self._parameters[name]
            if parameter.dtype != dtype:
                _undo_cast(parameter, dtype)
            yield name, parameter

    @property
    def packed(self) -> Format:
        """The packed weight; shares memory with the parameters."""
        state = {name.removeprefix(_PREFIX): parameter for name, parameter in self.packed_tensors()}
        return self.format_type.from_state(state, self.spec)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Move the packed tensors, but never cast them: ``.to(bfloat16)`` on a model must not round stored scales."""
        before = {name: parameter.data for name, parameter in self.packed_tensors()}  # fn may replace .data in place
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = self._parameters[name]
            if new is not None and new.dtype != old.dtype:
                self._parameters[name] = nn.Parameter(old.to(new.device), requires_grad=False)
        return self

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what is made again at the next call."""
        return {**self.__dict__, "_last": None}

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        for _ in self.packed_tensors():  # in the dtype that the format has
            pass
        super()._save_to_state_dict(*args, **kwargs)


class PackedLinear(PackedModule, nn.Linear):
    """A linear layer with a packed weight.

    Tensors of the format are parameters called ``weight_<name>``. ``forward`` goes through the format's op; no dense
    copy of the weight is kept.
    """

    def __init__(self, packed: Format, bias: Tensor | None, dtype: torch.dtype) -> None:
        """Wrap a packed weight.

        Args:
            packed: the weight, on its final device or ``meta``.
            bias: (out_features,) or None.
            dtype: compute dtype, carried by the stub.
        """
        nn.Module.__init__(self)
        self.in_features, self.out_features = packed.spec.in_features, packed.spec.out_features
        self._hold(packed, dtype)
        # ids of the parameters, the parameters (so that no id is used twice), the format made of them, its shorter way
        self._last: tuple[list[int], list[Any], Format, Callable[[Tensor], Tensor | None] | None] | None = None
        # bits of activations for the next calls, for formats that round them; None: as stored. See set_act_bits.
        self.act_bits: int | None = None
        # called before each product, also in compiled blocks, where torch's own hooks of all but one block are ignored
        self.on_call: Callable[[], None] | None = None
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias, bias.requires_grad))
        _watch_adapters()

    @classmethod
    def replacing(cls, dense: nn.Module, packed: Format) -> PackedLinear:
        """Return the layer that takes the place of ``dense``, one of :data:`DENSE_TYPES`; the bias is taken over."""
        kind: Any = PackedConv1D if type(dense) is Conv1D else cls
        layer: PackedLinear = kind(packed, dense.bias, dense.weight.dtype)
        return layer

    @classmethod
    def empty_like(cls, dense: nn.Module, format_type: type[Format], spec: Spec) -> PackedLinear:
        """Return a layer on ``meta`` that takes the place of ``dense`` before its tensors are loaded."""
        layer = cls.replacing(dense, format_type.empty(spec))
        if layer.bias is not None:
            layer.bias = nn.Parameter(torch.empty_like(layer.bias, device="meta"), requires_grad=False)
        return layer

    def forward(self, input: Tensor) -> Tensor:
        """Return ``input @ W.T + bias``; input (..., in_features), result in its dtype."""
        if self.on_call is not None:
            self.on_call()
        if torch.compiler.is_compiling():
            return self._product(self.packed, input)
        # Gathering the tensors takes longer than a small product, so it is done again only when one was replaced.
        ids = [*map(id, self._parameters.values())]
        if self._last is None or ids != self._last[0]:
            packed = self.packed
            self._last = (ids, list(self._parameters.values()), packed, packed.ready(self.bias))
        _, _, packed, ready = self._last
        # the shorter way is for the stored bits
        out = None if ready is None or self.act_bits is not None else ready(input)
        return self._product(packed, input) if out is None else out

    def _product(self, packed: Format, input: Tensor) -> Tensor:
        if self.act_bits is None:
            return packed.linear(input, self.bias)
        return packed.linear_at(input, self.bias, self.act_bits)

    def dequantize(self, dtype: torch.dtype | None = None) -> nn.Module:
        """Return the dense layer with the same weights, in ``dtype`` (default: that of the stub)."""
        dtype = dtype or self.weight.dtype
        weight = self.packed.unpack().to(dtype)
        dense = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        dense.weight = nn.Parameter(weight, requires_grad=False)
        if self.bias is not None:
            dense.bias = nn.Parameter(self.bias.detach().to(dtype), requires_grad=False)
        return dense

    def extra_repr(self) -> str:
        """Return the line that ``print(model)`` shows."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"format={self.format_type.name}, bits_per_weight={self.packed.bits_per_weight:.3f}"
        )


def _undo_cast(parameter: nn.Parameter, stored: torch.dtype) -> None:
    """Give a packed tensor back the dtype it is stored in, unless the cast away from it has lost digits.

    ``peft.prepare_model_for_kbit_training`` makes every half-precision parameter float32, scales too, through
    ``.data``; a checkpoint saved after it would not be one of the format.
    """
    if torch.promote_types(parameter.dtype, stored) == parameter.dtype:
        parameter.data = parameter.data.to(stored)


class PackedConv1D(PackedLinear):
    """A packed ``transformers.pytorch_utils.Conv1D``: a linear layer that GPT-2 stores transposed."""

    def dequantize(self, dtype: torch.dtype | None = None) -> nn.Module:
        """Return the dense layer with the same weights, in ``dtype`` (default: that of the stub)."""
        linear: Any = super().dequantize(dtype)
        with torch.device("meta"):
            dense = Conv1D(self.out_features, self.in_features)
        dense.weight = nn.Parameter(linear.weight.T.contiguous(), requires_grad=False)
        dense.bias = linear.bias
        return dense


def features(dense: Any) -> tuple[int, int]:
    """Return ``(out_features, in_features)`` of one of :data:`DENSE_TYPES`, also if its weight is deferred."""
    if isinstance(dense, Conv1D):
        return dense.nf, dense.nx
    return dense.out_features, dense.in_features


def stored_shape(dense: Any) -> tuple[int, int]:
    """Return the shape in which one of :data:`DENSE_TYPES` keeps its weight."""
    rows, columns = features(dense)
    return (columns, rows) if isinstance(dense, Conv1D) else (rows, columns)


def dense_weight(dense: Any) -> Tensor:
    """Return the weight of one of :data:`DENSE_TYPES` as (out_features, in_features)."""
    weight: Tensor = dense.weight.detach()
    return weight.T if isinstance(dense, Conv1D) else weight


def packed_modules(model: nn.Module) -> dict[str, Any]:
    """Return the packed layers of a model by name, each a :class:`PackedModule`."""
    return {name: module for name, module in model.named_modules() if isinstance(module, PackedModule)}


def check_model(model: Any, argument: str) -> None:
    """Raise TypeError unless it is a model; a pipeline of diffusers holds several."""
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"{argument} must be a model, got {type(model).__name__}; of a pipeline, pass pipeline.transformer"
        )


def set_act_bits(model: nn.Module, bits: int | None) -> int:
    """Choose the bits of activations for the next calls of all packed layers that round them.

    It is a number in memory, which no file keeps. Layers that leave activations as they are stay as they are.

    Args:
        model: with packed layers.
        bits: 2 to 8; 16 to round nothing; None for the bits that each layer was stored with.

    Returns:
        How many layers it holds for.

    Raises:
        TypeError: it is no model, but a pipeline.
        ValueError: the bits are none of these, or no layer of the model rounds activations.
    """
    check_model(model, "model")
    if bits is not None:
        check_act_bits(bits)
    layers = packed_modules(model).values()
    found = [layer for layer in layers if layer.format_type.rounds_activations(layer.spec)]
    if not found:
        raise ValueError(f"no packed layer of {type(model).__name__} rounds activations")
    for layer in found:
        layer.act_bits = bits
    return len(found)


# Adapters --------------------------------------------------------------------------------------------------------


@functools.cache
def _watch_adapters() -> None:
    """Make adapters on packed layers refuse what needs a dense weight: merging, and the weight norms of DoRA.

    Left alone, peft adds its update to ``weight``, the stub: most methods then fail over shapes, after other layers
    were merged already, while IA3 scales the stub and calls itself merged, and DoRA divides by a norm of zero. peft
    has no hook for foreign layers here: it looks for a dense layer's ``weight`` and for quantizers that it knows by
    name. So an adapter is met when it takes a packed layer as its ``base_layer``, by torch's own hook for that, and
    its methods are shadowed on that one object. No class is patched, no version of peft is needed.
    """
    nn.modules.module.register_module_module_registration_hook(_guard_adapter)


def _guard_adapter(holder: Any, name: str, module: nn.Module | None) -> None:
    methods: tuple[str, ...] = ()
    if name == "base_layer" and isinstance(module, Conv1D) and hasattr(holder, "fan_in_fan_out"):
        holder.fan_in_fan_out = True  # dequantized under an adapter that took it for a Linear: stored transposed now
    if name == "base_layer" and isinstance(module, PackedLinear):
        methods = ("merge", "update_layer")
    elif name == "model" and hasattr(holder, "merge_and_unload"):  # peft's tuner: refuses before any layer is merged
        methods = ("merge_and_unload", "merge_adapter")
    for method in methods:
        if hasattr(type(holder), method):
            setattr(holder, method, functools.partial(_call_unless_packed, holder, method))


def _call_unless_packed(holder: nn.Module, method: str, *args: Any, **kwargs: Any) -> Any:
    """Call a method of an adapter, or of the tuner that holds adapters, unless it needs dense weights it has not.

    Raises:
        ValueError: it does.
    """
    packed = [name for name in packed_modules(holder) if name.endswith("base_layer")]
    if packed and method != "update_layer":
        raise ValueError(
            f"merging into packed weights is impossible ({len(packed)} layers): an update does not fit into signs and "
            "scales. Call model.dequantize() first, then merge; or keep the adapter beside the packed model"
        )
    if packed and (kwargs.get("use_dora") or getattr(kwargs.get("config"), "use_dora", False)):
        raise ValueError("DoRA needs the norms of dense weights; use plain LoRA, or call model.dequantize() first")
    return getattr(type(holder), method)(holder, *args, **kwargs)
