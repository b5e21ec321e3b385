"""AdaSVD: one linear layer, in the paper's order. Tensors in, a packed ``low_rank`` weight out.

======  =============  ======================================================
paper   here           meaning
======  =============  ======================================================
W       weight         (n, m)
X Xᵀ    second_moment  (m, m), Σ x xᵀ up to a factor
𝒰       up             (n, r)
𝒱ᵀ      down           (r, m)
τ       iterations     refits of both
======  =============  ======================================================

Source: AdaSVD (arXiv 2502.01403), Algorithm 1; whitened truncation of SVD-LLM (arXiv 2403.07378).
Differs: the refits (adaComp) need the inputs through their second moment alone, so all samples count and none have to
be averaged to fit into memory. "Stack of batch" is an option; it divides the covariance and raises the error.
Started from the whitened truncation *of the same second moment* adaComp has nothing to gain, since that is the best
there is; from the plain decomposition it converges to it. Both are tested, and of the start and all refits the best is
kept, by the error on all calibration tokens: to hold some out and choose by them cost more than it gained (part
``guard`` of ``benchmarks.quality.adasvd``). The last refit of U sees V as it is stored, which takes back part of the
rounding; so it does where factors are integers or signs: V is held so that its own outputs are kept, U is refitted to
what V became, and held likewise.

What lowers the loss of a whole model beyond the best fit of each layer lies between layers. Each is fitted to what it
receives once the layers before it are compressed, and aims half way between its own outputs there and those of the
dense model, which makes up for a part of earlier errors. The paper has neither; what each brings is measured in
``benchmarks/README.md``.
"""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

import torch
from torch import Tensor

from hf_lowbit import registry
from hf_lowbit.formats import Format, IntegerFormat, IntegerSpec
from hf_lowbit.formats.low_rank import FACTOR_DTYPES, FACTORS, LowRankFormat, LowRankSpec
from hf_lowbit.methods.adasvd.options import INTEGER, AdaSVDConfig, rank_of
from hf_lowbit.numerics import integer, low_rank

logger = logging.getLogger(__name__)
Factors = tuple[Tensor, Tensor]
# Share of the mean diagonal added to the second moment of a factor's inputs before integers make up for rounding.
INTEGER_DAMPING = 0.01
# The same for the target that makes up for changed inputs.
TARGET_DAMPING = 0.001


