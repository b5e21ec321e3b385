"""One uniform grid for a whole tensor, and the search for its two ends.

``q = round((clamp(x, l, u) - l) / s)`` from 0 to ``2^b - 1`` and ``x̂ = s · q + l`` with ``s = (u - l) / (2^b - 1)``;
the same for weights and for activations. Both ends are values of the grid; a constant tensor has u = l, s = 1, q = 0.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hf_lowbit.kernels.rounding import on_range, range_codes, range_step

SEARCHES = ("output", "dobi", "percentile", "minmax")
SIDES = ("auto", "one", "two")
# Values that candidates are compared on; more do not change the outcome by more than another draw of them does.
MOST_VALUES = 200_000
# A range whose lower end is so small beside the upper one starts at its minimum: soft-max and GELU outputs.
ONE_SIDED_SHARE = 0.2
# Shares below the upper end that "output" tries: they find ranges off the middle, where one end has the outliers.
PERCENTILES = (0.9, 0.95, 0.98, 0.99, 0.995, 0.999, 0.9995, 0.9999)
# u - l is not let below it, so that a learned range cannot vanish.
LEAST_RANGE = 1e-8


class _Grid(torch.autograd.Function):
    """:func:`on_range` with gradients for the values and for both ends."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, low: Tensor, high: Tensor, bits: int) -> Tensor:
        codes = range_codes(values, (low, high), bits)
        ctx.save_for_backward(values, low, high, codes)
        ctx.bits = bits
        return codes * range_step(low, high, bits) + low

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        values, low, high, codes = ctx.saved_tensors
        below, above = values < low, values > high
        # x̂ = l + s q: with round as identity and u - l = s (2^b - 1), ∂x̂/∂u = (q - v) / (2^b - 1) inside, where
        # v = (x - l) / s is q before rounding; outside q is an end, and the gradient goes to that end alone
        inside = ~(below | above)
        place = (values - low) / range_step(low, high, ctx.bits)
        share = torch.where(inside, (codes - place) / (2**ctx.bits - 1), torch.zeros_like(values))
        to_high = torch.where(above, torch.ones_like(values), share)
        to_low = torch.where(below, torch.ones_like(values), -share)
        return grad * inside, (grad * to_low).sum(), (grad * to_high).sum(), None


def learned_grid(values: Tensor, ends: Any, bits: int) -> Tensor:
    """Return :func:`on_range` of values, with gradients for both ends.

    Rounding counts as the identity; a value below l sends its gradient to l, one above u to u; inside, the ends get
    what comes through the step.

    Args:
        values: any shape, floating.
        ends: two scalar tensors, the second above the first.
        bits: of a code.

    Source: 2DQuant (arXiv 2406.06649), DQC; the gradients of PACT and LSQ for both ends.
    """
    found: Tensor = _Grid.apply(values, *ends, bits)
    return found


def sample(values: Tensor, most: int = MOST_VALUES) -> Tensor:
    """Return at most so many of the values, evenly spaced over the tensor as it lies, (k,), in float32."""
    flat = values.detach().reshape(-1)
    if len(flat) > most:
        flat = flat[torch.linspace(0, len(flat) - 1, most, dtype=torch.float64).long()]
    return flat.float()


def is_one_sided(low: float, high: float, sides: str = "auto") -> bool:
    """Return whether only the upper end of a range is searched."""
    return sides == "one" or (sides == "auto" and high > 0 and low >= -ONE_SIDED_SHARE * high)


def search_bounds(
    values: Tensor,
    bits: int,
    search: str = "dobi",
    *,
    limits: tuple[float, float] | None = None,
    candidates: int = 100,
    sides: str = "auto",
    percentile: float = 0.999,
    error: Callable[[Tensor], float] | None = None,
) -> tuple[float, float]:
    """Choose both ends of the grid of a tensor.

    Args:
        values: any shape, floating, finite; a sample of the tensor will do.
        bits: of a code.
        search: "dobi": of so many ranges, each narrower than the one before, the one with the least ``‖x - x̂‖``;
            "output": of these and of some between percentiles the one with the least ``error``; "percentile": leaves
            out the same share at both ends; "minmax".
        limits: least and largest value of the whole tensor; None takes those of ``values``.
        candidates: ranges that "dobi" and "output" try; the first is the whole one.
        sides: "two" moves both ends inwards by ``(max - min) / (2 · candidates)`` a time, "one" only the upper end by
            twice that; "auto" chooses "one" where the least value is at least -0.2 times the largest.
        percentile: share of the values below the upper end, 0.5 to 1.
        error: for "output", of the grid between these two ends, (2,), float32; None takes ``‖x - x̂‖``.

    Returns:
        l and u, l <= u.

    Raises:
        ValueError: no values, non-finite ones, an unknown search, or another argument out of range.

    Source: 2DQuant (arXiv 2406.06649), Algorithm 1 (distribution-oriented bound initialization).
    Differs: its released code never searches one-sided; here the sign of the values decides. "output" is ours.
    """
    if search not in SEARCHES or sides not in SIDES:
        raise ValueError(f"search must be one of {SEARCHES} and sides of {SIDES}, got {search!r} and {sides!r}")
    if candidates < 1 or not 0.5 <= percentile <= 1:
        raise ValueError(
            f"candidates must be at least 1 and percentile from 0.5 to 1, got {candidates} and {percentile}"
        )
    flat = sample(values)
    if not len(flat) or not bool(torch.isfinite(flat).all()):
        raise ValueError("bounds need values, all of them finite")
    low, high = (float(flat.min()), float(flat.max())) if limits is None else limits
    if search == "minmax" or high <= low:
        return low, high
    one = is_one_sided(low, high, sides)
    if search == "percentile":
        (found,) = _between(flat, (percentile,), low if one else None) or [(low, high)]
        return found
    tried = _narrowing(low, high, candidates, one)
    if search == "output":
        tried += _between(flat, PERCENTILES, low if one else None)

    def own(ends: Tensor) -> float:
        return float((on_range(flat, ends, bits) - flat).square().sum(dtype=torch.float64))

    measure = own if error is None or search == "dobi" else error
    errors = [measure(flat.new_tensor(ends)) for ends in tried]
    return tried[errors.index(min(errors))]


def _narrowing(low: float, high: float, count: int, one: bool) -> list[tuple[float, float]]:
    """Return so many ranges, from the whole one inwards."""
    move = (high - low) / (count if one else 2 * count)
    return [(low if one else low + i * move, high - i * move) for i in range(count)]


def _between(flat: Tensor, shares: tuple[float, ...], low: float | None) -> list[tuple[float, float]]:
    """Return the ranges between percentiles, or from ``low`` to them, without those that are empty."""
    ordered = flat.sort().values
    last = len(ordered) - 1
    found = [
        (float(ordered[round((1 - share) * last)]) if low is None else low, float(ordered[round(share * last)]))
        for share in shares
    ]
    return [(lower, upper) for lower, upper in found if upper > lower]
