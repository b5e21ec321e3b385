"""Which kernel multiplies: each says for a case whether it can, or why not, and the first that can is taken.

There is no environment variable. :func:`forced` is for tests and measurements, and for the opt-in fast mode.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from hf_lowbit.kernels import reference
from hf_lowbit.kernels.cpu import binary as cpu

Parts = tuple[Any, ...]
Sizes = tuple[int, int, int, int]


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One way to multiply by a ``binary`` weight.

    Attributes:
        name: for :func:`forced` and for tables.
        summary: what it does, in a few words.
        opt_in: never taken unless forced.
        why_not: ``(dtype, device type, parts, sizes) -> reason or None``.
        linear: ``(x, parts, bias, sizes) -> out``.
        dequantize: ``(parts, sizes) -> weight``, or None for the reference.
    """

    name: str
    summary: str
    why_not: Callable[[torch.dtype, str, Parts, Sizes], str | None]
    linear: Callable[[Tensor, Parts, Tensor | None, Sizes], Tensor]
    dequantize: Callable[[Parts, Sizes], Tensor] | None = None
    opt_in: bool = False


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


# In order of preference.
KERNELS = {
    kernel.name: kernel
    for kernel in (
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
}
_forced: str | None = None


@contextlib.contextmanager
def forced(name: str) -> Iterator[None]:
    """Use one kernel within a ``with`` statement, in all threads.

    Raises:
        ValueError: there is no kernel of this name.
    """
    global _forced
    if name not in KERNELS:
        raise ValueError(f"unknown kernel {name!r}; known: {', '.join(KERNELS)}")
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


def forced_name() -> str | None:
    """Return the name that :func:`forced` asks for; ops with a table of their own look it up there."""
    return _forced


def choose(dtype: torch.dtype, device: str, parts: Parts, sizes: Sizes) -> Kernel:
    """Return the kernel for a case.

    Raises:
        RuntimeError: a kernel is forced that cannot do it; with the reason.
    """
    if _forced is not None:
        kernel = KERNELS[_forced]
        reason = kernel.why_not(dtype, device, parts, sizes)
        if reason is not None:
            raise RuntimeError(f"kernel {kernel.name!r} was asked for and cannot multiply: {reason}")
        return kernel
    return next(k for k in KERNELS.values() if not k.opt_in and k.why_not(dtype, device, parts, sizes) is None)


def reasons(dtype: torch.dtype, device: str, parts: Parts, sizes: Sizes) -> dict[str, str]:
    """Return for every kernel why it is taken or not, for tables."""
    found, taken = {}, False
    for name, kernel in KERNELS.items():
        reason = kernel.why_not(dtype, device, parts, sizes)
        if reason is not None:
            found[name] = f"cannot: {reason}"
        elif kernel.opt_in:
            found[name] = f"on request: {kernel.summary}"
        else:
            found[name] = f"{'could, but is slower' if taken else 'taken'}: {kernel.summary}"
            taken = True
    return found


def binary_linear(x: Tensor, parts: Parts, bias: Tensor | None, sizes: Sizes) -> Tensor:
    """Multiply with the kernel for the case."""
    return choose(x.dtype, x.device.type, parts, sizes).linear(x, parts, bias, sizes)


def binary_call(parts: Parts, bias: Tensor | None, sizes: Sizes) -> cpu.Call | None:
    """Return a shorter way to :func:`binary_linear` with one weight and few tokens, or None where there is none."""
    if parts[0].device.type != "cpu" or cpu.unsupported(torch.bfloat16, parts, sizes) is not None:
        return None
    return cpu.Call(parts, bias, sizes)


def binary_dequantize(parts: Parts, sizes: Sizes) -> Tensor:
    """Rebuild the dense weight with the kernel for the case."""
    kernel = choose(torch.float32, parts[0].device.type, parts, sizes)
    if kernel.dequantize is not None:
        return kernel.dequantize(parts, sizes)
    arguments: list[Any] = [*parts, *sizes]
    return reference.binary_dequantize(*arguments)