@dataclasses.dataclass(frozen=True)
class _Inputs:
    """What another method is told of a factor's inputs."""

    moment: Tensor

    def second_moment(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return self.moment.to(dtype)


def factorize(
    weight: Tensor,
    second_moment: Tensor | None,
    options: AdaSVDConfig,
    where: str,
    tokens: int | None = None,
    trace: list[dict[str, Any]] | None = None,
    cross: Tensor | None = None,
    stacked: Tensor | None = None,
) -> LowRankFormat:
    """Factorize one linear layer.

    Args:
        weight: (n, m), floating; not modified. Computed in float64.
        second_moment: (m, m), any positive multiple of Σ x xᵀ over the layer's inputs, or None for a run without data.
        options: see :class:`AdaSVDConfig`.
        where: name of the layer, for its ratio and for messages.
        tokens: how many inputs the second moment is of, None if there are plenty.
        trace: receives one row: rank, error of the start and after each refit, whether the moment was damped.
        cross: (m, m), Σ x x'ᵀ with x, what the layer receives in the dense model, of the same scale as the second
            moment of x', what it receives in the compressed one; None if they are alike.
        stacked: (m, m), second moment of averages of the inputs over samples, which the refits see instead; or None.

    Returns:
        The packed weight, also where its rank saves nothing; a run leaves such a layer dense.

    Raises:
        ValueError: weight or second moment hold NaN or infinity, or their shapes disagree.
    """
    rank = rank_of((weight.shape[0], weight.shape[1]), options.ratio_of(where), options.rank_multiple)
    dtype = _factor_dtype(weight.dtype, options)
    weight = weight.double()
    if not bool(torch.isfinite(weight).all()):
        raise ValueError(f"{where}: weight holds NaN or infinity")
    moment, damped = _usable(second_moment, weight.shape[1], options.damping, where, tokens)
    if cross is not None and second_moment is not None and moment is not None and options.dense_target:
        ridge = max(TARGET_DAMPING, options.damping) if damped else TARGET_DAMPING
        weight = low_rank.toward_dense(weight, second_moment.double(), cross.double(), options.dense_target, ridge)
    refit_moment = moment if stacked is None or moment is None else stacked.double()
    start = low_rank.truncate(weight, None if options.init == "svd" else moment, rank)
    (up, down), errors = best_refit(weight, refit_moment, start, options.iterations)
    up, down = low_rank.balance(up, down)
    if options.factors != "float":
        found = _held(weight, moment, (up, down), options, where, dtype)
    else:
        up, down = up.to(dtype), down.to(dtype)
        if options.iterations:
            up = _refit_rounded(weight, refit_moment, (up, down))
        found = LowRankFormat.pack(up, down, dtype)
    if trace is not None:
        whole = low_rank.output_error(weight, refit_moment, torch.zeros_like(up), down) or 1.0
        trace.append({"rank": rank, "errors": [error / whole for error in errors], "damped": damped})
    return found


def best_refit(weight: Tensor, moment: Tensor | None, start: Factors, iterations: int) -> tuple[Factors, list[float]]:
    """Refit factors, and keep what leaves the least error.

    Returns:
        The factors, and the errors of the start and after each step.
    """
    best, errors = start, [low_rank.output_error(weight, moment, *start)]
    for factors in low_rank.alternate(weight, moment, *start, iterations):
        error = low_rank.output_error(weight, moment, *factors)
        if error < min(errors):
            best = factors
        errors.append(error)
    return best, errors


def _refit_rounded(weight: Tensor, moment: Tensor | None, rounded: Factors) -> Tensor:
    """Return U refitted to V as it is stored, if that lowers the error of what is stored; else U as it is."""
    up, down = rounded
    refitted = low_rank.refit_up(weight, moment, down.double()).to(up.dtype)
    before, after = (low_rank.output_error(weight, moment, u.double(), down.double()) for u in (up, refitted))
    return refitted if after < before else up


def _held(
    weight: Tensor, moment: Tensor | None, factors: Factors, options: AdaSVDConfig, where: str, dtype: torch.dtype
) -> LowRankFormat:
    """Hold both factors in another format: V for its inputs, then U, refitted to it, for what V makes of them.

    Balanced factors have ``UᵀU`` diagonal, so what is lost of a row of V counts in the metric of G whatever the other
    rows lose: the layer's output error is that of V, row by row.
    """
    up, down = factors
    held_down = _in_format(down, moment, options, f"{where}.down", dtype)
    middle = held_down.unpack().double()
    inputs = middle @ middle.T if moment is None else middle @ moment @ middle.T
    if options.iterations:
        up = low_rank.refit_up(weight, moment, middle)
    return LowRankFormat.pack(_in_format(up, inputs, options, f"{where}.up", dtype), held_down, dtype)


def _in_format(factor: Tensor, moment: Tensor | None, options: AdaSVDConfig, where: str, dtype: torch.dtype) -> Format:
    """Hold one factor as the options say, given the second moment of its inputs."""
    if options.factor_config is not None:
        method = registry.get(options.factor_config.method)
        stats = None if moment is None else _Inputs(moment)
        held: Format = method.compress(registry.LinearUnit(where, factor.float()), stats, options.factor_config)
        return held
    spec = _integer_spec((factor.shape[0], factor.shape[1]), options, dtype)
    fit = integer.fit(
        factor,
        moment,
        bits=spec.bits,
        group_size=spec.group_size,
        symmetric=spec.symmetric,
        scale_dtype=FACTOR_DTYPES[spec.scale_dtype],
        damping=INTEGER_DAMPING,
        where=where,
    )
    return IntegerFormat.pack(spec, fit.codes, fit.scale, fit.zero)


def _integer_spec(shape: tuple[int, int], options: AdaSVDConfig, dtype: torch.dtype) -> IntegerSpec:
    scales = "float16" if dtype == torch.float32 else str(dtype).removeprefix("torch.")
    return IntegerSpec(*shape, INTEGER[options.factors], options.factor_group, True, scales)


def _factor_dtype(weight_dtype: torch.dtype, options: AdaSVDConfig) -> torch.dtype:
    found = weight_dtype if options.factor_dtype == "auto" else FACTOR_DTYPES[options.factor_dtype]
    return found if found in FACTOR_DTYPES.values() else torch.float32


def largest_spec(shape: tuple[int, int], options: AdaSVDConfig, where: str, weight_dtype: torch.dtype) -> LowRankSpec:
    """Return the largest form that the factors of a layer of shape (n, m) can take.

    Raises:
        ValueError: factors are held by a method that does not say what form they take.
    """
    rank, dtype = rank_of(shape, options.ratio_of(where), options.rank_multiple), _factor_dtype(weight_dtype, options)
    spec = LowRankSpec(*shape, rank, str(dtype).removeprefix("torch."))
    if options.factors == "float":
        return spec
    sides = {factor: spec.shape_of(factor) for factor in FACTORS}
    inner = options.factor_config
    if inner is None:
        held: dict[str, Any] = {name: _integer_spec(side, options, dtype) for name, side in sides.items()}
        return dataclasses.replace(spec, **held)
    largest = registry.get(inner.method).largest
    if largest is None:
        raise ValueError(f"{where}: {inner.method} does not say how large a factor can become")
    held = {name: largest(f"{where}.{name}", side, inner, dtype) for name, side in sides.items()}
    return dataclasses.replace(spec, **held)


def _usable(
    second_moment: Tensor | None, columns: int, damping: float, where: str, tokens: int | None
) -> tuple[Tensor | None, bool]:
    """Return the second moment in float64, or None where it says nothing, and whether it was damped.

    Raises:
        ValueError: it holds NaN or infinity, or has another shape.
    """
    if second_moment is None:
        return None, False
    if tuple(second_moment.shape) != (columns, columns):
        raise ValueError(
            f"{where}: second moment has shape {tuple(second_moment.shape)}, expected ({columns}, {columns})"
        )
    moment = second_moment.double()
    if not bool(torch.isfinite(moment).all()):
        raise ValueError(f"{where}: second moment holds NaN or infinity")
    diagonal = moment.diagonal()
    dead = int((diagonal <= 0).sum())
    if dead == columns:
        logger.warning("%s: all its inputs are zero; it is factorized without them", where)
        return None, False
    if 2 * dead > columns:
        logger.warning("%s: %d of its %d input channels are always zero", where, dead, columns)
    damped = tokens is not None and tokens < columns and damping > 0
    if damped:
        logger.warning(
            "%s: calibrated on %d tokens, fewer than its %d columns; %g of the mean diagonal is added to the second "
            "moment",
            where,
            tokens,
            columns,
            damping,
        )
        moment = moment + damping * diagonal.mean() * torch.eye(columns, dtype=moment.dtype, device=moment.device)
    return moment, damped
