"""How much a block of a model matters, from what it does to its input."""

from __future__ import annotations

import math
from collections.abc import Sequence


def importance_of(cosines: Sequence[float], kind: str) -> list[float]:
    """Importance of every block, with mean 1.

    Args:
        cosines: mean cosine of each block's input and output; clamped to [-1, 1 - 1e-6], for ``inverse_cos`` to at
            least 0.05.
        kind: ``one_minus_cos`` (Block Influence of ShortGPT, arXiv 2403.03853), ``arccos``, ``inverse_cos``, ``cos``
            or ``uniform``.

    Returns:
        One number per block; all 1 where their mean is not positive.

    Raises:
        ValueError: a cosine is NaN.
    """
    if any(math.isnan(cosine) for cosine in cosines):
        raise ValueError("the cosine of a block's input and output is not a number")
    clamped = [min(max(cosine, -1.0), 1 - 1e-6) for cosine in cosines]
    raw = {
        "one_minus_cos": lambda c: 1 - c,
        "arccos": math.acos,
        "inverse_cos": lambda c: 1 / max(c, 0.05),
        "cos": lambda c: c,
        "uniform": lambda c: 1.0,
    }
    values = [raw[kind](cosine) for cosine in clamped]
    mean = math.fsum(values) / len(values)
    return [value / mean if mean > 0 else 1.0 for value in values]
