"""Rotations that spread what is in few coordinates over all of them: Hadamard matrices, whole or in blocks.

The matrices and the product with them are :mod:`hf_lowbit.kernels.hadamard`, because activations are rotated there at
run time; weights are rotated with the same functions, imported from here.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hf_lowbit.kernels.hadamard import core_of, hadamard, rotate

__all__ = ["BLOCKS", "block_order", "core_of", "full_order", "hadamard", "random_signs", "rotate", "spreading"]

# Sizes of block rotations, largest first.
BLOCKS = (128, 64, 32, 16)


def block_order(columns: int, largest: int = BLOCKS[0]) -> int:
    """Return the largest of :data:`BLOCKS`, at most ``largest``, that divides the columns; 0 if none does.

    Source: DVD-Quant is silent on the shape; blocks as in ConvRot keep a group of columns inside one block.
    """
    return next((size for size in BLOCKS if size <= largest and columns % size == 0), 0)


def full_order(columns: int) -> int:
    """Return the order of a rotation of all columns: their number, or 0 if no such Hadamard matrix is known."""
    return 0 if core_of(columns) is None or columns == 1 else columns


def random_signs(columns: int, seed: int) -> Tensor:
    """Return (columns,), int8, each +1 or -1 with equal probability, the same for the same seed."""
    generator = torch.Generator(device="cpu").manual_seed(seed)
    return (2 * torch.randint(0, 2, (columns,), generator=generator, device="cpu") - 1).to(torch.int8)


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
    even_part = hadamard(power)
    if odd == 1:
        return even_part
    generator = torch.Generator().manual_seed(seed)
    factor, above = torch.linalg.qr(torch.randn(odd, odd, dtype=torch.float64, generator=generator))
    # signs of the diagonal made positive: otherwise the result would depend on the library that factorizes
    return torch.kron(even_part, (factor * above.diagonal().sign()).contiguous())
