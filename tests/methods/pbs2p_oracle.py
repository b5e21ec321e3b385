"""Slow float64 definition of PBS²P (arXiv 2502.01705) against which the package's implementation is tested.

NumPy in double precision after the method's specification (cited as "spec §…"), row by row and group by group. What it
shares with ARB-LLM comes from that method's oracle; nothing is imported from the package.

Conventions as there; ``K`` is the boolean keep mask of a block, ``N`` the weights kept of a group of ``M`` columns.
"""

import math
from dataclasses import dataclass

import arb_oracle as arb
import numpy as np

RIDGE = 1e-6  # spec §3.3-9, share of the mean diagonal
ITERATIONS = 15  # spec §3.3-8/9


# ---------------------------------------------------------------------------------------------------------------------
# Coarse stage
# ---------------------------------------------------------------------------------------------------------------------


def mean_cosine(inputs, outputs):
    """Mean over the tokens of cos(h_in, h_out); tokens with a zero side are left out (spec §3.1-1, §5)."""
    found = []
    for a, b in zip(inputs, outputs, strict=True):
        norms = math.sqrt(float(a @ a)) * math.sqrt(float(b @ b))
        if norms > 0:
            found.append(float(a @ b) / norms)
    return sum(found) / len(found)


def importance(cosines, kind):
    """Importance with mean 1 (spec §3.1-2/3)."""
    raw = []
    for cosine in cosines:
        c = min(max(cosine, -1.0), 1 - 1e-6)
        if kind == "one_minus_cos":
            raw.append(1 - c)
        elif kind == "arccos":
            raw.append(math.acos(c))
        elif kind == "inverse_cos":
            raw.append(1 / max(c, 0.05))
        elif kind == "cos":
            raw.append(c)
        else:
            raw.append(1.0)
    mean = sum(raw) / len(raw)
    return [value / mean if mean > 0 else 1.0 for value in raw]


def kept_per_block(importances, n, low, high):
    """N of every block, blocks of one size: linear map, rounding, repair of the budget (spec §3.1-3/4)."""
    wish = [min(max(low + (n - low) * value, low), high) for value in importances]
    counts = [min(max(math.floor(value + 0.5), low), high) for value in wish]
    while sum(counts) != n * len(counts):
        if sum(counts) > n * len(counts):
            movable = [i for i in range(len(counts)) if counts[i] > low]
            chosen = min(movable, key=lambda i: (wish[i] - counts[i], i))
            counts[chosen] -= 1
        else:
            movable = [i for i in range(len(counts)) if counts[i] < high]
            chosen = max(movable, key=lambda i: (wish[i] - counts[i], -i))
            counts[chosen] += 1
    return counts


# ---------------------------------------------------------------------------------------------------------------------
# Fine stage
# ---------------------------------------------------------------------------------------------------------------------


def score_of(W, d, S, kind):
    """Which weights matter (spec §3.2-5)."""
    if kind == "hessian":
        return W**2 / d**2
    if kind == "wanda":
        return np.abs(W) * np.sqrt(np.diag(S))
    return np.abs(W)


def keep_mask(E, N, M):
    """Keep N of every M columns of a row, ceil(N q / M) of a last group of q; equal scores: low columns go first."""
    K = np.ones(E.shape, dtype=bool)
    for i in range(E.shape[0]):
        for start in range(0, E.shape[1], M):
            group = range(start, min(start + M, E.shape[1]))
            drop = len(group) - math.ceil(N * len(group) / M)
            for j in sorted(group, key=lambda j: (E[i, j], j))[:drop]:
                K[i, j] = False
    return K


# ---------------------------------------------------------------------------------------------------------------------
# SPBO on one block
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Row:
    """One row of a block: signs of both planes and a coefficient for every feature."""

    sign: np.ndarray
    sign2: np.ndarray
    coefficients: np.ndarray


def features_of(K, sign, sign2, masks, orders):
    """Rows of F: the shift of every group, then its scale, then the second scale of the order-2 groups (§3.3-9)."""
    kept = [mask & K for mask in masks]
    F = [k.astype(float) for k in kept] + [k * sign for k in kept]
    F += [k * sign2 for k, order in zip(kept, orders, strict=True) if order == 2]
    return np.array(F)


def solved(F, S, w, start, solver):
    """Coefficients at the minimum of L for fixed features: jointly with a ridge, or one after the other (§3.3-9)."""
    A, y = F @ S @ F.T, F @ S @ w
    if solver == "joint":
        ridge = RIDGE * np.trace(A) / len(A) or 1.0
        return np.linalg.solve(A + ridge * np.eye(len(A)), y)
    c = start.copy()
    for _ in range(ITERATIONS):
        for p in range(len(c)):
            rest = y[p] - sum(A[p, q] * c[q] for q in range(len(c)) if q != p)
            c[p] = rest / A[p, p] if A[p, p] > 0 else 0.0
    return c


def error(F, S, w, c):
    """L of one row, with the whole w (spec §3.3, objective)."""
    r = w - c @ F
    return float(r @ S @ r)


