"""Packed layers as the tensors of a safetensors file: how the journal keeps them and processes exchange them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from hf_lowbit.compress.headers import packed_layer_spec
from hf_lowbit.formats import Format


def tensors_of(layers: Mapping[str, Format]) -> dict[str, Tensor]:
    """Return the tensors of packed layers, on the CPU, under the names they have in a checkpoint."""
    return {
        f"{name}.weight_{part}": tensor.detach().cpu().contiguous()
        for name, packed in layers.items()
        for part, tensor in packed.state().items()
    }


def layer_of(name: str, row: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Format:
    """Return a packed layer from the tensors of a parcel.

    Args:
        name: of the layer.
        row: of the module table, see :func:`packed_layer_spec`.
        tensors: may hold those of other layers, too.

    Raises:
        ValueError: the tensors do not fit the row.
    """
    format_type, spec = packed_layer_spec(name, row)
    prefix = f"{name}.weight_"
    state = {key.removeprefix(prefix): t for key, t in tensors.items() if key.startswith(prefix)}
    if unknown := sorted(set(state) - set(format_type.tensor_names)):
        raise ValueError(f"{name}: has no tensors {', '.join(unknown)}")
    packed = format_type.from_state(state, spec)
    packed.validate(name)
    return packed
