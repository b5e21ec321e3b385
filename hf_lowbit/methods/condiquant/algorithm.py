"""CondiQuant for one linear layer: condition the weight, search the grids, choose the strength.

=========  ====================================================================
symbol     name
=========  ====================================================================
W0, W'     weight as it was, and after conditioning
X          inputs of the layer, rows; X̂ on the inputs' grid
l, u       ends of a grid
t          strength of conditioning
=========  ====================================================================

Source: CondiQuant (arXiv 2502.15478) on the quantizers of 2DQuant (arXiv 2406.06649), whose code was read.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hf_lowbit.errors import CalibrationError
from hf_lowbit.kernels.rounding import on_range, range_codes
from hf_lowbit.methods.condiquant.options import CondiQuantConfig
from hf_lowbit.numerics.bounds import search_bounds
from hf_lowbit.numerics.conditioning import condition, condition_number, output_change

logger = logging.getLogger(__name__)
# Inputs of a layer on which the grid of its inputs is chosen by what comes out; all that are kept judge the strengths.
COMPARED = 1024


@dataclasses.dataclass
class LayerFit:
    """A layer on its grids.

    Attributes:
        weight: W', (n, m), what was rounded.
        codes: (n, m), uint8.
        bounds: (parts, 2), float32, ends of the grid of each part of the rows.
        act_bounds: (2,), float32, of the inputs; None where they are not rounded on a stored grid.
    """

    weight: Tensor
    codes: Tensor
    bounds: Tensor
    act_bounds: Tensor | None


def parts_of(name: str, rows: int) -> int:
    """Return into how many parts the rows of a layer fall: three for queries, keys and values in one, else one.

    Source: 2DQuant's code quantizes the three apart (``qkv_separation``).
    """
    return 3 if name.rpartition(".")[2].lower() in ("qkv", "query_key_value") and rows % 3 == 0 else 1


def bounds_of(
    values: Tensor,
    bits: int,
    options: CondiQuantConfig,
    limits: Any = None,
    error: Callable[[Tensor], float] | None = None,
) -> Tensor:
    """Return both ends of the grid of a tensor, (2,), float32, as the options search them."""
    found = search_bounds(
        values,
        bits,
        options.bound_search,
        limits=limits,
        candidates=options.dobi_candidates,
        sides=options.search_sides,
        percentile=options.percentile,
        error=error,
    )
    return torch.tensor(found, dtype=torch.float32, device=values.device)


def input_bounds(weight: Tensor, stats: Any, options: CondiQuantConfig, where: str) -> Tensor | None:
    """Return the grid of a layer's inputs, (2,), None unless it is stored.

    Args:
        weight: W0, (n, m), float32; "output" compares ``X̂ W0ᵀ`` with ``X W0ᵀ``.
        stats: of the inputs, with a sample of m columns.
        options: bits and search.
        where: name of the layer.

    Raises:
        CalibrationError: no sample of the inputs was gathered.
    """
    if options.act_mode != "static":
        return None
    rows = None if stats is None else stats.sample
    if rows is None:
        raise CalibrationError(f"{where}: a stored grid of activations needs a sample of the layer's inputs")
    few = rows[torch.linspace(0, len(rows) - 1, min(COMPARED, len(rows)), dtype=torch.float64).long()].to(weight)

    def error(ends: Tensor) -> float:
        return float(((on_range(few, ends, options.act_bits) - few) @ weight.T).square().sum(dtype=torch.float64))

    return bounds_of(rows, options.act_bits, options, (stats.low, stats.high), error)


@dataclasses.dataclass
class Products:
    """What outputs of rounded weights are compared by: ``‖X̂ Ŵᵀ - X W0ᵀ‖²`` is ``Ŵ A Ŵᵀ - 2 B Ŵᵀ``, summed, and a rest.

    Attributes:
        second: A = X̂ᵀ X̂, (m, m), float64.
        cross: B = W0 Xᵀ X̂, (n, m), float64.
    """

    second: Tensor
    cross: Tensor

    def error(self, part: Tensor, rows: slice, bits: int) -> Callable[[Tensor], float]:
        """Return the error, but for the rest, of a part of the weight as a function of the ends of its grid."""

        def of(ends: Tensor) -> float:
            values = on_range(part, ends, bits).double()
            return float(((values @ self.second - 2 * self.cross[rows]) * values).sum())

        return of


def rounded(
    weight: Tensor, parts: int, options: CondiQuantConfig, products: Products | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Round a weight.

    Args:
        weight: (n, m), float32.
        parts: equal parts of its rows, each with a grid of its own.
        options: bits and search.
        products: that "output" compares; None compares weights.

    Returns:
        Codes (n, m), uint8, ends (parts, 2) and values (n, m), float32.
    """
    codes, ends, values = [], [], []
    bits, count = options.weight_bits, len(weight) // parts
    for number, part in enumerate(weight.chunk(parts)):
        own = slice(number * count, (number + 1) * count)
        error = None if products is None else products.error(part, own, bits)
        found = bounds_of(part, bits, options, error=error)
        codes.append(range_codes(part, found, bits).to(torch.uint8))
        values.append(on_range(part, found, bits))
        ends.append(found)
    return torch.cat(codes), torch.stack(ends), torch.cat(values)


