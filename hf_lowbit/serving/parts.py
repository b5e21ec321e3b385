"""Layers as they are stored, side by side in one layer of an engine.

Engines join layers that read the same input: queries, keys and values are one layer there, gate and up another. Packed
weights cannot be joined: each has a spec of its own, may be of another format, or dense. So such a layer holds its
parts, each a layer as everywhere else in this package, and joins what they return. Nothing here knows an engine.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hf_lowbit.errors import CheckpointError
from hf_lowbit.layers import PackedLinear
from hf_lowbit.serving.checkpoint import StoredLayer

_STUB = "weight"


@dataclasses.dataclass(frozen=True)
class Part:
    """What a part of a layer is.

    Attributes:
        name: of the stored module, for messages.
        rows: outputs.
        layer: as it is packed; None for a dense one.
    """

    name: str
    rows: int
    layer: StoredLayer | None


def parts_of(name: str, names: Sequence[str], rows: Sequence[int], layers: Mapping[str, StoredLayer]) -> list[Part]:
    """Return what the parts of an engine's layer are; empty if no part of it is packed.

    Args:
        name: of the engine's layer.
        names: of the modules that the engine has joined in it, in order; the layer's own if none.
        rows: outputs of each module; their sum is what the layer has.
        layers: packed layers by name.

    Raises:
        ValueError: it is packed as a whole and in parts, or the engine has joined something else.
    """
    whole, listed = layers.get(name), [each for each in names if each in layers]
    if whole is not None:  # joined in the checkpoint as well
        if [each for each in listed if each != name]:
            raise ValueError(f"{name}: is packed as a whole and in parts ({', '.join(listed)})")
        return [Part(whole.name, sum(rows), whole)]
    if not listed:
        return []
    if len(names) != len(rows):
        raise ValueError(f"{name}: joins {len(rows)} layers, of which the checkpoint has {', '.join(names)}")
    found = [(each, count, layers.get(each)) for each, count in zip(names, rows, strict=True)]
    return [Part(layer.name if layer else each, count, layer) for each, count, layer in found]


class Parts(nn.ModuleList):
    """The parts of one layer, filled tensor by tensor."""

    def __init__(self, parts: Sequence[Part], columns: int, dtype: torch.dtype, device: torch.device | str) -> None:
        """Make room for them.

        Args:
            parts: at least one, of which one is packed.
            columns: inputs of the layer.
            dtype: of the computation, and of dense parts.
            device: of the weights.

        Raises:
            ValueError: a part has another shape in the checkpoint than in the engine.
        """
        super().__init__(_empty(part, columns, dtype, device) for part in parts)
        self._names = [part.name for part in parts]
        self._missing = {(index, leaf) for index, part in enumerate(self) for leaf in _leaves(part)}
        # under which names tensors come, which parts share, and their dtype
        self.slots = {leaf: own.dtype for part in reversed(self) for leaf, own in part.named_parameters()}

    def take(self, leaf: str, index: int, tensor: Tensor) -> None:
        """Take a tensor of a part.

        Args:
            leaf: its name in the stored module.
            index: of the part.
            tensor: as it stands in the file.

        Raises:
            CheckpointError: the part has no such tensor, or one of another shape or dtype.
        """
        name = f"{self._names[index]}.{leaf}"
        part = self[index]
        own = dict(part.named_parameters()).get(leaf)
        if own is None:
            raise CheckpointError(f"{name}: the layer has no such tensor")
        packed = isinstance(part, PackedLinear) and leaf != _STUB
        if tensor.shape != own.shape or (tensor.dtype != own.dtype if packed else not tensor.is_floating_point()):
            raise CheckpointError(
                f"{name}: is {tensor.dtype} {list(tensor.shape)}, the layer wants {own.dtype} {list(own.shape)}"
            )
        if packed or not isinstance(part, PackedLinear):  # a stub holds nothing
            own.data.copy_(tensor)
        self._missing.discard((index, leaf))

    def finish(self, bias: Tensor | None) -> None:
        """Check that all is there, and all values.

        Args:
            bias: (rows of all parts,), to be added by the parts themselves; None if there is none.

        Raises:
            CheckpointError: tensors are missing, or a value is none that the format allows.
        """
        if self._missing:
            absent = sorted(f"{self._names[index]}.{leaf}" for index, leaf in self._missing)
            raise CheckpointError(f"{len(absent)} tensors are missing from the checkpoint, first {absent[0]}")
        part: Any
        end = 0
        for name, part in zip(self._names, self, strict=True):
            if isinstance(part, PackedLinear):
                try:
                    part.packed.validate(name)
                except ValueError as error:
                    raise CheckpointError(f"damaged checkpoint: {error}") from error
            start, end = end, end + part.out_features
            if bias is not None:
                part.bias = nn.Parameter(bias[start:end].detach().clone(), requires_grad=False)

    def forward(self, input: Tensor) -> Tensor:
        """Return what the parts return, side by side; input (..., columns), result (..., rows of all parts)."""
        outs = [part(input) for part in self]
        return outs[0] if len(outs) == 1 else torch.cat(outs, dim=-1)


def _empty(part: Part, columns: int, dtype: torch.dtype, device: torch.device | str) -> nn.Module:
    if part.layer is None:
        linear = nn.utils.skip_init(nn.Linear, columns, part.rows, bias=False, dtype=dtype, device=device)
        return linear.requires_grad_(False)
    spec = part.layer.spec
    if (spec.out_features, spec.in_features) != (part.rows, columns):
        raise ValueError(
            f"{part.name}: stored as {spec.out_features} x {spec.in_features}, the engine's layer is "
            f"{part.rows} x {columns}"
        )
    return PackedLinear(part.layer.format_type.empty(spec, device), None, dtype)


def _leaves(part: nn.Module) -> list[str]:
    """Return which tensors a part cannot do without: all but the stub of a packed layer."""
    return [leaf for leaf, _ in part.named_parameters() if leaf != _STUB or not isinstance(part, PackedLinear)]
