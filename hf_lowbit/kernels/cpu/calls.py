"""Products of a few tokens with packed weights, with all that does not change from call to call looked up before.

A model calls hundreds of small layers for a token; what the op does in Python takes longer than some of their products
(``python -m benchmarks.kernels.overhead``). The libraries of all formats take the same arguments.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from hf_lowbit.kernels.cpu.library import DTYPES

# Bytes that hold an activation exactly enough for its dtype, in every library.
DIGITS = {torch.float32: 3, torch.float16: 2, torch.bfloat16: 2}


class Call:
    """The product with one weight."""

    def __init__(
        self,
        linear: Any,
        isa: int,
        job: Any,
        weight: Any,
        columns: int,
        most: int,
        bias: Tensor | None,
        tensors: list[Tensor],
        copied: list[Tensor],
        kept: Any = None,
    ) -> None:
        """Look all up.

        Args:
            linear: the library's function.
            isa: number of the instruction set.
            job: structure that describes one product to it.
            weight: structure that describes the weight.
            columns: in_features.
            most: tokens that it serves for.
            bias: (out_features,) or None.
            tensors: of weight and bias, to see when one is moved.
            copied: those from which something was copied, to see when one is written to.
            kept: what else the weight points into.
        """
        self.linear, self.isa = linear, isa
        self._weight, self._tensors, self._copied = weight, tensors, copied
        self._places, self._versions = self._stamp()
        self._kept, self._bias, self._columns, self.rows = kept, bias, columns, int(weight.rows)
        self._most = most * columns
        self.job = job(ctypes.pointer(weight), None if bias is None else bias.data_ptr(), None)
        self._one = job * 1

    def _stamp(self) -> tuple[list[int], list[int]]:
        return [tensor.data_ptr() for tensor in self._tensors], [tensor._version for tensor in self._copied]

    def __call__(self, x: Tensor) -> Tensor | None:
        """Return the product for x (..., in_features), or None where the op has to be asked."""
        if not self.takes(x):
            return None
        dtype = x.dtype
        out = torch.empty((*x.shape[:-1], self.rows), dtype=dtype)
        jobs = self._one(self.job)
        jobs[0].y = out.data_ptr()
        failed = self.linear(
            jobs, 1, x.data_ptr(), DTYPES[dtype], x.numel() // self._columns, DIGITS[dtype], self.isa,
            torch.get_num_threads(),
        )  # fmt: skip
        return None if failed else out

    def takes(self, x: Tensor) -> bool:
        """Return whether this way serves for an input, and the weight is still the one that was looked up."""
        bias = self._bias
        return (
            0 < x.numel() <= self._most
            and x.shape[-1] == self._columns
            and x.dtype in DIGITS
            and x.is_cpu
            and x.is_contiguous()
            and (bias is None or (bias.dtype is x.dtype and bias.is_contiguous()))
            and [tensor.data_ptr() for tensor in self._tensors] == self._places
            and [tensor._version for tensor in self._copied] == self._versions
        )


class Together:
    """Products of one input with several weights of one format, in one call of the library."""

    def __init__(self, calls: list[Call]) -> None:
        """Take the weights, each with as many columns."""
        self._calls, self._jobs = calls, type(calls[0].job) * len(calls)
        self._linear, self._isa = calls[0].linear, calls[0].isa

    def __call__(self, x: Tensor) -> list[Tensor] | None:
        """Return the product with each of the weights, or None where the op has to be asked."""
        if not all(call.takes(x) for call in self._calls):
            return None
        dtype, before = x.dtype, x.shape[:-1]
        outs = [torch.empty((*before, call.rows), dtype=dtype) for call in self._calls]
        jobs = self._jobs(*(call.job for call in self._calls))
        for job, out in zip(jobs, outs, strict=True):
            job.y = out.data_ptr()
        failed = self._linear(
            jobs, len(outs), x.data_ptr(), DTYPES[dtype], x.numel() // x.shape[-1], DIGITS[dtype], self._isa,
            torch.get_num_threads(),
        )  # fmt: skip
        return None if failed else outs
