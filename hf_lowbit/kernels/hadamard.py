"""Hadamard matrices of the orders that layers have, and the product with them.

A Hadamard matrix of order K has entries ±1 and ``H Hᵀ = K·I``; divided by ``√K`` it is a rotation. Orders are
``k0 · 2^p``: the power of two is Sylvester's, ``S_2n = [[S, S], [S, -S]]``, and the core of order k0 is Paley's:

* I: ``k0 = q + 1`` for a prime ``q ≡ 3 (mod 4)``: 12, 20, 60, 108, 140 and others. Not symmetric.
* II: ``k0 = 2 (q + 1)`` for a prime ``q ≡ 1 (mod 4)``: 28, 36 and others.

Both are made from which numbers are squares modulo q, so there is no table. ``H = F_1 ⊗ F_2 ⊗ …`` with factors of at
most 140 rows for layers that exist, and a product with H is one small product per factor: ``K · Σ|F_i|`` operations
for a row instead of ``K²``. This is the one implementation; :mod:`hf_lowbit.numerics.rotation` is its name above.

Source: Sylvester (1867), Paley (1933), "On orthogonal matrices".
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

# A larger core would be one large dense product per layer; all orders of known transformers do with 140.
LARGEST_CORE = 512
# Sylvester factors are joined up to this size: fewer passes over the rows, still a small product.
_JOINED = 128


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % divisor for divisor in range(2, math.isqrt(number) + 1))


@functools.cache
def core_of(order: int) -> int | None:
    """Return the core k0 of ``order = k0 · 2^p``, the smallest that is known here; 1 for powers of two.

    Returns:
        None if no such matrix is made here: odd orders above 1, twice an odd number above 1, cores above
        :data:`LARGEST_CORE`.
    """
    if order < 1:
        return None
    odd = order // (order & -order)
    if odd == 1:
        return 1
    core = 4 * odd
    while order % core == 0 and core <= LARGEST_CORE:
        if _is_prime(core - 1) or ((core // 2 - 1) % 4 == 1 and _is_prime(core // 2 - 1)):
            return core
        core *= 2
    return None


@functools.cache
def core_entries(core: int) -> tuple[tuple[int, ...], ...]:
    """Paley's matrix of order ``core``, as :func:`core_of` returns them, as ±1."""
    first = _is_prime(core - 1)
    q = core - 1 if first else core // 2 - 1
    squares = {i * i % q for i in range(1, q)}
    character = [0, *(1 if i in squares else -1 for i in range(1, q))]
    # the conference matrix: a border of ones around the characters of differences, skew for q ≡ 3, else symmetric
    corner = -1 if first else 1
    conference = [[0, *([1] * q)]]
    conference += [[corner, *(character[(i - j) % q] for j in range(q))] for i in range(q)]
    if first:
        return tuple(tuple(value + (i == j) for j, value in enumerate(row)) for i, row in enumerate(conference))
    pair, diagonal = ((1, 1), (1, -1)), ((1, -1), (-1, -1))
    return tuple(
        tuple((diagonal if i == j else pair)[a][b] * (1 if i == j else value)
              for j, value in enumerate(row) for b in (0, 1))
        for i, row in enumerate(conference)
        for a in (0, 1)
    )  # fmt: skip


def _factors(order: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    """The Kronecker factors of the normalized matrix; a core of 1 is left out."""
    if is_in_torch_dispatch_mode():  # what is made now may be without contents, and must not be kept
        return _made_factors(order, dtype, device)
    return _kept_factors(order, dtype, device)


def _made_factors(order: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    core = core_of(order)
    if core is None:
        raise ValueError(f"no Hadamard matrix of order {order} is known here; {WHICH}")
    found = []
    with torch.inference_mode(False):  # kept for later calls, of which some may need gradients
        if core > 1:
            entries = torch.tensor(core_entries(core), dtype=torch.float64, device="cpu") / core**0.5
            found.append(entries.to(device, dtype))
        left = order // core
        while left > 1 or not found:
            size = min(left, _JOINED)
            found.append(_sylvester(size).to(device, dtype))
            left //= size
    return tuple(found)


_kept_factors = functools.cache(_made_factors)


def _sylvester(order: int) -> Tensor:
    """Sylvester's matrix of a power of two, normalized; (order, order), float64."""
    matrix = torch.ones((1, 1), dtype=torch.float64, device="cpu")
    pair = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64, device="cpu")
    while matrix.shape[0] < order:
        matrix = torch.kron(pair, matrix)
    return matrix / order**0.5


WHICH = "orders are powers of two, and these times Paley's 12, 20, 28, 36, 44, 60, 68, ... (see hadamard.core_of)"


def hadamard(order: int, dtype: torch.dtype = torch.float64, device: torch.device | str = "cpu") -> Tensor:
    """Return the normalized matrix, (order, order), orthogonal.

    Raises:
        ValueError: none of this order is known here.
    """
    dense = torch.ones((1, 1), dtype=dtype, device=device)
    for factor in _factors(order, dtype, torch.device(device)):
        dense = torch.kron(dense, factor)
    return dense


def rotate(x: Tensor, order: int, inverse: bool = False) -> Tensor:
    """Multiply blocks of ``order`` columns by the normalized Hadamard matrix: ``x · (I ⊗ H)``.

    Args:
        x: (..., columns), floating; ``order`` divides the columns.
        order: of the blocks; 0 returns ``x``.
        inverse: multiply by the transposed matrix, which undoes it.

    Returns:
        (..., columns), dtype of ``x``.

    Raises:
        ValueError: ``x`` is not floating or has no columns, the order does not divide them, or no such matrix is
            known here.
    """
    if not order:
        return x
    if not x.dim() or not x.is_floating_point():
        raise ValueError(f"rotated are floating (..., columns), got {x.dtype} {tuple(x.shape)}")
    if x.shape[-1] % order:
        raise ValueError(f"blocks of {order} columns do not divide {x.shape[-1]} columns")
    factors = _factors(order, x.dtype, x.device)
    rows = x.shape[:-1]
    turned, after = x.reshape(-1, order), order
    for factor in factors:
        size = factor.shape[0]
        after //= size
        if after == 1:
            turned = turned.reshape(-1, size) @ (factor.T if inverse else factor)
        else:
            turned = (factor if inverse else factor.T) @ turned.reshape(-1, size, after)
    return turned.reshape(*rows, x.shape[-1])
