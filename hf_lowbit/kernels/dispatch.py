"""Which kernel multiplies by a ``binary`` weight; :mod:`hf_lowbit.kernels.choice` says how one is chosen."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hf_lowbit.kernels import reference
from hf_lowbit.kernels.choice import Kernel, Table
from hf_lowbit.kernels.choice import forced as forced
from hf_lowbit.kernels.choice import forced_name as forced_name
from hf_lowbit.kernels.cpu import binary as cpu
from hf_lowbit.kernels.cpu.calls import Call

Parts = tuple[Any, ...]
Sizes = tuple[int, int, int, int]


def _cpu_why_not(dtype: torch.dtype, device: str, parts: Parts, sizes: Sizes) -> str | None:
    return f"tensors on {device}" if device != "cpu" else cpu.unsupported(dtype, parts, sizes)


def _triton_why_not(dtype: torch.dtype, device: str, parts: Parts, sizes: Sizes) -> str | None:
    if device != "cuda":  # ROCm devices are called so, too
        return f"tensors on {device}"
    try:  # not before a GPU needs it: Triton exists for Linux only
        from hf_lowbit.kernels.triton import binary as on_gpu
    except ImportError as error:
        return f"Triton cannot be imported ({type(error).__name__})"
    return on_gpu.unsupported(dtype, parts, sizes)


def _triton_linear(x: Tensor, parts: Parts, bias: Tensor | None, sizes: Sizes) -> Tensor:
    from hf_lowbit.kernels.triton import binary as on_gpu

    arguments: list[Any] = [*parts, bias, *sizes]
    if not on_gpu.supports(x, *arguments)[0]:  # so many tokens that no launch holds them
        return _reference(x, parts, bias, sizes)
    return on_gpu.binary_linear(x, *arguments)


def _reference(x: Tensor, parts: Parts, bias: Tensor | None, sizes: Sizes) -> Tensor:
    arguments: list[Any] = [*parts, bias, *sizes]
    return reference.binary_linear(x, *arguments)


# A case is (dtype of x, device type, parts, sizes).
TABLE = Table(
    Kernel("cpu", "C++ on the packed planes, exact to the dtype", _cpu_why_not, cpu.linear, cpu.dequantize),
    Kernel(
        "cpu-int8",
        "C++ with activations of 8 bits, relative error about 0.006",
        _cpu_why_not,
        lambda x, parts, bias, sizes: cpu.linear(x, parts, bias, sizes, digits=1),
        cpu.dequantize,
        opt_in=True,
    ),
    Kernel("triton", "Triton on the packed planes, not yet timed on a GPU", _triton_why_not, _triton_linear),
    Kernel("reference", "plain torch, rebuilds the dense weight in every call", lambda *_: None, _reference),
)
choose, reasons = TABLE.choose, TABLE.reasons


def binary_linear(x: Tensor, parts: Parts, bias: Tensor | None, sizes: Sizes) -> Tensor:
    """Multiply with the kernel for the case."""
    return choose(x.dtype, x.device.type, parts, sizes).linear(x, parts, bias, sizes)


def binary_call(parts: Parts, bias: Tensor | None, sizes: Sizes) -> Call | None:
    """Return a shorter way to :func:`binary_linear` with one weight and few tokens, or None where there is none."""
    if parts[0].device.type != "cpu" or cpu.unsupported(torch.bfloat16, parts, sizes) is not None:
        return None
    return cpu.call(parts, bias, sizes)


def binary_dequantize(parts: Parts, sizes: Sizes) -> Tensor:
    """Rebuild the dense weight with the kernel for the case."""
    kernel = choose(torch.float32, parts[0].device.type, parts, sizes)
    if kernel.dequantize is not None:
        return kernel.dequantize(parts, sizes)
    arguments: list[Any] = [*parts, *sizes]
    return reference.binary_dequantize(*arguments)
