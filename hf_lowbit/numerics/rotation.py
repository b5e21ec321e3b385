"""Orthogonal matrices of any size that spread what is in few coordinates over all of them."""

from __future__ import annotations

import torch
from torch import Tensor


def spreading(size: int, seed: int = 0) -> Tensor:
    """An orthogonal matrix that mixes all coordinates, the same for the same size and seed.

    It is the Kronecker product of a Hadamard matrix of the largest power of two in ``size`` and of a random orthogonal
    matrix of the odd factor that remains, so no table of Hadamard matrices of other orders is needed.

    Args:
        size: at least 1.
        seed: of the random factor.

    Returns:
        (size, size), float64.
    """
    power = size & -size
    odd = size // power
    even_part, pair = torch.ones(1, 1).double(), torch.tensor([[1.0, 1.0], [1.0, -1.0]]).double() / 2**0.5
    while len(even_part) < power:
        even_part = torch.kron(pair, even_part)
    if odd == 1:
        return even_part
    generator = torch.Generator().manual_seed(seed)
    factor, above = torch.linalg.qr(torch.randn(odd, odd, dtype=torch.float64, generator=generator))
    # signs of the diagonal made positive: otherwise the result would depend on the library that factorizes
    return torch.kron(even_part, (factor * above.diagonal().sign()).contiguous())
