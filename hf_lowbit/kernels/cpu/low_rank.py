"""The product with two dense factors on a processor, for few tokens: one pass over each, nothing stored between.

A product with one token reads every weight once, so memory sets its time. Torch reads the small matrices that factors
are far more slowly than memory gives them, and converts factors of another dtype than the activations in each call
(``python -m benchmarks.kernels.low_rank``). The compiled library reads each factor row by row as it lies, asks for the
next rows meanwhile, and holds ``rank`` floats per token in between. With many tokens arithmetic counts, for which
torch has matrix units.

Rounding: activations and factors as they are, sums and what is between in float32, the result rounded once.
"""

from __future__ import annotations

import ctypes
import functools
import logging
from typing import Any

import torch
from torch import Tensor

from hf_lowbit.kernels.cpu.library import DTYPES, open_library

logger = logging.getLogger(__name__)
ABI = 1
ISAS = ("portable", "avx2", "avx512")
# Above so many tokens torch's products are as fast, by the dtype of activations and factors; and where the two differ,
# so that torch has to convert. Measured with `python -m benchmarks.kernels.low_rank`.
MOST_TOKENS = {torch.float32: 16, torch.float16: 8, torch.bfloat16: 8}
MOST_TOKENS_MIXED = 32


@functools.cache
def load() -> tuple[Any, str]:
    """Return the library and the processor's instruction set, or None and why there is none."""
    library, reason = open_library("_low_rank", "hflb_lr_abi", ABI)
    if library is None:
        return None, reason
    pointer, integer = ctypes.c_void_p, ctypes.c_int64
    library.hflb_lr_linear.restype = ctypes.c_int
    library.hflb_lr_linear.argtypes = [*[pointer] * 5, *[integer] * 8]
    isa = ISAS[library.hflb_lr_isa()]
    if isa == "portable":
        return None, "this processor has no AVX2, for which it is written"
    return library, isa


def most_tokens(dtype: torch.dtype, held: torch.dtype) -> int:
    """Return up to how many tokens this way is the faster one, for activations and factors of these dtypes."""
    return MOST_TOKENS[dtype] if dtype is held else MOST_TOKENS_MIXED


def unsupported(dtype: torch.dtype, up: Tensor, down: Tensor) -> str | None:
    """Return why this kernel cannot multiply, None if it can."""
    library, reason = load()
    if library is None:
        return f"no compiled library: {reason}"
    if dtype not in DTYPES or up.dtype not in DTYPES or down.dtype is not up.dtype:
        return f"activations of {dtype}, factors of {up.dtype} and {down.dtype}"
    if not up.is_contiguous() or not down.is_contiguous():
        return "factors are not contiguous"
    return None


def linear(x: Tensor, up: Tensor, down: Tensor, bias: Tensor | None) -> Tensor:
    """Multiply, as the op defines it; the arguments must be such that :func:`unsupported` has nothing against them."""
    rows = x.contiguous()
    call = Call(up, down, None if bias is None else bias.to(x.dtype).contiguous())
    return call.run(rows)


class Call:
    """The product with two factors, with all that does not change from call to call looked up before."""

    def __init__(self, up: Tensor, down: Tensor, bias: Tensor | None) -> None:
        """Look all up; a bias must be contiguous and in the dtype of the activations, which :meth:`__call__` sees."""
        self._tensors = [up, down] if bias is None else [up, down, bias]
        self._places = [tensor.data_ptr() for tensor in self._tensors]
        self._sizes = (up.shape[0], up.shape[1], down.shape[1])
        self._bias, self._held = bias, up.dtype
        self._most = {dtype: most_tokens(dtype, up.dtype) * down.shape[1] for dtype in DTYPES}
        library, isa = load()
        self._linear, self._isa = library.hflb_lr_linear, ISAS.index(isa)

    def __call__(self, x: Tensor) -> Tensor | None:
        """Return the product for x (..., in_features), or None where this is not the way for it."""
        bias = self._bias
        if not (
            0 < x.numel() <= self._most.get(x.dtype, 0)
            and x.shape[-1] == self._sizes[2]
            and x.is_cpu
            and x.is_contiguous()
            and (bias is None or bias.dtype is x.dtype)
            and [tensor.data_ptr() for tensor in self._tensors] == self._places
        ):
            return None
        return self.run(x)

    def run(self, x: Tensor) -> Tensor:
        """Return the product for contiguous x, whatever the number of tokens.

        Raises:
            MemoryError: there is none for the activations as floats.
        """
        n, rank, m = self._sizes
        out = torch.empty((*x.shape[:-1], n), dtype=x.dtype)
        up, down = self._places[:2]
        failed = self._linear(
            x.data_ptr(), up, down, self._places[2] if len(self._places) > 2 else None, out.data_ptr(),
            DTYPES[x.dtype], DTYPES[self._held], x.numel() // m, n, rank, m, self._isa, torch.get_num_threads(),
        )  # fmt: skip
        if failed:
            raise MemoryError("low_rank_linear: no memory for a scratch buffer")
        return out
