"""Fused projections of queries, keys and values in diffusers, which packed layers cannot take part in.

``fuse_qkv_projections()`` of a model joins dense weights into one layer beside those they came from. Of packed layers
there is no dense weight to join; and a model that was fused before would be saved with layers that its class does not
build when it is loaded. Both are refused by name.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from hf_lowbit.hf.push_model import OfModel
from hf_lowbit.layers import PackedLinear

_NAME = "fuse_qkv_projections"
_FUSES = "fuse_projections"


class FuseProjections(OfModel):
    """``fuse_qkv_projections`` of one packed model."""

    def __call__(self) -> None:
        """Fuse the projections, as diffusers does, where none of them is packed.

        Raises:
            ValueError: some are packed; nothing has changed then.
        """
        model = self.model()
        packed = [
            name
            for name, attention in _attentions(model)
            if any(isinstance(child, PackedLinear) for child in _projections(attention))
        ]
        if packed:
            raise ValueError(
                f"{_NAME}: queries, keys and values of {len(packed)} attention modules are packed and cannot be "
                f"joined (first {packed[0]}); the model runs without, or leave these layers dense with skip"
            )
        getattr(type(model), _NAME)(model)


def offer_fusing(model: Any) -> None:
    """Give a packed model a ``fuse_qkv_projections`` that says what it cannot fuse, if its class has one."""
    if hasattr(type(model), _NAME):
        setattr(model, _NAME, FuseProjections(model))


def withdraw_fusing(model: Any) -> None:
    """Take it away again: the model is dense now."""
    model.__dict__.pop(_NAME, None)


def refuse_fused(model: Any) -> None:
    """Refuse to compress a model whose projections are fused.

    Raises:
        ValueError: they are.
    """
    for name, attention in _attentions(model):
        if getattr(attention, "fused_projections", False):
            raise ValueError(
                f"{name}: its projections are fused, and a model would be saved that cannot be loaded; call "
                "unfuse_qkv_projections() first"
            )


def _attentions(model: Any) -> Iterator[tuple[str, Any]]:
    return ((name, module) for name, module in model.named_modules() if hasattr(module, _FUSES))


def _projections(attention: Any) -> list[Any]:
    """Return the layers that would be joined; others are not touched, such as that of the output."""
    names = ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj")
    return [attention._modules.get(name) for name in names]
