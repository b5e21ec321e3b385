"""Fused experts taken apart, so that every expert is compressed as the linear layer that it is.

transformers keeps all experts of a layer in one parameter of three dimensions and multiplies with slices of it. Here
that parameter becomes a list of linear layers, ``each_<name>``, dense or packed; the name itself stays usable: an
index gives a factor for ``F.linear`` or ``@``, and the product runs the expert's own layer. So the experts' forward
pass in transformers is used as it is, in its "eager" form, which multiplies expert by expert. The list has another
name than the parameter because transformers' conversion rules, which act on the parameter, must not see its keys.
"""

from __future__ import annotations

from collections.abc import Container
from typing import Any, cast

import torch
from torch import Tensor, nn

PREFIX = "each_"
_PRODUCTS = (torch.matmul, Tensor.matmul, Tensor.__matmul__)


class _Factor:
    """Stands for one expert's weight in a product."""

    def __init__(self, linear: nn.Module, transposed: bool) -> None:
        self._linear, self._transposed = linear, transposed

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inputs, factor, *rest = args
        if isinstance(factor, cls) and not isinstance(inputs, cls):
            if function is nn.functional.linear and not factor._transposed:
                bias = rest[0] if rest else (kwargs or {}).get("bias")
                out = factor._linear(inputs)
                return out if bias is None else out + bias
            if function in _PRODUCTS and factor._transposed:
                return factor._linear(inputs)
        raise TypeError(
            "packed experts are multiplied one by one; use experts_implementation='eager' "
            f"(called with {getattr(function, '__name__', function)})"
        )


class ExpertWeights:
    """Takes the place of a fused parameter; not a module, so that it holds no state of its own.

    Attributes:
        shape, dtype, device: as the fused parameter had them.
    """

    def __init__(self, linears: nn.ModuleList, transposed: bool) -> None:
        self._linears, self._transposed = (linears,), transposed

    def __getitem__(self, index: Any) -> _Factor:
        """Return a factor for the product with one expert.

        Raises:
            TypeError: more than one expert is asked for.
        """
        if isinstance(index, Tensor) and index.numel() != 1:
            raise TypeError("packed experts are multiplied one by one; use experts_implementation='eager'")
        return _Factor(self._linears[0][int(index)], self._transposed)

    @property
    def _first(self) -> nn.Linear:
        return cast(nn.Linear, self._linears[0][0])

    @property
    def dtype(self) -> torch.dtype:
        """Compute dtype."""
        return self._first.weight.dtype

    @property
    def device(self) -> torch.device:
        """Device of the first expert."""
        return self._first.weight.device

    @property
    def shape(self) -> torch.Size:
        """Shape of the fused parameter."""
        first = self._first
        sizes = (
            (first.in_features, first.out_features) if self._transposed else (first.out_features, first.in_features)
        )
        return torch.Size((len(self._linears[0]), *sizes))

    def __getattr__(self, name: str) -> Any:
        """Say what is wrong when code wants a tensor."""
        if name.startswith("__"):
            raise AttributeError(name)
        raise AttributeError(
            f"packed experts have no {name!r}: they are multiplied one by one; use experts_implementation='eager'"
        )


def is_supported(module: nn.Module) -> bool:
    """Return whether a module with fused weights is one of transformers' experts, which multiply with slices."""
    return all(hasattr(module, name) for name in ("is_transposed", "has_bias", "config"))


def fused_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters of a module that hold one matrix per expert."""
    return {name: parameter for name, parameter in module.named_parameters(recurse=False) if parameter.dim() == 3}


def expert_names(module: str, parameter: str, count: int) -> list[str]:
    """Return the names of the linear layers that a fused parameter is taken apart into."""
    return [f"{module}.{PREFIX}{parameter}.{i}" for i in range(count)]


def fused_name(name: str) -> str | None:
    """Return the fused parameter that an expert's layer belongs to, None if the name is no expert's."""
    owner, _, index = name.rpartition(".")
    module, _, leaf = owner.rpartition(".")
    return f"{module}.{leaf.removeprefix(PREFIX)}" if leaf.startswith(PREFIX) and index.isdecimal() else None


def take_apart(
    module: nn.Module, parameter: str, packed: Container[str], name: str, weights: Tensor | None = None
) -> nn.ModuleList:
    """Replace a fused parameter by a list of dense linear layers.

    Args:
        module: the experts, see :func:`is_supported`.
        parameter: name of the fused parameter.
        packed: names of layers that will be packed soon; until then they share the memory of the fused weights. The
            others get memory of their own.
        name: of the module in the model.
        weights: (experts, ...), taken instead of the parameter's own values.

    Returns:
        The list, which is now a child of ``module``.
    """
    own: Any = getattr(module, parameter)
    fused = own.detach() if weights is None else weights.detach()
    transposed = bool(module.is_transposed)
    layers = []
    for expert, weight in zip(expert_names(name, parameter, len(fused)), fused, strict=True):
        matrix = weight.T if transposed else weight
        linear = nn.Linear(matrix.shape[1], matrix.shape[0], bias=False, device="meta")
        alone = matrix if expert in packed else matrix.clone(memory_format=torch.contiguous_format)
        linear.weight = nn.Parameter(alone, requires_grad=False)
        linear._is_hf_initialized = True  # type: ignore[assignment]
        layers.append(linear)
    linears = nn.ModuleList(layers)
    delattr(module, parameter)
    module.add_module(f"{PREFIX}{parameter}", linears)
    module.__dict__[parameter] = ExpertWeights(linears, transposed)
    module.__dict__["_is_hf_initialized"] = True  # transformers' initialisation wants the fused parameter
    config: Any = module.config
    config._experts_implementation = "eager"
    return linears


def put_together(module: nn.Module, parameter: str) -> None:
    """Undo :func:`take_apart` when all layers are dense again."""
    linears: Any = getattr(module, f"{PREFIX}{parameter}")
    transposed = bool(module.is_transposed)
    weights = [linear.weight.detach().T if transposed else linear.weight.detach() for linear in linears]
    delattr(module, f"{PREFIX}{parameter}")
    del module.__dict__[parameter]
    module.register_parameter(
        parameter, nn.Parameter(torch.stack(weights), requires_grad=linears[0].weight.requires_grad)
    )


def expert_lists(model: nn.Module) -> list[tuple[nn.Module, str]]:
    """Return the experts that were taken apart, with the names of their fused parameters."""
    return [
        (module, name)
        for module in model.modules()
        for name, value in list(module.__dict__.items())
        if isinstance(value, ExpertWeights)
    ]
