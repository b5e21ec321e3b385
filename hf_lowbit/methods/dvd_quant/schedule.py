"""δ-GBS: whether a denoising step rounds activations to few bits or to more, by how fast the model's output changes.

Source: DVD-Quant (arXiv 2505.18663), Eq. 11, and the strip of bits over 50 steps in the figure beside it, which says
what the equation leaves open: the sum starts anew at the decision for many bits, and the change that this step itself
makes counts already. The decision is causal: that of a step knows the outputs of the steps before it.

Differs: the first ``warmup`` steps take many bits (there is no change before two outputs); a change that is no number
counts as a large one.
"""

from __future__ import annotations

import dataclasses

from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Drift:
    """What δ-GBS knows of a trajectory.

    Attributes:
        total: relative changes of the output since the last step with many bits, summed.
        steps: how many steps there were.
    """

    total: float = 0.0
    steps: int = 0


def decide(drift: Drift, delta: float, warmup: int) -> tuple[bool, Drift]:
    """Return whether the next step takes many bits, and the drift to go on with.

    Args:
        drift: after the step before.
        delta: how much change is let pass; 0 gives many bits always, infinity few bits after the warm-up.
        warmup: how many steps take many bits at the start.
    """
    high = drift.steps < warmup or not drift.total < delta  # so that NaN is a large change
    return high, Drift(0.0 if high else drift.total, drift.steps + 1)


def observe(drift: Drift, change: float) -> Drift:
    """Return the drift after a step whose output differs from the one before by :func:`relative_change`."""
    return dataclasses.replace(drift, total=drift.total + change)


def relative_change(output: Tensor, previous: Tensor) -> float:
    """Return ``‖output - previous‖₁ / ‖previous‖₁``, in float32; 0 if the divisor is 0.

    Args:
        output: of this step, any shape, floating.
        previous: of the step before, the same shape.
    """
    norm = float(previous.float().abs().sum())
    return float((output.float() - previous.float()).abs().sum()) / norm if norm else 0.0
