"""Low-rank factors of a weight that keep its outputs: truncation in the metric of the inputs, and alternating refits.

Everything is in float64 and knows the inputs by their second moment alone, ``G = Σ x xᵀ``, so memory does not grow
with the number of samples. The error is ``Tr((W - UV) G (W - UV)ᵀ)``, the squared error of the outputs.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

# Singular values of a Gram matrix below this share of the largest count as zero in a pseudo-inverse.
RTOL = 1e-12


def output_error(weight: Tensor, second_moment: Tensor | None, up: Tensor, down: Tensor) -> float:
    """Squared error of the outputs, ``Tr(R G Rᵀ)`` with ``R = W - UV``; of the weights without a second moment."""
    residual = weight - up @ down
    return float(((residual if second_moment is None else residual @ second_moment) * residual).sum())


def truncate(weight: Tensor, second_moment: Tensor | None, rank: int) -> tuple[Tensor, Tensor]:
    """Best factors of a rank: those with the least error of the outputs.

    Args:
        weight: (n, m), W, float64.
        second_moment: (m, m), G, float64, symmetric and positive semi-definite; None is the identity, which gives the
            truncated singular value decomposition of W.
        rank: r, from 1 to min(n, m).

    Returns:
        U (n, r) with orthonormal columns and V (r, m) = UᵀW.

    Source: SVD-LLM (arXiv 2403.07378), whitening by Cholesky; AdaSVD (arXiv 2502.01403), Algorithm 1; Eckart-Young in
    the norm of G.
    Differs: neither the inverse of a factor of G nor a positive definite G is needed. With G = LLᵀ and the singular
    value decomposition P Σ Qᵀ of WL, the published form P_r Σ_r Q_rᵀ L⁻¹ equals P_r P_rᵀ W, and P_r holds the leading
    eigenvectors of W G Wᵀ. For n > m they come from the smaller matrix LᵀWᵀWL.
    """
    up = leading_outputs(weight, second_moment)[:, :rank]
    return up, up.T @ weight


def leading_outputs(weight: Tensor, second_moment: Tensor | None) -> Tensor:
    """Orthonormal directions of the outputs, (n, min(n, m)), most energy first: P of :func:`truncate`, whole."""
    rows, columns = weight.shape
    if rows <= columns:
        return _eigenvectors(output_gram(weight, second_moment))
    whitened = weight if second_moment is None else weight @ _root(second_moment)
    return torch.linalg.qr(whitened @ _eigenvectors(whitened.T @ whitened)).Q


def metric_roots(metric: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """Symmetric square root of a metric of the outputs, and its inverse.

    Args:
        metric: (n, n), float64, symmetric and positive semi-definite; not zero.
        damping: share of the mean eigenvalue that is added to all of them, above 0, so that there is an inverse.

    Returns:
        R and R⁻¹. With factors U', V of R W, the product R⁻¹U' V has the least error ``Tr(M E G Eᵀ)`` of its rank, for
        the damped metric M and what is lost, E.
    """
    values, vectors = torch.linalg.eigh((metric + metric.T) / 2)
    values = values.clamp(min=0)
    values = values + damping * values.mean()
    return (vectors * values.sqrt()) @ vectors.T, (vectors * values.rsqrt()) @ vectors.T


def output_energies(weight: Tensor, second_moment: Tensor | None) -> Tensor:
    """Energy of each direction of :func:`leading_outputs`, (n,), falling: eigenvalues of W G Wᵀ, none below zero.

    What :func:`truncate` at rank r loses, its :func:`output_error`, is the sum of all but the first r.
    """
    gram = output_gram(weight, second_moment)
    return torch.linalg.eigvalsh(gram).clamp(min=0).flip(0)


def output_gram(weight: Tensor, second_moment: Tensor | None) -> Tensor:
    """Gram matrix of the outputs, ``W G Wᵀ``, (n, n), symmetric."""
    gram = weight @ (weight.T if second_moment is None else second_moment @ weight.T)
    return (gram + gram.T) / 2


def regress(
    weight: Tensor, cross: Tensor, second_moment: Tensor, rank: int, damping: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Best factors of a rank when inputs have changed: outputs W x are wanted, from other inputs x'.

    Args:
        weight: (n, m), W, float64.
        cross: (m, m), Σ x x'ᵀ over the same tokens.
        second_moment: (m, m), G' = Σ x' x'ᵀ.
        rank: r, from 1 to min(n, m).
        damping: see :func:`toward_dense`.

    Returns:
        U (n, r) with orthonormal columns and V (r, m) that minimise ``Σ ‖W x - U V x'‖²``, up to the damping.

    Source: reduced-rank regression (Izenman, 1975): the full regression ``M = W Σ x x'ᵀ (G')⁻¹``, truncated in the
    metric of G'.
    Differs: the damping draws M towards W, not towards zero. Tokens that calibration did not meet have inputs in
    directions that x' hardly has, and a zero there would take their outputs away.
    """
    return truncate(toward_dense(weight, second_moment, cross, 1.0, damping), second_moment, rank)