def refreshed(w, row, masks, orders):
    """Nearest level of every weight, pruned ones included (spec §3.3-10)."""
    groups, second = len(masks), 0
    sign, sign2 = row.sign.copy(), row.sign2.copy()
    for p, (mask, order) in enumerate(zip(masks, orders, strict=True)):
        shift, a = row.coefficients[p], row.coefficients[groups + p]
        b = row.coefficients[2 * groups + second] if order == 2 else 0.0
        second += order == 2
        for j in np.flatnonzero(mask):
            if order == 1:
                sign[j] = (1.0 if w[j] - shift >= 0 else -1.0) * (1.0 if a >= 0 else -1.0)
                continue
            large, small = (a, b) if abs(a) >= abs(b) else (b, a)
            first, other = arb.nearest_of_four(np.array(w[j] - shift), abs(large), abs(small))
            first, other = float(first) * (1 if large >= 0 else -1), float(other) * (1 if small >= 0 else -1)
            sign[j], sign2[j] = (first, other) if abs(a) >= abs(b) else (other, first)
    return sign, sign2


def spbo(W, S, masks, orders, keeps, iterations=ITERATIONS, solver="joint", refresh=True, trace=None):
    """Steps 8 to 11 of spec §3.3 for one block; the refresh is accepted row by row. Returns (Q, rows).

    ``keeps`` are the masks of the steps, K_0 = 1 included. ``trace`` receives for every step the sum of L under the
    new mask, after the solve and after the refresh.
    """
    fits = [
        (arb.arb_order1 if order == 1 else arb.arb_order2)(W, M, iterations)[1]
        for M, order in zip(masks, orders, strict=True)
    ]
    Q, rows = np.zeros(W.shape), []
    errors = np.zeros((len(keeps), 3))
    for i, w in enumerate(W):
        own = [M[i] for M in masks]
        sign, sign2 = np.ones(len(w)), np.ones(len(w))
        for mask, fit, order in zip(own, fits, orders, strict=True):
            sign[mask] = fit.signs[0][i][mask]
            if order == 2:
                sign2[mask] = fit.signs[1][i][mask]
        start = [fit.shift[i] for fit in fits] + [fit.row[0][i] for fit in fits]
        start += [fit.row[1][i] for fit, order in zip(fits, orders, strict=True) if order == 2]
        row = Row(sign, sign2, np.array(start))
        for t, K in enumerate(keeps):
            F = features_of(K[i], row.sign, row.sign2, own, orders)
            before = error(F, S, w, row.coefficients)
            row = Row(row.sign, row.sign2, solved(F, S, w, row.coefficients, solver))
            least = middle = error(F, S, w, row.coefficients)
            if refresh and t > 0:
                sign, sign2 = refreshed(w, row, own, orders)
                F = features_of(K[i], sign, sign2, own, orders)
                c = solved(F, S, w, row.coefficients, solver)
                if error(F, S, w, c) < middle:
                    row, least = Row(sign, sign2, c), error(F, S, w, c)
            errors[t] += before, middle, least
        Q[i] = row.coefficients @ features_of(keeps[-1][i], row.sign, row.sign2, own, orders)
        rows.append(row)
    if trace is not None:
        trace += errors.tolist()
    return Q, rows


def quantize_layer(
    W, H, n=4, m=8, block_size=128, groups="cgb", fit="spbo", solver="joint", refresh=True, stepwise=True,
    score="hessian", compensation="exact", iterations=ITERATIONS, quantiles=81, max_salient=50, damping=0.01,
):  # fmt: skip
    """The block loop of spec §3.2 and §3.3. Returns (Q, keep mask, salient columns)."""
    W = np.array(W, dtype=np.float64)
    U = arb.damped_inverse_factor(H, damping)
    d = np.diag(U)
    Q, K, salient_columns = np.zeros(W.shape), np.ones(W.shape, dtype=bool), []
    for s in range(0, W.shape[1], block_size):
        e = min(s + block_size, W.shape[1])
        Wb, Sb = W[:, s:e].copy(), H[s:e, s:e]
        masks, orders, salient = partition(Wb**2 / d[s:e] ** 2, Sb, groups, fit, quantiles, max_salient)
        E = score_of(Wb, d[s:e], Sb, score)
        counts = list(range(m, n - 1, -1)) if stepwise else [m, n]
        keeps = [keep_mask(E, count, m) for count in counts]
        if fit == "spbo":
            part, _ = spbo(Wb, Sb, masks, orders, keeps, iterations, solver, refresh)
        else:
            part = prune_first(Wb, masks, orders, keeps[-1], fit, iterations)
        Q[:, s:e], K[:, s:e] = part, keeps[-1]
        salient_columns += [s + j for j in salient]
        if compensation == "exact":
            W[:, e:] -= np.linalg.solve(U[s:e, s:e].T, (Wb - part).T).T @ U[s:e, e:]
    return Q, K, salient_columns


def partition(T, S, groups, fit, quantiles, max_salient):
    """Masks and orders of the groups of a block (spec §3.3-7); the split is judged by S for SPBO, as for ARB-X."""
    if groups == "none":
        return [np.ones(T.shape, dtype=bool)], [1], []
    salient = arb.salient_columns(T, max_salient)
    if groups == "cgb":
        inside = arb.split_salient(T, salient, quantiles)
    else:
        inside = [np.zeros(T.shape, dtype=bool)]
        inside[0][:, salient] = True
    outside = arb.split(T, salient, quantiles, S if fit == "spbo" else None)
    return inside + outside, [2] * len(inside) + [1] * len(outside), salient.tolist()


def prune_first(W, masks, orders, K, fit, iterations):
    """The baselines "prune, then plain binarize" and "prune, then ARB" (spec §9)."""
    Q = np.zeros(W.shape)
    for M, order in zip(masks, orders, strict=True):
        if fit == "plain":
            Q += arb.residual_binarize(W, M & K, order)[0]
        else:
            Q += (arb.arb_order1 if order == 1 else arb.arb_order2)(W, M & K, iterations)[0]
    return Q
