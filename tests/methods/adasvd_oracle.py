"""AdaSVD in float64, step by step from the paper's equations, on explicit inputs; slow and literal on purpose.

X is (m, T), one column per token, as in the paper; U is (n, r), V (m, r), and the weight becomes U Vᵀ.
"""

import numpy as np


def loss(weight, inputs, up, right):
    """Eq. 4: ‖U Vᵀ X − W X‖²."""
    return float(np.linalg.norm((up @ right.T - weight) @ inputs) ** 2)


def plain(weight, rank):
    """Eq. 1-3: truncated singular value decomposition, singular values shared out."""
    left, values, right = np.linalg.svd(weight, full_matrices=False)
    root = np.sqrt(values[:rank])
    return left[:, :rank] * root, right[:rank].T * root


def whitened(weight, inputs, rank):
    """SVD-LLM: Cholesky of X Xᵀ, decomposition of W L, and the explicit inverse of L.

    Returns:
        U, V, and the singular values of W L, whose tail is the loss.
    """
    lower = np.linalg.cholesky(inputs @ inputs.T)
    left, values, right = np.linalg.svd(weight @ lower, full_matrices=False)
    root = np.sqrt(values[:rank])
    return left[:, :rank] * root, (root[:, None] * right[:rank] @ np.linalg.inv(lower)).T, values


def refit_u(weight, inputs, right):
    """Eq. 8-12: U = ((Xᵀ V)⁺ (W X)ᵀ)ᵀ, one row per token."""
    return (np.linalg.pinv(inputs.T @ right, rcond=1e-10) @ (weight @ inputs).T).T


def refit_v(weight, up):
    """Eq. 13 with shapes that fit: Vᵀ = U⁺ W."""
    return (np.linalg.pinv(up, rcond=1e-10) @ weight).T


def compensated(weight, inputs, up, right, iterations):
    """Eq. 16: U, V, U, V, ...

    Returns:
        The factors and the loss of the start and after every step.
    """
    losses = [loss(weight, inputs, up, right)]
    for _ in range(iterations):
        up = refit_u(weight, inputs, right)
        losses.append(loss(weight, inputs, up, right))
        right = refit_v(weight, up)
        losses.append(loss(weight, inputs, up, right))
    return up, right, losses


def stack_of_batch(samples, buckets):
    """Eq. 14-15: means over groups of samples, position by position; samples (N, T, m) -> (buckets, T, m)."""
    size = -(-len(samples) // buckets)
    return np.stack([samples[start : start + size].mean(0) for start in range(0, len(samples), size)])


def ratios(importance, trr, mrr):
    """Eq. 19-20, without an upper end."""
    normed = np.asarray(importance) / np.mean(importance)
    return mrr + normed * (trr - mrr)
