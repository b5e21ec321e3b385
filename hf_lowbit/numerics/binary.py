"""Binary fits: approximate a masked group of weights by scales, signs and, in some forms, a shift.

Every function takes one group of a block: ``weight`` (n, k) and a boolean ``mask`` (n, k) of the entries that belong
to the group, and returns a :class:`BinaryFit`. Rows are independent except where column scales couple them. Each
step is the exact minimiser of its variable, so the squared error never rises; ``trace`` receives it after every
iteration.

======  ==================  ===================================================================
paper   here                meaning
======  ==================  ===================================================================
α       row_scale           (n, 1), scale of a row; α₂ is row_scale2
μ       shift               (n, 1), added to every entry of the group
B       sign                (n, k), -1 or +1; B₂ is sign2; sgn(0) = +1 everywhere, since one bit has no zero
α^c     col_scale           (1, k), scale of a column (ARB-RC)
c_i     count               (n, 1), entries of the group in a row, at least 1
======  ==================  ===================================================================

Source: ARB-LLM (arXiv 2410.03129), Eq. 4-14 and Theorem 1; residual binarization: BiLLM (arXiv 2402.04291), Eq. 6-7.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

Trace = list[float] | None


@dataclasses.dataclass
class BinaryFit:
    """Parameters of one group: tensors with the shapes of the module docstring, or None where a form has no such part.

    The optional parts are typed ``Any``: which of them exist is known from the function that made the fit.
    """

    sign: Tensor
    row_scale: Tensor
    shift: Any = None
    col_scale: Any = None
    sign2: Any = None
    row_scale2: Any = None
    col_scale2: Any = None

    def dense(self) -> Tensor:
        """Return the approximation, (n, k), not masked. The order of operations is that of the reference op."""
        first = self.sign * self.row_scale
        if self.col_scale is not None:
            first = first * self.col_scale
        if self.shift is not None:
            first = first + self.shift
        if self.sign2 is None:
            return first
        second = self.sign2 * self.row_scale2
        if self.col_scale2 is not None:
            second = second * self.col_scale2
        return first + second

    def canonical(self) -> BinaryFit:
        """Return the same numbers with scales >= 0: a negative scale is folded into its sign plane."""
        sign, row, col = _fold(self.sign, self.row_scale, self.col_scale)
        fit = dataclasses.replace(self, sign=sign, row_scale=row, col_scale=col)
        if self.sign2 is not None:
            sign2, row2, col2 = _fold(self.sign2, self.row_scale2, self.col_scale2)
            fit = dataclasses.replace(fit, sign2=sign2, row_scale2=row2, col_scale2=col2)
        return fit

    def rounded(self, dtype: torch.dtype) -> BinaryFit:
        """Return the fit with scales and shift rounded to ``dtype`` and back."""
        names = ("row_scale", "shift", "col_scale", "row_scale2", "col_scale2")
        values: dict[str, Any] = {name: getattr(self, name) for name in names}
        rounded: dict[str, Any] = {
            name: None if value is None else value.to(dtype).to(value.dtype) for name, value in values.items()
        }
        return dataclasses.replace(self, **rounded)


def sgn(x: Tensor) -> Tensor:
    """Return -1 where ``x`` is negative and +1 elsewhere, in the dtype of ``x``."""
    return torch.where(x < 0, -1.0, 1.0).to(x.dtype)


def _fold(sign: Tensor, row: Tensor, col: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    sign = sign * sgn(row)
    if col is not None:
        sign, col = sign * sgn(col), col.abs()
    return sign, row.abs(), col


def _count(mask: Tensor, dtype: torch.dtype) -> Tensor:
    return mask.sum(1, keepdim=True).clamp(min=1).to(dtype)


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """Quotient that is 0 where the denominator is not positive, as in a group without members.

    The release code adds a small constant to the denominator instead, which shrinks the scales of small weights.
    """
    return torch.where(denominator > 0, numerator / torch.where(denominator > 0, denominator, 1), 0)


def _record(trace: Trace, weight: Tensor, member: Tensor, fit: BinaryFit) -> None:
    if trace is not None:
        trace.append(float((((weight - fit.dense()) * member) ** 2).sum(dtype=torch.float64)))


def residual_binarization(weight: Tensor, mask: Tensor, order: int, shifted: bool = True) -> BinaryFit:
    """One-shot binarization: mean, mean absolute deviation and sign, then the same again on the residual.

    Args:
        weight: (n, k), floating.
        mask: (n, k), bool.
        order: 1 or 2, number of sign planes.
        shifted: subtract the row mean first; False gives plain rounding, ``sign(w) · mean|w|``.

    Returns:
        A fit with ``shift`` (zeros left out when not shifted).

    Source: BiLLM, Eq. 6-7; start of ARB, ARB-LLM Eq. 2-3.
    """
    member = mask.to(weight.dtype)
    count = _count(mask, weight.dtype)
    residual, planes, shift = weight, [], torch.zeros_like(count)
    for _ in range(order):
        mean = (residual * member).sum(1, keepdim=True) / count if shifted else torch.zeros_like(count)
        centred = residual - mean
        scale = (centred.abs() * member).sum(1, keepdim=True) / count
        sign = sgn(centred)
        residual = centred - scale * sign
        shift = shift + mean
        planes.append((sign, scale))
    fit = BinaryFit(sign=planes[0][0], row_scale=planes[0][1], shift=shift if shifted else None)
    if order == 2:
        fit = dataclasses.replace(fit, sign2=planes[1][0], row_scale2=planes[1][1])
    return fit


def alternating(
    weight: Tensor, mask: Tensor, order: int, iterations: int, trace: Trace = None, refit: bool = True
) -> BinaryFit:
    """ARB: refine shift, scales and signs in turn.

    Args:
        weight: (n, k), floating.
        mask: (n, k), bool.
        order: 1 or 2, number of sign planes.
        iterations: T, >= 0.
        trace: receives Σ mask·(W - Ŵ)² at the start and after every iteration.
        refit: fit the scales (order 2: the shift too) once more to the last signs.

    Returns:
        A fit with ``shift``.

    Source: ARB-LLM, Algorithm 1 and Eq. 4-6 (order 1); its second-order form in the release code.
    Differs: the last refit, which the release code lacks. Theorem 1 holds exactly only with it.
    """
    member = mask.to(weight.dtype)
    count = _count(mask, weight.dtype)
    fit = residual_binarization(weight, mask, order)
    _record(trace, weight, member, fit)
    for _ in range(iterations):
        fit = _refit_scales(weight, member, count, _refit_shift(weight, member, count, fit))
        fit = nearest_signs(weight - fit.shift, fit)
        _record(trace, weight, member, fit)
    if not refit or not iterations:
        return fit
    return _refit_scales(weight, member, count, fit if order == 1 else _refit_shift(weight, member, count, fit))


def _refit_shift(weight: Tensor, member: Tensor, count: Tensor, fit: BinaryFit) -> BinaryFit:
    """Least-squares shift for fixed signs and scales."""
    error = (weight - fit.dense()) * member
    return dataclasses.replace(fit, shift=fit.shift + error.sum(1, keepdim=True) / count)


def _refit_scales(weight: Tensor, member: Tensor, count: Tensor, fit: BinaryFit) -> BinaryFit:
    """Least-squares scales for fixed signs and shift, one plane after the other."""
    centred = (weight - fit.shift) * member
    second = 0 if fit.sign2 is None else fit.row_scale2 * fit.sign2
    scale = (fit.sign * (centred - second * member)).sum(1, keepdim=True) / count
    if fit.sign2 is None:
        return dataclasses.replace(fit, row_scale=scale)
    scale2 = (fit.sign2 * (centred - scale * fit.sign * member)).sum(1, keepdim=True) / count
    return dataclasses.replace(fit, row_scale=scale, row_scale2=scale2)


def nearest_signs(target: Tensor, fit: BinaryFit) -> BinaryFit:
    """Signs that bring ``± scale ± scale2`` nearest to ``target``, element by element.

    With a = the larger and b = the smaller magnitude, the larger plane takes the sign of the target and the smaller
    one the sign of what is left: no need to compare all four levels.
    """
    first = fit.row_scale if fit.col_scale is None else fit.row_scale * fit.col_scale
    if fit.row_scale2 is None:
        return dataclasses.replace(fit, sign=sgn(target) * sgn(first))
    second = fit.row_scale2 if fit.col_scale2 is None else fit.row_scale2 * fit.col_scale2
    a, b = first.abs(), second.abs()
    outer = sgn(target)
    inner = outer * sgn(target.abs() - torch.maximum(a, b))
    swapped = b > a
    return dataclasses.replace(
        fit,
        sign=torch.where(swapped, inner, outer) * sgn(first),
        sign2=torch.where(swapped, outer, inner) * sgn(second),
    )


def alternating_on_inputs(
    weight: Tensor,
    mask: Tensor,
    moment: Tensor,
    order: int,
    iterations: int,
    input_iterations: int,
    trace: Trace = None,
) -> BinaryFit:
    """ARB-X: ARB, then shift and scales refined against the output error with the signs frozen.

    The error ``Tr(R S Rᵀ)`` is quadratic in the few unknowns of a row. Their Gram matrix is built once from the
    features 1, B (and B₂), after which an iteration is a handful of operations per row.

    Args:
        weight: (n, k), floating.
        mask: (n, k), bool.
        moment: (k, k), S, any positive multiple of Σ x xᵀ over the block's columns.
        order: 1 or 2, number of sign planes.
        iterations: T of the preceding ARB.
        input_iterations: iterations against the output error.
        trace: receives ``Tr(R S Rᵀ)`` of the group after ARB and after every iteration.

    Returns:
        A fit with ``shift``. Scales may be negative; :meth:`BinaryFit.canonical` folds them.

    Source: ARB-LLM, Eq. 9-11 with masks as in the release code. Groups are treated alone, cross terms ignored.
    """
    fit = alternating(weight, mask, order, iterations, refit=False)  # what follows fits all of it anew
    member = mask.to(weight.dtype)
    signs = [fit.sign] if fit.sign2 is None else [fit.sign, fit.sign2]
    features = [member, *(member * sign for sign in signs)]
    projected = [feature @ moment for feature in features]
    target = [((weight * member) * product).sum(1, keepdim=True) for product in projected]
    gram = [[(p * f).sum(1, keepdim=True) for f in features] for p in projected]
    values = [fit.shift, fit.row_scale] + ([] if fit.row_scale2 is None else [fit.row_scale2])

    def record() -> None:
        if trace is not None:
            residual = weight * member
            for value, feature in zip(values, features, strict=True):
                residual = residual - value * feature
            trace.append(float(((residual @ moment) * residual).sum(dtype=torch.float64)))

    record()
    for _ in range(input_iterations):
        for i in range(len(values)):
            others = [values[j] * gram[i][j] for j in range(len(values)) if j != i]
            values[i] = _ratio(target[i] - torch.stack(others).sum(0), gram[i][i])
        record()
    fit = dataclasses.replace(fit, shift=values[0], row_scale=values[1])
    return fit if order == 1 else dataclasses.replace(fit, row_scale2=values[2])


def row_column(weight: Tensor, mask: Tensor, order: int, iterations: int, trace: Trace = None) -> BinaryFit:
    """ARB-RC: no shift, a scale per row and one per column, refined in turn.

    Args:
        weight: (n, k), floating.
        mask: (n, k), bool.
        order: 1 or 2, number of sign planes.
        iterations: T, >= 0.
        trace: receives Σ mask·(W - Ŵ)² at the start and after every iteration.

    Returns:
        A fit with ``col_scale`` (1, k). Column scales average 1 over the columns that have members.

    Source: ARB-LLM, Eq. 12-13 and the release code (order 2).
    Differs: two planes have their scales fitted once more to the last signs; and a last step removes the freedom of
    moving a factor between rows and columns, which keeps float16 in range and makes files reproducible.
    """
    member = mask.to(weight.dtype)
    count, used = _count(mask, weight.dtype), mask.any(0, keepdim=True)
    column_count = mask.sum(0, keepdim=True).clamp(min=1).to(weight.dtype)
    residual, planes = weight * member, []
    for _ in range(order):
        magnitude = residual.abs() * member
        row = magnitude.sum(1, keepdim=True) / count
        col = _ratio(magnitude, row.expand_as(magnitude)).sum(0, keepdim=True) / column_count
        planes.append((sgn(residual), row, col))
        residual = (residual - planes[-1][0] * row * col) * member
    fit = BinaryFit(sign=planes[0][0], row_scale=planes[0][1], col_scale=planes[0][2])
    if order == 2:
        fit = dataclasses.replace(fit, sign2=planes[1][0], row_scale2=planes[1][1], col_scale2=planes[1][2])
    _record(trace, weight, member, fit)
    for _ in range(iterations):
        fit = _refit_all_row_column(weight, member, fit)
        if order == 2:
            fit = nearest_signs(weight, fit)
        _record(trace, weight, member, fit)
    if order == 2 and iterations:
        fit = _refit_all_row_column(weight, member, fit)
    row, col = _unit_mean(fit.row_scale, fit.col_scale, used)
    fit = dataclasses.replace(fit, row_scale=row, col_scale=col)
    if order == 2:
        row, col = _unit_mean(fit.row_scale2, fit.col_scale2, used)
        fit = dataclasses.replace(fit, row_scale2=row, col_scale2=col)
    return fit


def _refit_all_row_column(weight: Tensor, member: Tensor, fit: BinaryFit) -> BinaryFit:
    """One update of the scales of the first plane, then of the second, for fixed signs."""
    second = 0 if fit.sign2 is None else fit.sign2 * fit.row_scale2 * fit.col_scale2
    row, col = _refit_row_column(weight - second, member, fit.sign, fit.col_scale)
    fit = dataclasses.replace(fit, row_scale=row, col_scale=col)
    if fit.sign2 is None:
        return fit
    row, col = _refit_row_column(weight - fit.sign * row * col, member, fit.sign2, fit.col_scale2)
    return dataclasses.replace(fit, row_scale2=row, col_scale2=col)


def _refit_row_column(target: Tensor, member: Tensor, sign: Tensor, col: Tensor) -> tuple[Tensor, Tensor]:
    """One update of the row scales, then of the column scales (Eq. 12, 13)."""
    aligned = sign * target * member
    row = _ratio(aligned @ col.T, member @ (col**2).T)
    return row, _ratio(row.T @ aligned, (row**2).T @ member)


def _unit_mean(row: Tensor, col: Tensor, used: Tensor) -> tuple[Tensor, Tensor]:
    mean = (col * used).sum() / used.sum().clamp(min=1)
    mean = torch.where(mean > 0, mean, torch.ones_like(mean))
    return row * mean, col / mean * used
