"""CFS, the coarse-to-fine search for what to prune: N of every decoder block, then elements inside each group of M.

======  ============  ===============================================================================
paper   here          meaning
======  ============  ===============================================================================
I_ℓ     importance    of decoder block ℓ, from the mean cosine of its input and output; mean 1 over the blocks
N_t     n             weights kept per group on average, over all weights
N_ℓ     counts        weights kept per group in block ℓ
E       score         (n, k), which weights matter
======  ============  ===============================================================================

Source: PBS²P (arXiv 2502.01705), overview figures and public reviews (a rounding with "+ 1/2" between two constants
N_low and N_high); the linear map is that of AdaSVD (arXiv 2502.01403, Eq. 20) by the same authors.
Differs: the constants were not to be had (options ``n_low``, ``n_high``), nor which function of the cosine is meant
(``importance``); the counts are then moved until their mean is N_t, which rounding alone misses by up to an eighth.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def counts_within_budget(
    importance: Sequence[float], weights: Sequence[int], n: int, limits: tuple[int, int]
) -> list[int]:
    """N of every block: more for important ones, n on average over all weights.

    Args:
        importance: one number per block, mean 1.
        weights: number of weights in each block, > 0.
        n: budget, kept weights per group.
        limits: least and largest N, around n.

    Returns:
        ``Σ weights · N = n · Σ weights`` where blocks are of one size. Of blocks of several sizes the sum is the
        largest not above the budget that can be had by lowering and raising one block after the other.

    Raises:
        ValueError: the limits leave n out, so that no choice meets the budget.
    """
    low, high = limits
    if not low <= n <= high:
        raise ValueError(f"a mean of {n} kept weights cannot be met with {low} to {high} in each block")
    # The slope towards n_low for both directions, as in the linear map of the source.
    wanted = [min(max(low + (n - low) * value, low), high) for value in importance]
    counts = [min(max(math.floor(value + 0.5), low), high) for value in wanted]
    spare = n * sum(weights) - sum(w * count for w, count in zip(weights, counts, strict=True))
    blocks = range(len(counts))
    while spare < 0:  # too much is kept: lower the block whose wish was rounded up most; ties by index
        worst = max((i for i in blocks if counts[i] > low), key=lambda i: (counts[i] - wanted[i], -i))
        counts[worst] -= 1
        spare += weights[worst]
    while fitting := [i for i in blocks if counts[i] < high and weights[i] <= spare]:
        best = max(fitting, key=lambda i: (wanted[i] - counts[i], -i))
        counts[best] += 1
        spare -= weights[best]
    return counts


def kept_of(length: int, n: int, m: int) -> int:
    """Weights kept of a group of ``length`` <= m: ``ceil(n · length / m)``, n of a full one."""
    return -(-n * length // m)


def prune_ranks(score: Tensor, m: int) -> Tensor:
    """Place of every weight in the order in which its group of ``m`` is pruned, 0 first.

    Args:
        score: (n, k), higher is kept longer; of equal ones the lower column goes first.
        m: length of a group; the last one may be shorter.

    Returns:
        (n, k), int64, from 0 to length of the group - 1.
    """
    rows, columns = score.shape
    padded = torch.nn.functional.pad(score, (0, -columns % m), value=math.inf).view(rows, -1, m)
    order = padded.argsort(dim=2, stable=True)
    places = torch.arange(m, device=score.device).expand_as(order)
    return torch.empty_like(order).scatter_(2, order, places).flatten(1)[:, :columns]


def keep_mask(ranks: Tensor, n: int, m: int) -> Tensor:
    """Mask that keeps the last ``n`` of every group in the order of pruning; masks of falling n are nested.

    Args:
        ranks: (n, k), of :func:`prune_ranks`.
        n: kept of a full group; of a short one of length q, ceil(n · q / m).
        m: length of a group.

    Returns:
        (n, k), bool.
    """
    columns = ranks.shape[1]
    tail = columns % m
    dropped = torch.full((columns,), m - n, device=ranks.device)
    dropped[columns - tail :] = tail - kept_of(tail, n, m)
    return ranks >= dropped
