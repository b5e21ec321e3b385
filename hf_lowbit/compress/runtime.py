"""What methods prepare in a model beside its packed layers, such as grids inside attention."""

from __future__ import annotations

from torch import nn

from hf_lowbit import registry
from hf_lowbit.config import LowBitConfig
from hf_lowbit.recipe import rules_of


def attach_runtime(model: nn.Module, config: LowBitConfig) -> None:
    """Let methods prepare what is stored or done beside packed layers; where it is there already, it stays.

    Works on ``meta``: a packed model is prepared so before its tensors are loaded.
    """
    for _, rule in rules_of(config):
        method = registry.get(rule.method)
        if method.attach is not None:
            method.attach(model, rule)


def detach_runtime(model: nn.Module, config: LowBitConfig) -> None:
    """Take away what :func:`attach_runtime` has prepared, where layers are dense again."""
    for _, rule in rules_of(config):
        method = registry.get(rule.method)
        if method.detach is not None:
            method.detach(model)
