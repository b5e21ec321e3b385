"""Fused query-key-value projections taken apart, so that keys and values can be compressed as what they are.

Some models (Phi 3) compute queries, keys and values with one linear layer, ``qkv_proj``. Here it becomes three layers,
``q_proj``, ``k_proj`` and ``v_proj``, beside each other in the attention module, as other models have them. The
attention's own forward pass keeps working: ``qkv_proj`` stays callable and joins what the three return. It is no
module any more, so the state dict names the three. When all three are dense again, :func:`join_fused_qkv` puts the one
layer back, under whose name other programs look for the weights.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

FUSED = "qkv_proj"
PARTS = ("q_proj", "k_proj", "v_proj")


class _Joined:
    """Stands for the fused projection of an attention module; holds no state of its own."""

    def __init__(self, attention: nn.Module) -> None:
        self._attention = attention

    def __call__(self, hidden_states: Tensor) -> Tensor:
        """Return queries, keys and values side by side, as the fused layer does."""
        return torch.cat([part(hidden_states) for part in self.parts()], dim=-1)

    def parts(self) -> list[Any]:
        """Return the three layers, in the order of the fused one's rows."""
        return [self._attention.get_submodule(part) for part in PARTS]


def split_fused_qkv(model: nn.Module, names: Container[str] | None = None) -> list[str]:
    """Split every fused projection of a model into three linear layers that share its memory; works on ``meta``.

    Args:
        model: changed in place; attention modules without a fused projection are left alone.
        names: of the attention modules to split; all by default.

    Returns:
        The names of the attention modules that were split, in the order of the model.

    Raises:
        ValueError: the rows of a fused projection are not those of the heads that the config tells of.
    """
    found: list[tuple[str, Any, list[int]]] = []
    problems = []
    for name, attention in model.named_modules():
        fused, config = attention._modules.get(FUSED), getattr(attention, "config", None)
        if type(fused) is not nn.Linear or config is None or (names is not None and name not in names):
            continue
        head_dim, heads = getattr(attention, "head_dim", 0), getattr(config, "num_attention_heads", 0)
        kv_heads = getattr(config, "num_key_value_heads", None) or heads
        rows = [heads * head_dim, kv_heads * head_dim, kv_heads * head_dim]
        if sum(rows) != fused.out_features:
            problems.append(
                f"{name}.{FUSED} has {fused.out_features} rows, {heads} + 2 · {kv_heads} heads of {head_dim}"
            )
        found.append((name, attention, rows))
    if problems:
        raise ValueError(f"fused projections that cannot be split: {'; '.join(problems)}")
    for _, attention, rows in found:
        _split(attention, rows)
    return [name for name, _, _ in found]


def parts_of(model: nn.Module, names: Iterable[str]) -> Iterator[tuple[str, list[tuple[str, slice]]]]:
    """Yield each parameter of fused projections that were split, with the three it became and their rows in it.

    Args:
        model: its weights are not looked at, ``meta`` will do; the three layers are still dense.
        names: of the attention modules, as :func:`split_fused_qkv` returned them.
    """
    for name in names:
        attention = model.get_submodule(name)
        linears: list[Any] = [attention.get_submodule(part) for part in PARTS]
        for leaf in ["weight"] if linears[0].bias is None else ["weight", "bias"]:
            found, start = [], 0
            for part, linear in zip(PARTS, linears, strict=True):
                found.append((f"{name}.{part}.{leaf}", slice(start, start + linear.out_features)))
                start += linear.out_features
            yield f"{name}.{FUSED}.{leaf}", found


def join_fused_qkv(model: nn.Module) -> list[str]:
    """Undo :func:`split_fused_qkv` where all three layers are plain linear ones; return the attentions' names."""
    joined = []
    for name, attention in model.named_modules():
        standing = vars(attention).get(FUSED)
        if not isinstance(standing, _Joined) or any(type(part) is not nn.Linear for part in standing.parts()):
            continue
        parts = standing.parts()
        rows = sum(part.out_features for part in parts)
        fused = nn.Linear(parts[0].in_features, rows, bias=parts[0].bias is not None, device="meta")
        for leaf in dict(fused.named_parameters()):
            tensors = [getattr(part, leaf) for part in parts]
            trained = any(tensor.requires_grad for tensor in tensors)
            setattr(fused, leaf, nn.Parameter(torch.cat([t.detach() for t in tensors]), requires_grad=trained))
        fused.train(parts[0].training)
        for part in PARTS:
            delattr(attention, part)
        del attention.__dict__[FUSED]
        attention.add_module(FUSED, fused)
        joined.append(name)
    return joined


def _split(attention: nn.Module, rows: list[int]) -> None:
    fused: Any = attention._modules.pop(FUSED)
    weights = fused.weight.split(rows)
    biases = [None] * 3 if fused.bias is None else fused.bias.split(rows)
    for part, weight, bias in zip(PARTS, weights, biases, strict=True):
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
        linear.weight = nn.Parameter(weight.detach(), requires_grad=fused.weight.requires_grad)
        if bias is not None:
            linear.bias = nn.Parameter(bias.detach(), requires_grad=fused.bias.requires_grad)
        linear.train(fused.training)
        attention.add_module(part, linear)
    attention.__dict__[FUSED] = _Joined(attention)
