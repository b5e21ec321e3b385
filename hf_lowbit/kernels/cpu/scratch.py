"""Products of many tokens with a packed weight: some rows at a time are unpacked and multiplied there by torch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# Of the unpacked rows: more do not stay in a cache, fewer make the product slow.
_SCRATCH_BYTES, _LEAST_ROWS = 8 << 20, 256
# With so few tokens the product is faster with the weight on the left, with more the result is too large to turn.
_TURNED_TOKENS = 256


def multiply_unpacked(x: Tensor, rows: int, unpack: Callable[[int, int, Tensor], None]) -> Tensor:
    """Multiply by a weight of which no dense copy is ever whole.

    Args:
        x: (tokens, columns), contiguous.
        rows: of the weight.
        unpack: writes rows from a first to a last one into a contiguous buffer of the dtype of ``x``.

    Returns:
        (tokens, rows), dtype of ``x``.
    """
    out = x.new_empty((x.shape[0], rows))
    most = max(_LEAST_ROWS, _SCRATCH_BYTES // (x.shape[1] * x.element_size()))
    scratch = torch.empty((min(rows, most), x.shape[1]), dtype=x.dtype)
    for start in range(0, rows, most):
        end = min(start + most, rows)
        unpack(start, end, scratch)
        some = scratch[: end - start]
        out[:, start:end] = torch.mm(some, x.T).T if x.shape[0] <= _TURNED_TOKENS else torch.mm(x, some.T)
    return out
