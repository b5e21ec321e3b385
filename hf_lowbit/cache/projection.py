"""The key or value projection of a latent attention: gives what a cache keeps, and heads from what it kept."""

from __future__ import annotations

import hashlib
import types
from typing import Any

import torch
from torch import Tensor, nn

from hf_lowbit.formats.latent import LatentFormat, LatentSpec
from hf_lowbit.layers import PackedLinear

_SAMPLE = 4096


class LatentProjection(PackedLinear):
    """A packed linear layer of format ``latent`` whose two halves can be used apart.

    Called with its input alone it is the dense layer's replacement. All uses of the factors go through the call of the
    module, since that is where accelerate puts weights in place that live elsewhere.
    """

    spec: LatentSpec

    @classmethod
    def of(cls, layer: PackedLinear) -> LatentProjection:
        """Return ``layer``, of format ``latent``, as a projection: the same object, so all that refers to it stays."""
        if layer.format_type is not LatentFormat:
            raise TypeError(f"a projection of format {layer.format_type.name!r} has no latents")
        if not isinstance(layer, cls):
            become(layer, cls)
        projection: Any = layer
        return projection

    @classmethod
    def from_factors(
        cls, groups: Any, ups: list[Tensor], downs: list[Tensor], bias: Tensor | None, dtype: torch.dtype
    ) -> LatentProjection:
        """Return a projection made of factors, see :meth:`LatentFormat.pack`; ``dtype`` is that of the factors."""
        bias = None if bias is None else bias.detach().to(ups[0].dtype)
        return cls(LatentFormat.pack(groups, ups, downs, dtype), bias, ups[0].dtype)

    def forward(self, input: Any, part: str = "whole") -> Any:
        """Apply the projection or a part of it.

        Args:
            input: (batch, tokens, in_features), or for "heads" the latents (batch, 1, tokens, sum of ranks).
            part: "whole" for (batch, tokens, out_features); "latent" for (batch, 1, tokens, sum of ranks), which has
                the shape of one head, so that every cache layer of transformers takes it; "heads" for (batch, heads,
                tokens, head_dim), bias included; "stamp" for a text that tells this projection from others, whatever
                the input.
        """
        if part == "whole":
            return super().forward(input)
        packed: Any = self.packed
        if part == "latent":
            return packed.latent(input).unsqueeze(1)
        if part == "heads":
            rows = packed.expand(input.squeeze(1))
            if self.bias is not None:
                rows = rows + self.bias.to(rows.dtype)
            return rows.unflatten(-1, (self.spec.num_heads, self.spec.head_dim)).transpose(1, 2)
        return _stamp(packed)


def _stamp(packed: LatentFormat) -> str:
    """Return a short hash of a sample of the down-projection: enough to tell models apart, taken in microseconds.

    A cache that is filled by one model and read by another gives fluent nonsense. Files hold a hash of all of it.
    """
    flat = packed.down.detach().reshape(-1)
    sample = flat[:: max(1, flat.numel() // _SAMPLE)].cpu().contiguous().view(torch.uint8)
    return hashlib.sha256(repr(packed.spec).encode() + sample.numpy().tobytes()).hexdigest()[:16]


def become(module: Any, kind: Any) -> None:
    """Change the class of a module, also of one whose forward pass accelerate has wrapped.

    Raises:
        ValueError: its forward pass was replaced by something else, which would hide that of the new class.
    """
    wrapped = "_old_forward" in vars(module)  # accelerate keeps there what it calls
    if "forward" in vars(module) and not wrapped:
        raise ValueError(f"the forward pass of this {type(module).__name__} was replaced by another library")
    module.__class__ = kind
    if wrapped:
        module._old_forward = types.MethodType(kind.forward, module)


def is_latent(module: nn.Module | None) -> bool:
    """Return whether a module is a packed layer of format ``latent``."""
    return isinstance(module, PackedLinear) and module.format_type is LatentFormat
