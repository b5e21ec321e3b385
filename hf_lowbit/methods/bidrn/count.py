"""Parameters and operations of a network as the field counts them, and as they are stored.

``params = P_binary / 32 + P_real`` and ``operations = BOPs / 64 + FLOPs``, where a multiplication with its addition is
one operation. The recount of the published table also needs one operation for each element that a convolution writes;
both are given.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import nn

from hf_lowbit.methods.bidrn.modules import BinaryUnit


@dataclasses.dataclass
class Count:
    """What was counted.

    Attributes:
        binary_params, real_params: weights of binary convolutions, and all other parameters.
        binary_macs, real_macs: multiplications with additions of binary and of real convolutions and linear layers.
        outputs: elements that convolutions write.
    """

    binary_params: int = 0
    real_params: int = 0
    binary_macs: int = 0
    real_macs: int = 0
    outputs: int = 0

    @property
    def params(self) -> float:
        """Parameters, 32 binary ones as one."""
        return self.binary_params / 32 + self.real_params

    @property
    def macs(self) -> float:
        """Operations, 64 binary ones as one, without those of :attr:`outputs`."""
        return self.binary_macs / 64 + self.real_macs

    @property
    def operations(self) -> float:
        """Operations, with one for each element that a convolution writes."""
        return self.macs + self.outputs


def count(model: nn.Module, *inputs: Any) -> Count:
    """Count the parameters of a model, and the operations of one call.

    Args:
        model: in training form or real, also on ``meta``; it is run once without gradients.
        inputs: of the call, on the device of the model.
    """
    found = Count()
    weights = {id(unit.weight) for unit in model.modules() if isinstance(unit, BinaryUnit)}
    for parameter in model.parameters():
        if id(parameter) in weights:
            found.binary_params += parameter.numel()
        else:
            found.real_params += parameter.numel()

    def look(module: Any, given: Any, out: Any) -> None:
        if isinstance(module, nn.Linear):
            found.real_macs += out.numel() * module.in_features
            return
        taps = module.weight.shape[2] * module.weight.shape[3]
        if module.transposed:  # each input element meets every tap
            macs = given[0].numel() * taps * module.out_channels // module.groups
        else:
            macs = out.numel() * taps * module.in_channels // module.groups
        found.outputs += out.numel()
        if isinstance(module, BinaryUnit):
            found.binary_macs += macs
        else:
            found.real_macs += macs

    kinds = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)
    handles = [module.register_forward_hook(look) for module in model.modules() if isinstance(module, kinds)]
    training = model.training
    try:
        model.eval()
        with torch.no_grad():
            model(*inputs)
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    return found
