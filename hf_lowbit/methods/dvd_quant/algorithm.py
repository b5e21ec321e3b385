"""DVD-Quant on plain tensors: balance, rotate, search grids (BGR).

======  =========================================  ======  =========================================
symbol  name                                       symbol  name
======  =========================================  ======  =========================================
``Δ``   step, ``scale``                            ``s``   ``smooth``, factor of a column
``z``   ``zero``                                   ``H``   rotation, orthogonal
``w_q`` ``codes``, 0 to 2^b - 1                    ``W̃``   ``rows``, the weight in the rotated basis
``n``   ``n_bounds``                               ``E``   squared error of a row
======  =========================================  ======  =========================================

Bounded-init grid refinement, for each row of ``W̃`` or each group of its columns: from some ranges, ever narrower, the
grids that they give; then alternately the best step for fixed codes and the best zero point for fixed codes, and codes
anew. The best grid seen anywhere is kept, for each row by itself.

Differs from the printed Algorithm 1, where that cannot be meant:

* Both ends of a range move inwards by ``i R / n``, so from the middle on they would cross; they stop at
  ``max_shrink``. The first range is the whole one, so the result is never worse than plain minimum and maximum.
* It says to stop when ``E_j - E_{j-1} < ε``, which holds in the first iteration that gains; here when no row gains a
  share of ``tol``.
* It compares errors of the whole matrix; each row has its own minimum, so here the rows are compared.
* The zero point is rounded and then clamped; it must be a code. Ranges contain 0 for the same reason: the zero
  point of a row around 8 would be far outside of the codes, and clamping it would spoil the row.
* Steps are rounded to the dtype they are stored in before codes are made, so that used and stored ones are the same.
* With a second moment of the inputs, which the paper's method does without, columns make up for each other's rounding
  in the rotated basis, and grids are searched with the inputs' weights: :func:`hf_lowbit.numerics.integer.fit`.

Every rotation is made while the model runs. Only that of an attention's output could move into weights (attention is
linear in the values, so blocks within a head would turn the rows of the value projection and the columns of the output
projection). It does not: the pair would then only be right together, and adapters, ``dequantize()`` and recipes with
another method for one of them take layers one by one; rotating is at most some percent of a product's time
(``python -m benchmarks.kernels.integer --rounding``).

Source: DVD-Quant (arXiv 2505.18663), Eq. 1-9 and Algorithm 1.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from hf_lowbit.formats import IntegerFormat, IntegerSpec
from hf_lowbit.formats.integer import SCALE_DTYPES
from hf_lowbit.methods.dvd_quant.options import DVDQuantConfig
from hf_lowbit.numerics import integer
from hf_lowbit.numerics import rotation as turning
from hf_lowbit.numerics.integer import IntegerFit, codes_of, grid_of

# Elements of the rows that are searched at once: four copies of them are alive, 64 MiB in float32 altogether.
_AT_ONCE = 2**22
# Factors of columns are kept between the inverse and this: a column of nearly zeros must not leave half precision.
_MOST_SMOOTH = 2.0**10


@dataclasses.dataclass(frozen=True)
class Search:
    """How grids are searched.

    Attributes:
        bits: of a code.
        scale_dtype: that steps are stored in.
        starts: shares of the range by which both ends move inwards, the first 0.
        iters: refinements of a start at most.
        tol: share of the error below which a refinement ends the loop.
        full: refine every start, not only the best of each row.
        symmetric: zero point in the middle and no refinement, for the plain baseline.
    """

    bits: int
    scale_dtype: torch.dtype
    starts: tuple[float, ...] = (0.0,)
    iters: int = 0
    tol: float = 0.0
    full: bool = False
    symmetric: bool = False

    @classmethod
    def of(cls, options: DVDQuantConfig) -> Search:
        """Return the search that the options ask for."""
        dtype = SCALE_DTYPES[options.scale_dtype]
        if options.weight_init not in ("bgr", "pbq"):
            return cls(options.w_bits, dtype, symmetric=options.weight_init == "absmax")
        last = math.floor(options.max_shrink * options.n_bounds + 1e-9)
        starts = tuple(i / options.n_bounds for i in range(last + 1))
        return cls(options.w_bits, dtype, starts, options.iters, options.tol, options.refine == "full")


@dataclasses.dataclass
class _Best:
    """The best grid of each row so far; all (rows, 1)."""

    scale: Tensor
    zero: Tensor
    error: Tensor

    def keep(self, scale: Tensor, zero: Tensor, error: Tensor) -> None:
        better = error < self.error  # never where the error is NaN, from a step beyond its dtype
        self.scale = torch.where(better, scale, self.scale)
        self.zero = torch.where(better, zero, self.zero)
        self.error = torch.where(better, error, self.error)


def _error(rows: Tensor, scale: Tensor, zero: Tensor, codes: Tensor) -> Tensor:
    return (rows - scale * (codes - zero)).square_().sum(1, keepdim=True)


def refined(rows: Tensor, scale: Tensor, zero: Tensor, codes: Tensor, search: Search) -> tuple[Tensor, Tensor, Tensor]:
    """One refinement: the best step for the codes, the best zero point for codes and step, codes anew.

    Args:
        rows: (n, k), floating.
        scale: (n, 1), > 0.
        zero: (n, 1), whole numbers.
        codes: (n, k), whole numbers.
        search: bits and the dtype of steps.

    Returns:
        Step, zero point and codes, of the shapes given.

    Source: Eq. 4-6. Differs: the bars of Eq. 5 are means over a row, which least squares gives; a step that would be
    0 or below stays.
    """
    centred = codes - zero
    top, below = (centred * rows).sum(1, keepdim=True), centred.square().sum(1, keepdim=True)
    found = (top / below).to(search.scale_dtype).to(rows.dtype)
    scale = torch.where((found > 0) & torch.isfinite(found), found, scale)
    zero = (codes.mean(1, keepdim=True) - rows.mean(1, keepdim=True) / scale).round().clamp(0, 2**search.bits - 1)
    return scale, zero, codes_of(rows, scale, zero, search.bits)


def _refine(rows: Tensor, best: _Best, scale: Tensor, zero: Tensor, search: Search) -> None:
    """Refine grids until no row gains; what is best goes into ``best``."""
    codes = codes_of(rows, scale, zero, search.bits)
    error = _error(rows, scale, zero, codes)
    best.keep(scale, zero, error)
    for _ in range(search.iters):
        scale, zero, codes = refined(rows, scale, zero, codes, search)
        before, error = error, _error(rows, scale, zero, codes)
        best.keep(scale, zero, error)
        if not bool((before - error > search.tol * before).any()):
            break


def grids(rows: Tensor, search: Search) -> tuple[Tensor, Tensor, Tensor]:
    """Search a grid for every row.

    Args:
        rows: (n, k), floating, finite.
        search: how.

    Returns:
        Step (n, 1) > 0, as ``search.scale_dtype`` holds it, zero point (n, 1), whole numbers, and squared error
        (n, 1), which is infinite for a row whose whole range has no step of that dtype. A row of zeros, or of values
        for which the step would vanish, has step 1, and with it zeros.
    """
    low, high = rows.amin(1, keepdim=True).clamp(max=0), rows.amax(1, keepdim=True).clamp(min=0)
    if search.symmetric:  # the baseline has one largest magnitude for both sides
        high = torch.maximum(-low, high)
        low = -high
    span = high - low
    # of a row beyond the dtype narrower ranges might fit, and clip what nobody asked to
    fits = torch.isfinite((span / (2**search.bits - 1)).to(search.scale_dtype))
    one = torch.ones_like(low)
    best = _Best(one, torch.zeros_like(low), torch.full_like(low, math.inf))
    for share in search.starts:
        bounds = low + share * span, high - share * span
        scale, zero = grid_of(*bounds, search.bits, search.symmetric, search.scale_dtype)
        if search.full:
            _refine(rows, best, scale, zero, search)
        else:
            best.keep(scale, zero, _error(rows, scale, zero, codes_of(rows, scale, zero, search.bits)))
    if search.iters and not search.full:
        _refine(rows, best, best.scale, best.zero, search)
    return best.scale, best.zero, torch.where(fits, best.error, math.inf)


def fit(rows: Tensor, group_size: int, search: Search, where: str) -> IntegerFit:
    """Put a weight on grids, one for each row or each group of its columns, some rows at a time.

    Args:
        rows: (n, m), float32, finite.
        group_size: columns that share a grid, 0 for all; the last group of a row may be shorter.
        search: how grids are found.
        where: name of the layer, for messages.

    Returns:
        Codes, steps and zero points.

    Raises:
        ValueError: a step leaves the range of its dtype.
    """
    count, columns = rows.shape
    size = min(group_size or columns, columns)
    groups, tail = -(-columns // size), columns % size
    at_once = max(1, _AT_ONCE // columns)
    codes = torch.empty((count, columns), dtype=torch.uint8, device=rows.device)
    scale, zero = (rows.new_empty((count, groups)) for _ in range(2))
    for first in range(0, count, at_once):
        some = slice(first, min(first + at_once, count))
        whole = columns - tail
        for part, place in ((slice(0, whole), slice(0, groups - bool(tail))), (slice(whole, None), slice(-1, None))):
            if part.start == columns:
                continue
            own = rows[some, part]
            shape = (own.shape[0], -1)
            lines = own.reshape(-1, size if part.start == 0 else tail)
            found_scale, found_zero, error = grids(lines, search)
            if not bool(torch.isfinite(error).all()):
                name = str(search.scale_dtype).removeprefix("torch.")
                way_out = "" if name == "float32" else "; use scale_dtype='float32'"
                raise ValueError(f"{where}: a scale leaves the range of {name}{way_out}")
            codes[some, part] = codes_of(lines, found_scale, found_zero, search.bits).view(shape).to(torch.uint8)
            scale[some, place], zero[some, place] = found_scale.view(shape), found_zero.view(shape)
    return IntegerFit(codes, scale.to(search.scale_dtype), None if search.symmetric else zero.to(torch.uint8))


def column_balance(weight: Tensor, beta: float, beyond: float) -> Tensor:
    """Factors that even out the columns of a weight that stand out: ``s_j = r_j^{-β}``, by which inputs are divided.

    ``r_j`` is the largest weight of column j relative to that of the median column. Channels that a model scales up
    on one side of a product and down on the other become alike on both. Columns that do not stand out say little of
    their inputs: balancing all of them loses on a model without such channels much of what it gains on one with them
    (``python -m benchmarks.quality.video --part schemes``).

    Args:
        weight: (n, m), floating.
        beta: from 0, no change, to 1, balanced columns have the largest value of the median one.
        beyond: columns with ``r_j`` above it or below its inverse are balanced; 1 for all.

    Returns:
        (m,), float32, from 1/1024 to 1024; 1 for columns of zeros.

    Source: none; DVD-Quant does not scale. ViDiT-Q (arXiv 2406.02540) and QuantCache scale with calibrated inputs.
    """
    largest = weight.float().abs().amax(0)
    used = largest > 0
    ratio = torch.ones_like(largest)
    if bool(used.any()):
        ratio = torch.where(used, largest / largest[used].median(), ratio)
    stands_out = (ratio > beyond) | (ratio < 1 / beyond)
    return torch.where(stands_out, ratio.pow(-beta), 1.0).clamp(1 / _MOST_SMOOTH, _MOST_SMOOTH)


def rotation_of(columns: int, options: DVDQuantConfig) -> int:
    """Return the order of the rotation of a layer, 0 for none; layers that cannot have what is asked stay dense.

    Differs: the paper says only "Hadamard"; ``full`` is read into it, ``block`` is ours.
    """
    if options.rotation == "none":
        return 0
    if options.rotation == "full":
        return turning.full_order(columns)
    return turning.block_order(columns, options.rotation_block)


def spec_of(shape: tuple[int, int], options: DVDQuantConfig, activations: bool = True) -> IntegerSpec:
    """Return how a layer of shape (n, m) is stored; factors of columns are left out where they would all be 1."""
    rows, columns = shape
    order = rotation_of(columns, options)
    rounded = activations and options.stored_act_bits <= 8
    grouped = rounded and options.act_scale == "token_group"
    return IntegerSpec(
        out_features=rows,
        in_features=columns,
        bits=options.w_bits,
        group_size=options.columns_per_scale,
        symmetric=options.weight_init == "absmax",
        scale_dtype=options.scale_dtype,
        rotation=order,
        rotation_signs=order > 0 and options.rotation_signs_seed is not None,
        smooth=options.balance == "weight_columns" and options.beta > 0,
        activation=options.act_scale if rounded else "none",
        act_bits=options.stored_act_bits if rounded else 8,
        act_group_size=options.act_group_size if grouped else 0,
    )


def turned_moment(moment: Tensor, smooth: Tensor | None, signs: Tensor | None, order: int) -> Tensor:
    """Return the second moment of inputs as they meet the codes: divided by factors, signed, rotated.

    Args:
        moment: (m, m), of the inputs as they come.
        smooth: (m,), > 0, or None.
        signs: (m,), +1 and -1, or None.
        order: of the rotation, 0 for none.

    Returns:
        (m, m), float64.
    """
    factors = torch.ones(len(moment), dtype=torch.float64, device=moment.device)
    factors = factors if smooth is None else factors / smooth.double()
    factors = factors if signs is None else factors * signs.double()
    scaled = moment.double() * factors * factors[:, None]
    return turning.rotate(turning.rotate(scaled, order).T.contiguous(), order)


def quantize(
    weight: Tensor,
    options: DVDQuantConfig,
    where: str,
    activations: bool = True,
    second_moment: Tensor | None = None,
) -> IntegerFormat:
    """Quantize the weight of a linear layer.

    Args:
        weight: (n, m), floating; not modified. Computed in float32.
        options: of the method.
        where: name of the layer, for messages.
        activations: whether its inputs are rounded, too.
        second_moment: (m, m), any positive multiple of Σ x xᵀ over the layer's inputs; None for a run without data.

    Returns:
        A validated format.

    Raises:
        ValueError: the weight is no floating matrix or not finite, the second moment does not fit it or is not finite,
            or a step leaves the range of its dtype; the layer is named.
    """
    if weight.dim() != 2 or not weight.numel() or not weight.is_floating_point():
        raise ValueError(f"{where}: weight must be floating (n, m), got {weight.dtype} {tuple(weight.shape)}")
    if not bool(torch.isfinite(weight).all()):
        raise ValueError(f"{where}: weight holds NaN or infinity")
    if second_moment is not None and (
        second_moment.shape != (weight.shape[1], weight.shape[1]) or not bool(torch.isfinite(second_moment).all())
    ):
        raise ValueError(
            f"{where}: second moment must be finite ({weight.shape[1]}, {weight.shape[1]}), got "
            f"{tuple(second_moment.shape)}"
        )
    rows, dtype = weight.detach().float(), SCALE_DTYPES[options.scale_dtype]
    spec = spec_of((rows.shape[0], rows.shape[1]), options, activations)
    smooth = signs = None
    if spec.smooth:
        smooth = column_balance(rows, options.beta, options.balance_beyond).to(dtype)
        rows = rows * smooth.float()
        if bool((smooth == 1).all()):  # no column stands out, and factors that change nothing are not stored
            smooth, spec = None, dataclasses.replace(spec, smooth=False)
    if spec.rotation_signs and options.rotation_signs_seed is not None:
        signs = turning.random_signs(spec.in_features, options.rotation_signs_seed).to(rows.device)
        rows = rows * signs.float()
    rows = turning.rotate(rows, spec.rotation)
    if second_moment is None:
        found = fit(rows, spec.group_size, Search.of(options), where)
    else:
        found = integer.fit(
            rows,
            turned_moment(second_moment, smooth, signs, spec.rotation),
            bits=spec.bits,
            group_size=spec.group_size,
            symmetric=spec.symmetric,
            scale_dtype=dtype,
            damping=options.damping,
            where=where,
        )
    return IntegerFormat.pack(spec, found.codes, found.scale, found.zero, smooth, signs)
