"""SPBO: prune a block in steps and, after each, solve scales and shifts anew against the output error.

The model of a block is ``Ŵ = K ⊙ (αB + μ)``, for salient columns ``K ⊙ (αB + α₂B₂ + μ)``, with an own α, μ (α₂) for
every row and group. The error ``L = Tr(R S Rᵀ)`` has the *whole* block in ``R = W - Ŵ``, pruned weights included, so
that what is kept makes up for what is not. For given signs and mask, L is quadratic in the few unknowns of a row.

======  ================  ==================================================================
paper   here              meaning
======  ================  ==================================================================
K       keep              (n, k), bool, what is not pruned
μ α α₂  values            (n, P), shifts of all groups, then scales, then second scales
F       features          (n, P, k), what each unknown is multiplied by: K, K⊙B, K⊙B₂ inside its group
A, y    gram, target      F S Fᵀ (n, P, P) and F S wᵀ (n, P): ``A c = y`` at the minimum of L
======  ================  ==================================================================

Source: PBS²P (arXiv 2502.01705), abstract and overview: stepwise pruning with binarization optimization. Its body was
not to be had: the closed forms are those of ARB-X (arXiv 2410.03129, Eq. 11) with W unmasked.
Differs: all unknowns of a row are solved together, cross terms between groups included (``solver="alternating"`` takes
them one after the other); and signs are chosen anew after each step where that lowers L (``refresh_signs=False``
leaves those of the dense start).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from hf_lowbit.numerics.binary import BinaryFit, nearest_signs
from hf_lowbit.numerics.blocks import BlockFit

# Rows at a time: their features (10 · 128 float64 each) stay in the cache of a core.
_ROWS = 256
# Share of the mean diagonal of A that is added to it: gives groups without members 0 instead of no solution.
_RIDGE = 1e-6


@dataclasses.dataclass
class Rows:
    """Some rows of a block with their present fit, in float64.

    Attributes:
        weight: (n, k), W.
        group: (n, G, k), bool: the groups, those of salient columns first.
        salient: (c,), int64, salient columns.
        sign: (n, k), -1 or +1.
        sign2: (n, c), the same of the second plane.
        values: (n, P), the unknowns; P = 2·G + S.
    """

    weight: Tensor
    group: Tensor
    salient: Tensor
    sign: Tensor
    sign2: Tensor
    values: Tensor

    @property
    def counts(self) -> tuple[int, int]:
        """Number of groups G, and S of those of salient columns."""
        groups = self.group.shape[1]
        return groups, self.values.shape[1] - 2 * groups

    def cut(self, part: slice) -> Rows:
        """Return some of the rows."""
        parts = {name: getattr(self, name)[part] for name in ("weight", "group", "sign", "sign2", "values")}
        return dataclasses.replace(self, **parts)

    def features(self, keep: Tensor) -> Tensor:
        """Return F, (n, P, k)."""
        halves = self.counts[1]
        kept = (self.group & keep.unsqueeze(1)).to(self.weight.dtype)
        second = torch.zeros_like(kept[:, :halves])
        second[:, :, self.salient] = kept[:, :halves, self.salient] * self.sign2.unsqueeze(1)
        return torch.cat([kept, kept * self.sign.unsqueeze(1), second], dim=1)

    def refreshed(self) -> Rows:
        """Return the rows with the signs that bring every weight nearest to its level, the unknowns as they are."""
        groups, halves = self.counts
        shift, scale, scale2 = self.values.split([groups, groups, halves], dim=1)

        def of_entry(values: Tensor, among: Tensor) -> Tensor:
            return (values.unsqueeze(2) * among).sum(1)

        target = self.weight - of_entry(shift, self.group)
        scales = of_entry(scale, self.group)
        sign = nearest_signs(target, BinaryFit(self.sign, scales)).sign
        sign2 = self.sign2
        if halves:
            at = self.salient
            second = of_entry(scale2, self.group[:, :halves, at])
            both = nearest_signs(target[:, at], BinaryFit(sign[:, at], scales[:, at], sign2=sign2, row_scale2=second))
            sign[:, at], sign2 = both.sign, both.sign2
        return dataclasses.replace(self, sign=sign, sign2=sign2)


def prune(
    block: BlockFit,
    weight: Tensor,
    moment: Tensor,
    masks: list[Tensor],
    *,
    iterations: int,
    refresh: bool,
    trace: list[dict[str, Any]] | None = None,
) -> BlockFit:
    """Fit a block to the outputs, dense first, then after each pruning step.

    Args:
        block: dense start: partition, and a fit with shift for every group.
        weight: (n, k), the block.
        moment: (k, k), S, any positive multiple of Σ x xᵀ.
        masks: (n, k), bool each: K of every step, nested; empty for a block that is not pruned.
        iterations: rounds of the alternating solver; 0 solves jointly.
        refresh: choose signs anew after each step, row by row where L falls.
        trace: receives a row per step: share of weights kept, and L under the new mask, after the solve and after the
            refresh (relative to ``Tr(W S Wᵀ)``).

    Returns:
        The fit of the last step, in the dtype of ``weight``; ``keep`` is the last mask.
    """
    moment = moment.to(torch.float64)
    whole = _rows_of(block, weight.to(torch.float64))
    keeps = [torch.ones_like(block.code, dtype=torch.bool), *masks]
    done, errors = [], torch.zeros((len(keeps), 3), dtype=torch.float64)
    for start in range(0, len(weight), _ROWS):
        part = slice(start, start + _ROWS)
        rows = whole.cut(part)
        for step, keep in enumerate(keeps):
            rows, found = _step(rows, moment, keep[part], iterations, refresh and step > 0)
            errors[step] += torch.stack([error.sum() for error in found]).cpu()
        done.append(rows)
    if trace is not None:
        total = float(((whole.weight @ moment) * whole.weight).sum()) or 1.0
        trace += [
            {"kept": float(keep.double().mean()), "errors": [float(error) / total for error in row]}
            for keep, row in zip(keeps, errors, strict=True)
        ]
    return _fitted(block, done, weight.dtype, masks[-1] if masks else None)


def _step(
    rows: Rows, moment: Tensor, keep: Tensor, iterations: int, refresh: bool
) -> tuple[Rows, tuple[Tensor, Tensor, Tensor]]:
    """One step under a mask: solve, choose signs anew, solve again; returns L of every row at the three points."""
    rows, before, solved = _solve(rows, moment, keep, iterations)
    if not refresh:
        return rows, (before, solved, solved)
    other, _, error = _solve(rows.refreshed(), moment, keep, iterations)
    better = error < solved

    def chosen(new: Tensor, old: Tensor) -> Tensor:
        return torch.where(better.unsqueeze(1), new, old)

    rows = dataclasses.replace(
        rows,
        sign=chosen(other.sign, rows.sign),
        sign2=chosen(other.sign2, rows.sign2),
        values=chosen(other.values, rows.values),
    )
    return rows, (before, solved, torch.minimum(error, solved))


def _solve(rows: Rows, moment: Tensor, keep: Tensor, iterations: int) -> tuple[Rows, Tensor, Tensor]:
    """Minimise L over the unknowns of every row; returns L, (n,), before and after, too."""
    features = rows.features(keep)
    product = (features.flatten(0, 1) @ moment).view(features.shape)
    gram = product @ features.mT
    target = (product @ rows.weight.unsqueeze(2)).squeeze(2)
    energy = ((rows.weight @ moment) * rows.weight).sum(1)

    def error(values: Tensor) -> Tensor:
        column = values.unsqueeze(2)
        return energy - 2 * (values * target).sum(1) + (column * (gram @ column)).sum((1, 2))

    before = error(rows.values)
    values = _sweeps(gram, target, rows.values, iterations) if iterations else _at_once(gram, target)
    return dataclasses.replace(rows, values=values), before, error(values)


def _at_once(gram: Tensor, target: Tensor) -> Tensor:
    """Solve ``(A + ridge) c = y``, (n, P)."""
    ridge = _RIDGE * gram.diagonal(dim1=1, dim2=2).mean(1)
    ridge = torch.where(ridge > 0, ridge, 1)  # inputs that are all zero
    identity = torch.eye(gram.shape[1], dtype=gram.dtype, device=gram.device)
    solution: Tensor = torch.linalg.solve(gram + ridge.view(-1, 1, 1) * identity, target)
    return solution


def _sweeps(gram: Tensor, target: Tensor, values: Tensor, iterations: int) -> Tensor:
    """Minimise over one unknown after the other, shifts first; unknowns without members become 0."""
    values = values.clone()
    diagonal = gram.diagonal(dim1=1, dim2=2)
    safe = torch.where(diagonal > 0, diagonal, 1)
    for _ in range(iterations):
        for i in range(values.shape[1]):
            rest = target[:, i] - (gram[:, i] * values).sum(1) + diagonal[:, i] * values[:, i]
            values[:, i] = torch.where(diagonal[:, i] > 0, rest / safe[:, i], 0)
    return values


def _rows_of(block: BlockFit, weight: Tensor) -> Rows:
    """Bring the fits of a block's groups into one set of tensors."""
    halves, groups = block.salient_groups, len(block.fits)
    group = torch.zeros((weight.shape[0], groups, weight.shape[1]), dtype=torch.bool, device=weight.device)
    sign, sign2 = torch.ones_like(weight), torch.ones_like(weight[:, block.salient])
    for number, fit in enumerate(block.fits):
        columns, chosen, _ = block.members(number)
        group[:, number, columns] = chosen
        sign[:, columns] = torch.where(chosen, fit.sign.to(weight.dtype), sign[:, columns])
        if number < halves:
            sign2 = torch.where(chosen, fit.sign2.to(weight.dtype), sign2)
    values = [fit.shift for fit in block.fits] + [fit.row_scale for fit in block.fits]
    values += [fit.row_scale2 for fit in block.fits[:halves]]
    return Rows(weight, group, block.salient, sign, sign2, torch.cat(values, dim=1).to(weight.dtype))


def _fitted(block: BlockFit, done: list[Rows], dtype: torch.dtype, keep: Tensor | None) -> BlockFit:
    """Turn finished rows back into a fit for every group."""
    sign, sign2, values = (
        torch.cat([getattr(rows, name) for rows in done]).to(dtype) for name in ("sign", "sign2", "values")
    )
    groups, fits = len(block.fits), []
    for number in range(groups):
        columns, _, _ = block.members(number)
        fit = BinaryFit(
            sign=sign[:, columns],
            row_scale=values[:, groups + number, None],
            shift=values[:, number, None],
        )
        if number < block.salient_groups:
            fit = dataclasses.replace(fit, sign2=sign2, row_scale2=values[:, 2 * groups + number, None])
        fits.append(fit)
    return dataclasses.replace(block, fits=fits, keep=keep)
