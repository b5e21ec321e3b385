"""Searches that split a block into salient columns and groups, by how well each part binarizes.

All searches run on a saliency matrix T, not on the weights: with the published score ``T = W² / d²`` the parts are
chosen so that the *important* entries are well represented. (Searching on W instead lowers the error further but
marks a third of the columns salient, at 1.3 to 1.4 sign bits per weight instead of 1.04 to 1.1.)

Source: BiLLM (arXiv 2402.04291), Eq. 5, 8-9 and release code; column-group bitmap: ARB-LLM (arXiv 2410.03129), Eq. 14.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from hf_lowbit.numerics.binary import residual_binarization


def salient_columns(saliency: Tensor, limit: int) -> Tensor:
    """Columns to give a second sign plane.

    Columns are ranked by their sum of |T|; the number kept is the one for which binarizing T, salient and other
    columns apart and both with two planes, leaves the least squared error.

    Args:
        saliency: (n, k), T.
        limit: L, at most L - 1 columns are salient; also at most k - 2.

    Returns:
        (c,), int64, ascending column indices; empty if the block has fewer than 3 columns.

    Raises:
        ValueError: T holds NaN.
    """
    columns = saliency.shape[1]
    ranked = saliency.abs().sum(0).argsort(descending=True, stable=True)
    ordered = saliency[:, ranked]
    counts = range(1, min(limit, columns - 1))
    errors = [_order2_error(ordered[:, :count]) + _order2_error(ordered[:, count:]) for count in counts]
    if not errors:
        return ranked[:0]
    return ranked[: counts[_first_least(errors, saliency)]].sort().values


def _first_least(errors: list[float], saliency: Tensor) -> int:
    """Return the index of the least error; of equal ones the first.

    Groups with one or two members in a row are fitted exactly, so that candidates can tie: a later one must be better
    by more than rounding, or rounding would choose.
    """
    tie = 1e-12 * float(saliency.square().sum(dtype=torch.float64))
    best, best_error = -1, float("inf")
    for index, error in enumerate(errors):
        if error < best_error - tie:
            best, best_error = index, error
    if best < 0:
        raise ValueError("no candidate of the search has a finite error; the saliency holds NaN or overflows")
    return best


def _order2_error(values: Tensor) -> float:
    """Squared error of residual binarization with two planes over whole rows."""
    centred = values - values.mean(1, keepdim=True)
    scale = centred.abs().mean(1, keepdim=True)
    return _order1_error(centred.sub_(torch.where(centred < 0, -scale, scale)))


def _order1_error(values: Tensor) -> float:
    centred = values - values.mean(1, keepdim=True)
    scale = centred.abs().mean(1)
    return float((centred.square().sum(1) - values.shape[1] * scale.square()).sum(dtype=torch.float64))


def split_by_magnitude(
    saliency: Tensor,
    candidates: Tensor,
    order: int,
    among: Tensor | None = None,
    moment: Tensor | None = None,
    rest: Tensor | None = None,
) -> Tensor:
    """Split entries into a sparse group ``|T| >= p`` and a concentrated one, for the best threshold p.

    Args:
        saliency: (n, k), T.
        candidates: (q,), thresholds to try; the first of equally good ones wins.
        order: 1 or 2, planes used for each group.
        among: (n, k), bool, entries to split; None means all.
        moment: (k, k), S; if given, the residual R of T is judged by ``Tr(R S Rᵀ)`` instead of its squared sum.
        rest: (n, k), residual of the entries outside ``among``, which counts in ``Tr(R S Rᵀ)``.

    Returns:
        (n, k), bool, the sparse group (within ``among``).

    Raises:
        ValueError: no candidate gives a finite error.
    """
    everything = torch.ones_like(saliency, dtype=torch.bool) if among is None else among
    if moment is None and order == 1 and among is None and not bool((saliency < 0).any()):
        errors = (-_sorted_gains(saliency, candidates)).tolist()
    else:
        errors = []
        for threshold in candidates:
            sparse = (saliency.abs() >= threshold) & everything
            residual = split_residual(saliency, (sparse, everything & ~sparse), order)
            residual = residual if rest is None else residual + rest
            product = residual if moment is None else residual @ moment
            errors.append(float((product * residual).sum(dtype=torch.float64)))
    best = candidates[_first_least(errors, saliency)]
    return (saliency.abs() >= best) & everything


def split_residual(saliency: Tensor, groups: tuple[Tensor, ...], order: int) -> Tensor:
    """What residual binarization of disjoint groups leaves of T; 0 outside the groups.

    Args:
        saliency: (n, k), T.
        groups: boolean masks, (n, k) each.
        order: 1 or 2, planes used for each group.

    Returns:
        (n, k), dtype of ``saliency``.
    """
    residual = torch.zeros_like(saliency)
    for group in groups:
        fit = residual_binarization(saliency, group, order)
        residual += (saliency - fit.dense()) * group
    return residual


def _sorted_gains(saliency: Tensor, candidates: Tensor) -> Tensor:
    """What two one-plane groups explain of ΣT², for every threshold at once: ``Σ c·(μ² + α²)``.

    The squared error is ΣT² minus it. T must be >= 0: the groups of a row are then the two ends of its sorted
    values, and sums over them and over the parts below and above their mean come from one prefix sum.

    Args:
        saliency: (n, k), T >= 0.
        candidates: (q,), thresholds.

    Returns:
        (q,), float64.
    """
    ordered = saliency.to(torch.float64).sort(dim=1).values
    below = torch.nn.functional.pad(ordered.cumsum(1), (1, 0))  # below[:, j] = sum of the j smallest
    rows, columns = saliency.shape
    cut = torch.searchsorted(ordered, candidates.to(torch.float64).expand(rows, -1).contiguous())
    ends = (torch.zeros_like(cut), cut, torch.full_like(cut, columns))
    gains = torch.zeros(cut.shape, dtype=torch.float64, device=saliency.device)
    for low, high in itertools.pairwise(ends):
        count = (high - low).clamp(min=1)
        total = below.gather(1, high) - below.gather(1, low)
        mean = total / count
        # clamped, since rounding can put the mean of equal values beyond them
        middle = torch.minimum(torch.maximum(torch.searchsorted(ordered, mean), low), high)
        under = below.gather(1, middle) - below.gather(1, low)
        spread = (mean * (middle - low) - under) + (total - under - mean * (high - middle))
        gains += count * mean.square() + spread.square() / count
    return gains.sum(0)


def quantiles(values: Tensor, levels: Tensor) -> Tensor:
    """Quantiles with linear interpolation, for inputs of any size (``torch.quantile`` stops at 16 million).

    Args:
        values: any shape, at least one element.
        levels: (q,), in [0, 1].

    Returns:
        (q,), dtype of ``values``.
    """
    ordered = values.flatten().sort().values
    position = levels.to(torch.float64) * (ordered.numel() - 1)
    low = position.floor().long()
    high = (low + 1).clamp(max=ordered.numel() - 1)
    return torch.lerp(ordered[low], ordered[high], (position - low).to(ordered.dtype))
