"""Modules that hold a packed weight, one class per kind of layer; the format decides what is stored and computed.

The module is a subclass of the dense one, its packed state are frozen parameters (so that device maps, offloading and
``num_parameters`` see them), and ``weight`` is a stub of one element. The stub makes a load *without* this package
fail with a shape error instead of running on random weights, and gives third-party code a dtype and a device to read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from hf_lowbit.formats import Format, Spec

_PREFIX = "weight_"


class PackedLinear(nn.Linear):
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
        self.format_type, self.spec = type(packed), packed.spec
        device = next(iter(packed.state().values())).device
        self.weight = nn.Parameter(torch.zeros(1, dtype=dtype, device=device), requires_grad=False)
        for name, tensor in packed.state().items():
            self.register_parameter(_PREFIX + name, nn.Parameter(tensor, requires_grad=False))
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias, bias.requires_grad))
        self._is_hf_initialized = True  # transformers must not initialise the stub

    @classmethod
    def empty_like(cls, linear: nn.Linear, format_type: type[Format], spec: Spec) -> PackedLinear:
        """Return a layer on ``meta`` that takes the place of ``linear`` before its tensors are loaded."""
        layer = cls(format_type.empty(spec), None, linear.weight.dtype)
        if linear.bias is not None:
            layer.bias = nn.Parameter(torch.empty_like(linear.bias, device="meta"), requires_grad=False)
        return layer

    def packed_tensors(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield ``(parameter name, parameter)`` of the packed tensors, without stub and bias."""
        for name in self.format_type.tensor_names:
            parameter = self._parameters.get(_PREFIX + name)
            if parameter is not None:
                yield _PREFIX + name, parameter

    @property
    def packed(self) -> Format:
        """The packed weight; shares memory with the parameters."""
        state = {name.removeprefix(_PREFIX): parameter for name, parameter in self.packed_tensors()}
        return self.format_type.from_state(state, self.spec)

    def forward(self, input: Tensor) -> Tensor:
        """Return ``input @ W.T + bias``; input (..., in_features), result in its dtype."""
        return self.packed.linear(input, self.bias)

    def dequantize(self, dtype: torch.dtype | None = None) -> nn.Linear:
        """Return a dense layer with the same weights, in ``dtype`` (default: that of the stub)."""
        dtype = dtype or self.weight.dtype
        weight = self.packed.unpack().to(dtype)
        dense = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        dense.weight = nn.Parameter(weight, requires_grad=False)
        if self.bias is not None:
            dense.bias = nn.Parameter(self.bias.detach().to(dtype), requires_grad=False)
        return dense

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Move the packed tensors, but never cast them: ``.to(bfloat16)`` on a model must not round stored scales."""
        before = {name: parameter.data for name, parameter in self.packed_tensors()}  # fn may replace .data in place
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = self._parameters[name]
            if new is not None and new.dtype != old.dtype:
                self._parameters[name] = nn.Parameter(old.to(new.device), requires_grad=False)
        return self

    def extra_repr(self) -> str:
        """Return the line that ``print(model)`` shows."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"format={self.format_type.name}, bits_per_weight={self.packed.bits_per_weight:.3f}"
        )


def packed_modules(model: nn.Module) -> dict[str, PackedLinear]:
    """Return the packed layers of a model by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, PackedLinear)}
