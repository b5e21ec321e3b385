"""Grids for queries, keys, values and soft-max inside attention modules of a known kind.

An attention module stays the object that it is; its class becomes one derived from its own, whose forward pass is the
model's with four places at which values are put on a grid. With the grids switched off it returns the very same bits
as the model's own.

Known is Swin2SR of transformers. It is cosine attention: queries and keys are quantized after they were brought to
length 1, and the factor that other models put into the queries is applied later. The window's mask is added twice, as
the model does.

Source: 2DQuant (arXiv 2406.06649) quantizes both products of the attention; it has no cosine attention.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize, softmax

from hf_lowbit.kernels.rounding import quantize_range

PARTS = ("query", "key", "value", "probabilities")
CHILD = "activation"


class AttentionGrids(nn.Module):
    """The four grids of an attention module.

    Attributes:
        bounds: (4, 2), float32, ends of the grids in the order of :data:`PARTS`; absent where each call finds them.
        bits: of a code.
        off: hand everything on as it is.
        watch: called with the name of each part and its values, for calibration; or None.
        replace: called in place of the stored grids, while they are learned; or None.
    """

    def __init__(self, bits: int, stored: bool, device: torch.device | str | None = None) -> None:
        """Start with grids that are still to be filled, and off."""
        super().__init__()
        start = torch.zeros((len(PARTS), 2), dtype=torch.float32, device=device)
        self.bounds: nn.Parameter | None
        self.register_parameter("bounds", nn.Parameter(start, requires_grad=False) if stored else None)
        self.bits = bits
        self.off = False
        self.watch: Callable[[str, Tensor], None] | None = None
        self.replace: Callable[[str, Tensor], Tensor] | None = None

    def stored_problems(self) -> list[str]:
        """Return what is wrong with the stored ends, empty if nothing is; asked when a model was loaded."""
        if self.bounds is None or self.bounds.device.type == "meta":
            return []
        if not bool(torch.isfinite(self.bounds).all()):
            return ["bounds holds NaN or infinity"]
        return (
            ["bounds: an upper end lies below the lower"]
            if bool((self.bounds[:, 0] > self.bounds[:, 1]).any())
            else []
        )

    def forward(self, part: str, values: Tensor) -> Tensor:
        """Return values of a part on its grid, in their dtype."""
        if self.watch is not None:
            self.watch(part, values)
        if self.replace is not None:
            return self.replace(part, values)
        if self.off:
            return values
        bounds = None if self.bounds is None else self.bounds[PARTS.index(part)]
        rows = values.float().reshape(-1, values.shape[-1])
        return quantize_range(rows, bounds, self.bits).dequantized().view_as(values).to(values.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Move the grids, but never cast them."""
        before = None if self.bounds is None else self.bounds.data
        super()._apply(fn, recurse)
        if self.bounds is not None and before is not None and self.bounds.dtype != before.dtype:
            self.bounds = nn.Parameter(before.to(self.bounds.device), requires_grad=False)
        return self


class QuantizedAttention:
    """First base of every converted class; the second is the model's own."""


class _Swin2SRAttention(QuantizedAttention):
    def forward(
        self: Any, hidden_states: Tensor, attention_mask: Tensor | None = None, output_attentions: bool | None = False
    ) -> tuple[Tensor, ...]:
        windows, tokens, _ = hidden_states.shape
        heads, grids = self.num_attention_heads, self._modules[CHILD]

        def split(layer: nn.Module) -> Tensor:
            found: Tensor = layer(hidden_states)
            return found.view(windows, -1, heads, self.attention_head_size).transpose(1, 2)

        queries, keys, values = split(self.query), split(self.key), split(self.value)
        queries = grids("query", normalize(queries, dim=-1))
        keys = grids("key", normalize(keys, dim=-1))
        scores = queries @ keys.transpose(-2, -1)
        scores = scores * torch.clamp(self.logit_scale, max=math.log(1.0 / 0.01)).exp()
        scores = scores + _position_bias(self).unsqueeze(0)
        if attention_mask is not None:
            count = attention_mask.shape[0]
            mask = attention_mask.unsqueeze(1).unsqueeze(0)
            scores = scores.view(windows // count, count, heads, tokens, tokens) + mask
            scores = (scores + mask).view(-1, heads, tokens, tokens)  # twice, as the model does
        probabilities = self.dropout(softmax(scores, dim=-1))
        context = torch.matmul(grids("probabilities", probabilities), grids("value", values))
        context = context.permute(0, 2, 1, 3).contiguous().view(windows, tokens, self.all_head_size)
        return (context, probabilities) if output_attentions else (context,)


def _position_bias(module: Any) -> Tensor:
    """Return what Swin2SR adds to the scores of a window, (heads, tokens, tokens)."""
    table = module.continuous_position_bias_mlp(module.relative_coords_table).view(-1, module.num_attention_heads)
    tokens = module.window_size[0] * module.window_size[1]
    bias = table[module.relative_position_index.view(-1)].view(tokens, tokens, -1)
    return 16 * torch.sigmoid(bias.permute(2, 0, 1).contiguous())


# class of the model -> its converted form; named, so that transformers' modules need not be imported
_KNOWN: dict[str, type] = {"Swin2SRSelfAttention": _Swin2SRAttention}
_CONVERTED: dict[type, type] = {}


def is_known(module: nn.Module) -> bool:
    """Return whether an attention module can be converted."""
    kind = type(module)
    return kind.__name__ in _KNOWN and kind.__module__.startswith("transformers.models.")


def looks_like_attention(module: nn.Module) -> bool:
    """Return whether a module has projections of queries, keys and values, whatever its class."""
    names = set(module._modules)
    return {"query", "key", "value"} <= names or {"to_q", "to_k", "to_v"} <= names or "qkv" in names


def convert(module: Any, bits: int, stored: bool) -> AttentionGrids:
    """Give an attention module of a known kind its grids, or others if it has some; works on ``meta``.

    Args:
        module: for which :func:`is_known` holds, or a converted one.
        bits: of a code.
        stored: whether the grids are stored; otherwise each call finds its own.

    Returns:
        The grids, part of the module from now on.
    """
    if not isinstance(module, QuantizedAttention):
        own = type(module)
        if own not in _CONVERTED:
            form = _KNOWN[own.__name__]
            _CONVERTED[own] = type(f"Quantized{own.__name__}", (form, own), {"__module__": own.__module__})
        module.__class__ = _CONVERTED[own]
    device = module.query.weight.device
    grids = AttentionGrids(bits, stored, device)
    module.add_module(CHILD, grids)
    return grids


def revert(module: Any) -> None:
    """Give a converted attention module back its own class."""
    module.__class__ = type(module).__bases__[1]
    del module._modules[CHILD]


def converted(model: nn.Module) -> Iterator[tuple[str, AttentionGrids]]:
    """Yield the name of every converted attention module of a model, with its grids."""
    for name, module in model.named_modules():
        if isinstance(module, QuantizedAttention):
            yield name, module._modules[CHILD]  # type: ignore[attr-defined]
