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


def groups_of_block(
    saliency: Tensor, *, limit: int, splits: int, halves: int, thresholds: int, judge: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Split a block into salient and plain columns, and both into groups.

    Args:
        saliency: (n, k), T.
        limit: of :func:`salient_columns`.
        splits: of :func:`plain_groups`.
        halves: groups of the salient columns, 1 or 2.
        thresholds: tried in every split.
        judge: of :func:`plain_groups`.

    Returns:
        Salient columns (c,) and plain columns (k - c,), int64, ascending; and the group code of every entry within its
        kind, (n, k), uint8.
    """
    salient = salient_columns(saliency, limit)
    is_plain = torch.ones(saliency.shape[1], dtype=torch.bool, device=saliency.device)
    is_plain[salient] = False
    plain = is_plain.nonzero().squeeze(1)
    code = torch.zeros(saliency.shape, dtype=torch.uint8, device=saliency.device)
    code[:, plain] = plain_groups(saliency, plain, splits, thresholds, judge)
    if len(salient) and halves > 1:
        code[:, salient] = salient_halves(saliency, salient, thresholds).to(torch.uint8)
    return salient, plain, code


def plain_groups(saliency: Tensor, plain: Tensor, splits: int, thresholds: int, judge: Tensor | None = None) -> Tensor:
    """Group code of the columns that are not salient; the highest code is the first split's sparse group.

    Args:
        saliency: (n, k), T.
        plain: (k - c,), int64, the columns that are not salient.
        splits: 1 gives 2 groups; each further one splits what is left.
        thresholds: how many are tried, quantiles of |T| between 10 and 90 %.
        judge: (k, k), S (ARB-X); the residual of the whole block is then judged by ``Tr(R S Rᵀ)``, that of the salient
            columns included. None: by its squared sum.

    Returns:
        (n, k - c), uint8.
    """
    # Quantiles are taken over the whole block with everything already placed at zero, as in the release code.
    left = torch.zeros_like(saliency, dtype=torch.bool)
    left[:, plain] = True
    rest = None if judge is None else split_residual(saliency, (~left,), order=2)
    code = torch.zeros(saliency.shape, dtype=torch.uint8, device=saliency.device)
    for group in range(splits, 0, -1):
        candidates = quantiles((saliency * left).abs(), _levels(thresholds, saliency))
        if group == splits and (judge is None or not bool((saliency < 0).any())):
            # everything is left: a quick search applies
            sparse = torch.zeros_like(left)
            if judge is None or rest is None:
                sparse[:, plain] = split_by_magnitude(saliency[:, plain], candidates, order=1)
            else:
                sparse[:, plain] = _judged_split(saliency, plain, candidates, judge, rest)
        else:
            sparse = split_by_magnitude(saliency, candidates, 1, left, judge, rest)
        code[sparse] = group
        left = left & ~sparse
        rest = None if rest is None else rest + split_residual(saliency, (sparse,), order=1)
    return code[:, plain]


def salient_halves(saliency: Tensor, salient: Tensor, thresholds: int) -> Tensor:
    """Column-group bitmap inside the salient columns; True is the sparse half.

    Args:
        saliency: (n, k), T.
        salient: (c,), int64, at least one column.
        thresholds: how many are tried, quantiles of the entries that are not 0.

    Returns:
        (n, c), bool.

    Source: ARB-LLM, Eq. 14. It is silent on ARB-X here; the squared error of T decides in every variant.
    """
    values = saliency[:, salient]
    nonzero = values[values != 0].abs()
    if not len(nonzero):
        return torch.zeros_like(values, dtype=torch.bool)
    return split_by_magnitude(values, quantiles(nonzero, _levels(thresholds, values)), order=2)


def _levels(thresholds: int, like: Tensor) -> Tensor:
    return torch.linspace(0.1, 0.9, thresholds, dtype=torch.float64, device=like.device)


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


def _judged_split(saliency: Tensor, plain: Tensor, candidates: Tensor, judge: Tensor, rest: Tensor) -> Tensor:
    """What :func:`split_by_magnitude` finds with ``moment`` for the plain columns of T >= 0, in half its time.

    Means and scales of all thresholds come from sorted rows; the residual of the other columns, which is the same for
    every threshold, enters once.

    Args:
        saliency: (n, k), T >= 0.
        plain: (p,), int64, columns to split.
        candidates: (q,), thresholds.
        judge: (k, k), S.
        rest: (n, k), residual of the other columns, 0 in the plain ones.

    Returns:
        (n, p), bool, the sparse group.
    """
    values = saliency[:, plain]
    own, fixed = judge[plain][:, plain], rest @ judge
    constant, cross = float((fixed * rest).sum(dtype=torch.float64)), 2 * fixed[:, plain]
    (mean0, scale0), (mean1, scale1) = (
        (m.to(values.dtype), a.to(values.dtype)) for _, m, a in _sorted_fits(values, candidates)
    )
    errors = []
    for i, threshold in enumerate(candidates):
        sparse = (values >= threshold).to(values.dtype)
        # lerp with a weight of 0 or 1 is exact, and several times as fast as a choice by a mask
        residual = values - torch.lerp(mean0[:, i, None], mean1[:, i, None], sparse)
        residual -= torch.lerp(scale0[:, i, None], scale1[:, i, None], sparse).copysign_(residual)
        errors.append(constant + float(((residual @ own + cross) * residual).sum(dtype=torch.float64)))
    return values >= candidates[_first_least(errors, saliency)]


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

    The squared error is ΣT² minus it.

    Args:
        saliency: (n, k), T >= 0.
        candidates: (q,), thresholds.

    Returns:
        (q,), float64.
    """
    fits = _sorted_fits(saliency, candidates)
    return torch.stack([count * (mean.square() + scale.square()) for count, mean, scale in fits]).sum((0, 1))


def _sorted_fits(saliency: Tensor, candidates: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
    """One-plane fits of the two groups of every threshold.

    T must be >= 0: the groups of a row are then the two ends of its sorted values, and sums over them and over the
    parts below and above their mean come from one prefix sum.

    Args:
        saliency: (n, k), T >= 0.
        candidates: (q,), thresholds.

    Returns:
        For the group below the threshold and the one from it on: count (at least 1), mean μ and mean absolute
        deviation α, (n, q) each; float64 but for the count.
    """
    ordered = saliency.to(torch.float64).sort(dim=1).values
    below = torch.nn.functional.pad(ordered.cumsum(1), (1, 0))  # below[:, j] = sum of the j smallest
    rows, columns = saliency.shape
    cut = torch.searchsorted(ordered, candidates.to(torch.float64).expand(rows, -1).contiguous())
    ends = (torch.zeros_like(cut), cut, torch.full_like(cut, columns))
    fits = []
    for low, high in itertools.pairwise(ends):
        count = (high - low).clamp(min=1)
        total = below.gather(1, high) - below.gather(1, low)
        mean = total / count
        # clamped, since rounding can put the mean of equal values beyond them
        middle = torch.minimum(torch.maximum(torch.searchsorted(ordered, mean), low), high)
        under = below.gather(1, middle) - below.gather(1, low)
        spread = (mean * (middle - low) - under) + (total - under - mean * (high - middle))
        fits.append((count, mean, spread / count))
    return fits


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
