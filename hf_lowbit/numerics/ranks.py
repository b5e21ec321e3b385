"""Ranks of many matrices under one budget that is never exceeded.

Everything is in whole numbers once the shares are known, so the account is exact: what is handed out plus what is left
is the budget, and what is left is less than one step of any matrix that could still grow.
"""

from __future__ import annotations

import math
from collections.abc import Sequence


def allocate(
    shares: Sequence[float], most: Sequence[int], budget: int, steps: Sequence[int], least: Sequence[int]
) -> list[int]:
    """Ranks in proportion to shares, between limits, within a budget.

    A share above its limit is cut there and one below is lifted, and the rest of the budget is divided among the
    others in proportion, until nothing has to be cut or lifted. Then ranks are rounded down to whole steps, and the
    remainder goes, a step at a time, to those that lost most by rounding.

    Args:
        shares: one non-negative number per matrix; all zero counts as all alike.
        most: highest rank of each matrix.
        budget: sum of ranks that is not exceeded.
        steps: of which each rank is a multiple, unless it is the highest one.
        least: lowest rank of each matrix, at most the highest.

    Returns:
        One rank per matrix, ``least <= rank <= most``, with a sum of at most ``budget``.

    Raises:
        ValueError: the lowest ranks alone exceed the budget, or a share is negative or not finite.

    Source: rank search of Palu (arXiv 2407.21118), which ReCalKV (arXiv 2505.24357) takes over.
    Differs: there shares are cut once and the excess is lost or pushed on; rounding to the nearest step may exceed the
    budget. Here the limits are met exactly and rounding goes down.
    """
    if not all(math.isfinite(share) and share >= 0 for share in shares):
        raise ValueError("shares of a rank budget must be finite and not negative")
    if sum(least) > budget:
        raise ValueError(f"the lowest ranks add up to {sum(least)}, above the budget of {budget}")
    wanted = _between(list(shares) if any(shares) else [1.0] * len(shares), most, budget, least)
    ranks = [
        high if want >= high else max(low, math.floor(want / step + 1e-9) * step)
        for want, high, low, step in zip(wanted, most, least, steps, strict=True)
    ]
    left = budget - sum(ranks)
    lost = {i: wanted[i] - ranks[i] for i in range(len(ranks))}
    for i in sorted(lost, key=lambda i: (-lost[i], i)):
        more = min(steps[i], most[i] - ranks[i])
        if lost[i] > 1e-9 and 0 < more <= left:
            ranks[i], left = ranks[i] + more, left - more
    return ranks


def _between(shares: Sequence[float], most: Sequence[int], budget: int, least: Sequence[int]) -> list[float]:
    """Divide a budget in proportion to shares, within limits: ``min(max(scale · share, least), most)``.

    The sum grows with the scale, so the scale is found by bisection; where even all limits together are below the
    budget, everything is at its limit.
    """

    def at(scale: float) -> list[float]:
        return [min(max(scale * s, float(low)), float(high)) for s, low, high in zip(shares, least, most, strict=True)]

    low, high = 0.0, 1.0
    while sum(at(high)) < budget and any(v < m for v, s, m in zip(at(high), shares, most, strict=True) if s > 0):
        high *= 2
    for _ in range(200):  # each halves the interval: far below the last digit of a double
        middle = (low + high) / 2
        low, high = (middle, high) if sum(at(middle)) <= budget else (low, middle)
    return at(low)


def above_threshold(energies: Sequence[Sequence[float]], budget: int) -> list[int]:
    """How many of each matrix's energies are among the largest ``budget`` of all, one threshold for all matrices.

    Args:
        energies: for each matrix the energy of each direction, falling, as a share of the matrix's whole energy.
        budget: how many directions are kept in all.

    Returns:
        A number per matrix with the sum ``min(budget, how many there are)``.
    """
    ranked = sorted(((-value, i, j) for i, row in enumerate(energies) for j, value in enumerate(row)))
    counts = [0] * len(energies)
    for _, i, _ in ranked[:budget]:
        counts[i] += 1
    return counts


def split(rank: int, sizes: Sequence[int], most: Sequence[int]) -> list[int]:
    """Divide the rank of a matrix among its groups in proportion to their sizes.

    Args:
        rank: of the matrix, from the number of groups to the sum of ``most``.
        sizes: of each group.
        most: highest rank of each group.

    Returns:
        One rank per group, at least 1, with the sum ``rank``.
    """
    return allocate([float(size) for size in sizes], most, rank, [1] * len(sizes), [1] * len(sizes))
