"""Which weights get how many bits under a budget, from how much each part of a model suffers (AIGQ, offline)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

from torch import Tensor

TERMS = 3
EQUAL = (1 / TERMS,) * TERMS


@dataclasses.dataclass(frozen=True)
class Damage:
    """What quantizing one part of a model does, the three terms of its sensitivity.

    Attributes:
        numeric: relative squared error of what its layers return.
        perceptual: 1 - cosine of the model's output with and without.
        temporal: relative error (L1) of the differences between frames of that output.
    """

    numeric: float
    perceptual: float
    temporal: float

    @property
    def terms(self) -> tuple[float, float, float]:
        """The three numbers."""
        return self.numeric, self.perceptual, self.temporal


def perceptual_damage(dense: Tensor, quantized: Tensor) -> float:
    """Return ``1 - cos`` of two outputs, in float64; 0 for two that are zero."""
    a, b = dense.double().flatten(), quantized.double().flatten()
    size = float(a.norm() * b.norm())
    return max(0.0, 1 - float(a @ b) / size) if size else float(bool(a.norm() + b.norm()))


def temporal_damage(dense: Tensor, quantized: Tensor, frame_axis: int) -> float:
    """Return how wrong the differences from frame to frame become, relative to them; 0 where there are none.

    Args:
        dense: output with frames along ``frame_axis``.
        quantized: the same shape.
        frame_axis: that axis.
    """
    a, b = (tensor.double().diff(dim=frame_axis) for tensor in (dense, quantized))
    size = float(a.abs().sum())
    return float((a - b).abs().sum()) / size if size else 0.0


def sensitivities(
    damage: Mapping[str, Mapping[int, Damage]], weights: Sequence[float] = EQUAL
) -> dict[str, dict[int, float]]:
    """Return one number for each part and bits: the three terms, each in shares of its sum over the parts.

    Args:
        damage: of each part, for each number of bits.
        weights: of the three terms.

    Raises:
        ValueError: there are not three weights, or one is negative, infinite or NaN.

    Source: the paper names the three terms and no formula. Each is divided by its sum over the parts at the lowest
    bits, so that their units do not matter; a term that is zero everywhere has no say.
    """
    numbers = isinstance(weights, Sequence) and all(isinstance(weight, (int, float)) for weight in weights)
    if not numbers or len(weights) != TERMS or not all(0 <= weight < math.inf for weight in weights):
        raise ValueError(f"sensitivity_weights must be {TERMS} numbers of at least 0, got {weights!r}")
    totals = [sum(rows[min(rows)].terms[i] for rows in damage.values()) for i in range(TERMS)]
    scales = [weight / total if total > 0 else 0.0 for weight, total in zip(weights, totals, strict=True)]
    return {
        part: {bits: sum(s * t for s, t in zip(scales, row.terms, strict=True)) for bits, row in rows.items()}
        for part, rows in damage.items()
    }


def allocate(
    parameters: Mapping[str, int], sensitivity: Mapping[str, Mapping[int, float]], choices: Sequence[int], b_avg: float
) -> dict[str, int]:
    """Return the bits of each part: all start at the fewest, and the one that gains most per bit is raised next.

    It ends before the raise that would exceed the budget. Whatever the budget, raises come in one order, so that no
    part loses bits when the budget grows.

    Args:
        parameters: how many each part has.
        sensitivity: for each part and number of bits; what is absent (the dense weights' 16) counts as 0.
        choices: numbers of bits, at least one; one that is there twice counts once.
        b_avg: most bits per parameter, on average.

    Raises:
        ValueError: not even the fewest bits fit the budget, or it is no number.

    Source: Eq. (7).  Differs: weighed by parameters, so that the budget is the size; printed, a small layer counts as
    much as a large one.
    """
    levels = sorted(set(choices))
    if not isinstance(b_avg, (int, float)) or not b_avg >= levels[0]:  # NaN is below everything, too
        raise ValueError(f"b_avg must be at least {levels[0]}, the fewest bits there are, got {b_avg!r}")
    bits = dict.fromkeys(parameters, levels[0])
    budget = b_avg * sum(parameters.values())
    spent = sum(parameters[part] * bits[part] for part in bits)

    def gain(part: str) -> float:
        now, after = bits[part], levels[levels.index(bits[part]) + 1]
        saved = sensitivity[part].get(now, 0.0) - sensitivity[part].get(after, 0.0)
        return saved / (parameters[part] * (after - now))

    while open_parts := [part for part in bits if bits[part] < levels[-1]]:
        best = max(open_parts, key=lambda part: (gain(part), part))
        after = levels[levels.index(bits[best]) + 1]
        spent += parameters[best] * (after - bits[best])
        if spent > budget * (1 + 1e-12):
            break
        bits[best] = after
    return bits