def conditioned(weight: Tensor, moment: Tensor, strength: float, parts: int, options: CondiQuantConfig) -> Tensor:
    """Condition each part of the rows of a weight by itself; (n, m), float32 (see ``numerics.conditioning``)."""
    one = [
        condition(part, moment, strength, options.cond_steps, options.regularizer, options.cond_limit)
        for part in weight.chunk(parts)
    ]
    return torch.cat(one)


def fit(weight: Tensor, stats: Any, options: CondiQuantConfig, where: str, trace: list[dict[str, Any]]) -> LayerFit:
    """Condition and round one layer.

    Args:
        weight: W0, (n, m), floating; not modified.
        stats: of its inputs, with a sample; None in a run without data.
        options: of the method.
        where: name of the layer.
        trace: gets a row with t, κ before and after, the change of outputs, and the total error ‖X̂ Ŵ'ᵀ - X W0ᵀ‖ as a
            share of ‖X W0ᵀ‖.

    Returns:
        Codes and grids.

    Raises:
        ValueError: the weight holds NaN or infinity, or is too small for the strength of regularizer "top".
        CalibrationError: static grids without a sample of the inputs.

    Source: CondiQuant, "proximal gradient descent, followed by standard 2DQuant"; DOBI for all grids.
    Differs: the paper's t is not public; "auto" takes the one with the least total error on a sample of rows, or the
    largest whose error is little above it (``cond_slack``).
    """
    original = weight.detach().float()
    if not bool(torch.isfinite(original).all()):
        raise ValueError(f"{where}: weight holds NaN or infinity")
    parts = parts_of(where, len(original))
    act_bounds = input_bounds(original, stats, options, where)
    moment = _moment_of(stats, where) if stats is not None and options.conditions else None
    candidates = options.strengths if moment is not None else (0.0,)
    _refuse_strength(max(candidates), min(len(original) // parts, original.shape[1]), options, where)
    rows = None if stats is None else stats.sample
    wanted = None if rows is None else rows.to(original) @ original.T
    inputs = rows if rows is None else _as_met(rows.to(original), act_bounds, options)
    products = None
    if inputs is not None and wanted is not None and options.bound_search == "output":
        products = Products((inputs.T @ inputs).double(), (wanted.T @ inputs).double())
    found: list[tuple[float, float, Tensor, Tensor, Tensor]] = []
    for strength in candidates:
        changed = _conditioned_or_kept(original, moment, strength, parts, options, where)
        codes, bounds, values = rounded(changed, parts, options, products)
        error = 0.0
        if inputs is not None and wanted is not None:
            error = float((inputs @ values.T - wanted).norm() / wanted.norm().clamp(min=1e-30))
        found.append((error, strength, changed, codes, bounds))
    limit = (1 + options.slack) * min(error for error, *_ in found)
    # products too large for float32 have no error to compare: then the weakest
    near = [one for one in found if one[0] <= limit] or found[:1]
    error, strength, changed, codes, bounds = max(near, key=lambda one: one[1])
    if moment is not None:
        trace.append(
            {
                "strength": strength,
                "condition_before": max(map(condition_number, original.chunk(parts))),
                "condition_after": max(map(condition_number, changed.chunk(parts))),
                "output_change": output_change(original, changed, moment),
                "total_error": error,
            }
        )
    return LayerFit(changed, codes, bounds, act_bounds)


def _refuse_strength(strength: float, count: int, options: CondiQuantConfig, where: str) -> None:
    """Refuse a strength that ``compact`` cannot take for so many singular values; one of them is never changed."""
    if options.regularizer == "top" and 1 < count <= strength:
        raise ValueError(
            f"{where}: cond_strength of regularizer 'top' must be below {count}, how many singular values the layer "
            f"has, got {strength:g}"
        )


def _as_met(rows: Tensor, act_bounds: Tensor | None, options: CondiQuantConfig) -> Tensor:
    """Return inputs as the quantized layer will meet them."""
    if options.act_mode == "none":
        return rows
    ends = torch.stack([rows.min(), rows.max()]) if act_bounds is None else act_bounds.to(rows)
    return on_range(rows, ends, options.act_bits)


def _moment_of(stats: Any, where: str) -> Tensor | None:
    """Return the second moment of a layer's inputs, float64; None, said in a warning, where it is not finite."""
    if bool(torch.isfinite(stats.total).all()):
        found: Tensor = stats.second_moment(torch.float64)
        return found
    logger.warning("%s: the second moment of its inputs is not finite; it is not conditioned", where)
    return None


def _conditioned_or_kept(
    weight: Tensor, moment: Tensor | None, strength: float, parts: int, options: CondiQuantConfig, where: str
) -> Tensor:
    """Return the conditioned weight, or the weight as it is where there are no singular values to be had."""
    if moment is None or (strength == 0 and options.regularizer != "clip"):
        return weight
    if not float(moment.diagonal().sum()) > 0:
        logger.warning("%s: receives only zeros; it is not conditioned", where)
        return weight
    try:
        return conditioned(weight, moment, strength, parts, options)
    except torch.linalg.LinAlgError as error:
        logger.warning("%s: its singular values could not be computed (%s); it is not conditioned", where, error)
        return weight
