"""Weights with a smaller condition number and nearly the same outputs: proximal gradient descent on singular values.

==================  =======================================================================================
symbol              meaning
==================  =======================================================================================
W, W0               weight, (out_features, in_features), being changed; the original
G                   second moment Σ x xᵀ / N of the inputs, (in_features, in_features); any positive multiple
L                   largest eigenvalue of G
t                   strength of the proximal step; one value serves all layers, since the step size is 1/L
σ, κ                singular values, σ_max / σ_min
𝒢                   what the proximal step lowers, see :func:`compact`
==================  =======================================================================================

Minimised is ``½ ‖(W - W0) G^½‖² + t L 𝒢(W)``. The proximal step of "variance" is the exact global minimizer of its own
objective, so the sum never rises with step size 1/L, although 𝒢 is not convex in W. That of "top" is one only where
nothing is tied, and "clip" is a projection without an 𝒢.

Source: CondiQuant (arXiv 2502.15478), section on condition number optimization.
Differs: the abstract, the figures and the reviews are public, the formula of 𝒢 and the step sizes are not; "variance"
is what fits what they say of it (closed form, compacts singular values, penalizes their deviation).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

REGULARIZERS = ("variance", "top", "clip")
# Below it a singular value counts as zero when κ is stated.
FLOOR = 1e-12


def compact(sigma: Tensor, strength: float, regularizer: str = "variance", limit: float = 30.0) -> Tensor:
    """Proximal step on singular values.

    Args:
        sigma: (n,), >= 0, descending.
        strength: t, >= 0; below n for "top". "clip" has none.
        regularizer: "variance": 𝒢 = ½ Σ (σ - mean σ)², gives ``(σ + t · mean) / (1 + t)``, mean and order kept;
            "top": 𝒢 = ½ σ_1² - ½ Σ σ² / n, gives ``σ_1 / (1 + t (1 - 1/n))`` and ``σ / (1 - t/n)`` for the others,
            the first tied to the second where it would fall below it; "clip": ``max(σ, σ_1 / limit)``.
        limit: largest κ that "clip" leaves, >= 1.

    Returns:
        (n,), descending.

    Raises:
        ValueError: unknown regularizer, or a strength or limit that it does not allow.

    Source: "variance" from CondiQuant's description, "top" from the regularizer of Nenov, Haider and Balzano 2024.
    """
    count = len(sigma)
    _check(count, strength, regularizer, limit)
    if regularizer == "variance":
        return (sigma + strength * sigma.mean()) / (1 + strength)
    if regularizer == "clip":
        return torch.maximum(sigma, sigma[:1] / limit)
    rest = sigma[1:] / (1 - strength / count)
    first = sigma[:1] / (1 + strength * (1 - 1 / count))
    return torch.cat([torch.maximum(first, rest[:1]) if count > 1 else first, rest])


def _check(count: int, strength: float, regularizer: str, limit: float) -> None:
    """Refuse what :func:`compact` cannot take for so many singular values."""
    if regularizer not in REGULARIZERS:
        raise ValueError(f"regularizer must be one of {', '.join(REGULARIZERS)}, got {regularizer!r}")
    if not 0 <= strength < math.inf or (regularizer == "top" and strength >= count):
        raise ValueError(f"strength of {regularizer!r} must be at least 0 (top: below {count}), got {strength}")
    if not limit >= 1:
        raise ValueError(f"limit must be at least 1, got {limit}")


def proximal(weight: Tensor, strength: float, regularizer: str = "variance", limit: float = 30.0) -> Tensor:
    """Return the weight with singular values from :func:`compact` and the same singular vectors; (n, m), floating."""
    u, sigma, v = torch.linalg.svd(weight, full_matrices=False)
    return (u * compact(sigma, strength, regularizer, limit)) @ v


def condition(
    weight: Tensor,
    moment: Tensor,
    strength: float,
    steps: int = 30,
    regularizer: str = "variance",
    limit: float = 30.0,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """Lower the condition number of a weight along directions that its inputs barely use.

    Args:
        weight: W0, (n, m), floating; not modified.
        moment: G, (m, m), symmetric, positive semi-definite, finite; any positive multiple.
        strength: t, >= 0; 0 returns the weight ("clip" takes its steps all the same).
        steps: K of them; there is no test of convergence.
        regularizer: see :func:`compact`.
        limit: for "clip".
        dtype: computed in, float64 or float32; half precision has no singular values worth the name.

    Returns:
        (n, m), in the dtype of ``weight``. Unchanged for a weight of zeros, for inputs of zeros (L = 0) and for a
        weight of one row or column, whose κ is 1.

    Raises:
        ValueError: shapes do not fit, weight or moment hold NaN or infinity, or another argument is out of range.

    Source: CondiQuant (arXiv 2502.15478), proximal gradient descent with a fixed number of steps.
    Differs: the step size is 1/L for every layer, the largest that cannot overshoot; the paper's is not public.
    """
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(f"conditioning is computed in float32 or float64, got {dtype}")
    if not weight.is_floating_point():
        raise ValueError(f"the weight must be floating, got {weight.dtype}")
    if weight.dim() != 2 or moment.shape != (weight.shape[1], weight.shape[1]):
        raise ValueError(f"a weight {tuple(weight.shape)} does not fit a second moment {tuple(moment.shape)}")
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    if not bool(torch.isfinite(moment).all()):
        raise ValueError("the second moment holds NaN or infinity")
    if not bool(torch.isfinite(weight).all()):
        raise ValueError("the weight holds NaN or infinity")
    original, inputs = weight.detach().to("cpu", dtype), moment.detach().to("cpu", dtype)
    largest = float(torch.linalg.eigvalsh(inputs)[-1])
    idle = strength == 0 and regularizer != "clip"
    if idle or largest <= 0 or min(weight.shape) == 1 or not bool(original.any()):
        return weight.detach().clone()
    _check(min(weight.shape), strength, regularizer, limit)
    step = inputs / largest
    current = original
    for _ in range(steps):
        current = proximal(current - (current - original) @ step, strength, regularizer, limit)
    return current.to(weight.device, weight.dtype)


def condition_number(weight: Tensor) -> float:
    """Return κ of a matrix, its smallest singular value counted as at least 1e-12; 1 for a matrix of zeros."""
    sigma = torch.linalg.svdvals(weight.detach().to("cpu", torch.float64))
    return float(sigma[0] / sigma[-1].clamp(min=FLOOR)) if float(sigma[0]) > 0 else 1.0


def spread_of(sigma: Tensor) -> Tensor:
    """Return 𝒢 of "variance", ``½ Σ (σ - mean σ)²``, a scalar."""
    return (sigma - sigma.mean()).square().sum() / 2


def output_change(weight: Tensor, changed: Tensor, moment: Tensor) -> float:
    """Return ``‖(W' - W) G^½‖ / ‖W G^½‖`` in float64: by how much outputs change; 0 if there are none."""
    one, other, inputs = (tensor.detach().double() for tensor in (weight, changed, moment))
    before = ((one @ inputs) * one).sum()
    after = (((other - one) @ inputs) * (other - one)).sum()
    return float((after.clamp(min=0) / before).sqrt()) if float(before) > 0 else 0.0