def _eigenvectors(gram: Tensor) -> Tensor:
    """Eigenvectors of a symmetric matrix, those of the largest eigenvalues first."""
    return torch.linalg.eigh((gram + gram.T) / 2).eigenvectors.flip(1)


def _root(second_moment: Tensor) -> Tensor:
    """A square L with ``LLᵀ = G``; by Cholesky, or by eigenvalues where G is not positive definite."""
    lower, failed = torch.linalg.cholesky_ex(second_moment)
    if not int(failed):
        return lower
    values, vectors = torch.linalg.eigh((second_moment + second_moment.T) / 2)
    return vectors * values.clamp(min=0).sqrt()


def refit_up(weight: Tensor, second_moment: Tensor | None, down: Tensor) -> Tensor:
    """Best U for a given V: ``W G Vᵀ (V G Vᵀ)⁺``, (n, r).

    Source: AdaSVD (arXiv 2502.01403), Eq. 8-12.
    Differs: there the pseudo-inverse is that of XᵀVᵀ, one row per token; this is the same from G alone.
    """
    moved = down if second_moment is None else down @ second_moment
    return _solve(moved @ down.T, moved @ weight.T).T


def refit_down(weight: Tensor, up: Tensor) -> Tensor:
    """Best V for a given U: ``U⁺ W``, (r, m), whatever the inputs (for a singular G one of the best).

    Source: AdaSVD (arXiv 2502.01403), Eq. 13, whose printed form does not fit the shapes.
    """
    return _solve(up.T @ up, up.T @ weight)


def _solve(gram: Tensor, right: Tensor) -> Tensor:
    """``gram⁺ right`` for a positive semi-definite matrix: by Cholesky, or the pseudo-inverse where it is singular."""
    lower, failed = torch.linalg.cholesky_ex(gram)
    diagonal = lower.diagonal()
    if not int(failed) and float(diagonal.min() / diagonal.max()) ** 2 > RTOL:
        return torch.cholesky_solve(right, lower)
    return torch.linalg.pinv((gram + gram.T) / 2, rtol=RTOL, hermitian=True) @ right


def alternate(
    weight: Tensor, second_moment: Tensor | None, up: Tensor, down: Tensor, iterations: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Refit U, then V, over and over; each step is the exact minimiser, so the error never rises.

    Args:
        weight: (n, m), float64.
        second_moment: (m, m), float64, or None.
        up: (n, r), the start.
        down: (r, m), the start.
        iterations: pairs of steps.

    Yields:
        The factors after every single step.

    Source: AdaSVD (arXiv 2502.01403), Eq. 16 (adaComp).
    """
    for _ in range(iterations):
        up = refit_up(weight, second_moment, down)
        yield up, down
        down = refit_down(weight, up)
        yield up, down


def balance(up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    """The same product in factors of like size: ``UᵀU = VVᵀ``, diagonal and falling, so that half precision does.

    Args:
        up: (n, r), with r <= n.
        down: (r, m), with r <= m.

    Returns:
        Such factors; the largest entry of each column of U is positive, so that they do not depend on signs.
    """
    left, above = torch.linalg.qr(up)
    right, below = torch.linalg.qr(down.T)
    inner_left, values, inner_right = torch.linalg.svd(above @ below.T)
    root = values.sqrt()
    up, down = left @ inner_left * root, root[:, None] * (inner_right @ right.T)
    largest = up.gather(0, up.abs().argmax(0, keepdim=True))
    sign = torch.where(largest < 0, -1.0, 1.0).to(up.dtype)
    return up * sign, down * sign.T


def toward_dense(weight: Tensor, second_moment: Tensor, cross: Tensor, share: float, damping: float) -> Tensor:
    """The weight whose outputs on present inputs come nearest to a mixture of its own and of the dense model's.

    ``M = W ((1 - s) G + s C + δI) (G + δI)⁻¹`` minimises ``E‖W ((1 - s) x' + s x) - M x'‖²`` up to the damping, which
    holds it at W in directions that x' hardly has. Factors fitted to M in place of W make up for a part of what blocks
    before have changed.

    Args:
        weight: (n, m), W, float64.
        second_moment: (m, m), G = Σ x' x'ᵀ over the inputs x' in the model as it is now, float64.
        cross: (m, m), C = Σ x x'ᵀ with x, what the layer receives in the dense model, of the same scale.
        share: s, from 0 (W itself) to 1.
        damping: δ as a share of the mean diagonal of G.

    Returns:
        (n, m), float64.
    """
    ridge = damping * second_moment.diagonal().mean() * torch.eye(len(second_moment), dtype=weight.dtype).to(weight)
    mixed = (1 - share) * second_moment + share * cross + ridge
    return _solve(second_moment + ridge, (weight @ mixed).T).T
