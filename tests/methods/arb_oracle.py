"""Slow float64 definition of ARB-LLM (arXiv 2410.03129) against which the package's implementation is tested.

Everything here is NumPy in double precision and follows the method's specification (cited as "spec §…") line by line.
Nothing is imported from the package, so that an error there cannot hide itself here. Rows are vectorised because every
quantizer works per row; nothing else is optimised.

Conventions: ``W`` is (rows, columns) = (out_features, in_features); a mask ``M`` is boolean of the same shape as the
block it belongs to; ``S`` is the Gram matrix of the block's inputs (any positive multiple); ``sgn(0) = +1`` always.
A ``trace`` argument is an empty list that a fit fills with ``(iteration, step, objective)`` after the initialisation
(iteration 0, step "init") and after every single update; the last refit counts as the steps "refit…" of the last
iteration. ``iteration_objectives`` picks one value per iteration.
"""

from dataclasses import dataclass, replace

import numpy as np

X_GUARD = 1e-10  # spec §3.4d, denominators of ARB-X
RC_GUARD = 1e-8  # spec §3.4e/f, denominators of ARB-RC
# A candidate of a search wins only by more than this share of the error of an empty fit. Groups of one or two members
# per row are fitted exactly, so that with two salient columns every threshold ties and rounding would choose.
# Far below any real difference, far above the squares of float32 rounding.
TIE = 1e-12


def sgn(x):
    """Sign with sgn(0) = +1 (spec §2; pitfall 1)."""
    return np.where(x >= 0, 1.0, -1.0)


def counts(M):
    """Members per row, at least 1: ``c_i = max(1, sum_j M_ij)`` (spec §2)."""
    return np.maximum(1, M.sum(axis=1)).astype(np.float64)


def mean_in(A, M):
    """Mean over the members of each row, 0 for a row without members (spec §2, §5)."""
    return (A * M).sum(axis=1) / counts(M)


def iteration_objectives(trace):
    """Objective at the initialisation and at the end of every iteration, the last refit left out (spec §9)."""
    last = {iteration: value for iteration, step, value in trace if not step.startswith("refit")}
    return [last[iteration] for iteration in sorted(last)]


def squared_error(W, Q, M):
    """Squared error inside the mask, the objective of ARB and ARB-RC (paper Eq. 2)."""
    return float((((W - Q) * M) ** 2).sum())


def output_error(R, S):
    """``Tr(R S R^T)``, the output error of a residual R (paper Eq. 9; spec §3.3-10, §9)."""
    return float(((R @ S) * R).sum())


@dataclass(frozen=True)
class Fit:
    """Parameters of one group: ``sum_o row_o * col_o * sign_o + shift`` inside the mask (spec §3.4, §6).

    ``signs`` and ``row`` hold one entry per order; ``col`` is None except for ARB-RC, ``shift`` is None for ARB-RC.
    """

    signs: tuple
    row: tuple
    col: tuple | None = None
    shift: np.ndarray | None = None

    def dense(self, M):
        """The approximation Q of this group, zero outside the mask (spec §3.3-12)."""
        Q = np.zeros(M.shape)
        for o in range(len(self.signs)):
            plane = self.row[o][:, None] * self.signs[o]
            if self.col is not None:
                plane = plane * self.col[o][None, :]
            Q += plane
        if self.shift is not None:
            Q += self.shift[:, None]
        return Q * M

    def rounded(self, dtype):
        """The same fit with scales and shift rounded to their storage type; signs stay (spec §3.5-14)."""

        def to(x):
            return np.asarray(x).astype(dtype).astype(np.float64)

        return replace(
            self,
            row=tuple(to(r) for r in self.row),
            col=None if self.col is None else tuple(to(c) for c in self.col),
            shift=None if self.shift is None else to(self.shift),
        )


# ---------------------------------------------------------------------------------------------------------------------
# Preparation
# ---------------------------------------------------------------------------------------------------------------------


def damped_inverse_factor(H, damping=0.01):
    """Upper U with ``U^T U = (H + lambda I)^-1``, ``lambda = damping * mean(diag H)`` (spec §3.2-5/6).

    Dead columns (H_jj = 0) get H_jj = 1 before the mean is taken; W is not touched. Where the Cholesky factor does not
    exist the damping grows tenfold up to 1, then only the diagonal is used (spec §5).
    """
    H = np.array(H, dtype=np.float64)
    dead = np.diag(H) == 0
    H[dead, dead] = 1.0
    mean_diagonal = np.mean(np.diag(H))
    while True:
        damped = H + damping * mean_diagonal * np.eye(len(H))
        try:
            np.linalg.cholesky(damped)  # refuses an indefinite matrix, which inv() would accept
            inverse = np.linalg.inv(damped)
            return np.linalg.cholesky((inverse + inverse.T) / 2).T
        except np.linalg.LinAlgError:
            if damping >= 1.0:
                return np.diag(1.0 / np.sqrt(np.diag(H)))
            damping = min(1.0, 10 * damping or 0.01)


# ---------------------------------------------------------------------------------------------------------------------
# Quantizers of one group
# ---------------------------------------------------------------------------------------------------------------------


def residual_binarize(R, M, order):
    """One-shot residual binarization, BiLLM's "braq" (spec §3.4a; BiLLM Eq. 5-7). Returns (Q, Fit).

    The shifts of the orders add up, so one stored shift per row is enough.
    """
    R = np.where(M, R, 0.0).astype(np.float64)
    signs, scales, shift = [], [], np.zeros(len(R))
    for _ in range(order):
        mu = mean_in(R, M)
        alpha = mean_in(np.abs(R - mu[:, None]), M)
        B = sgn(R - mu[:, None])
        R = R - M * (alpha[:, None] * B + mu[:, None])
        shift = shift + mu
        signs.append(B)
        scales.append(alpha)
    fit = Fit(tuple(signs), tuple(scales), shift=shift)
    return fit.dense(M), fit


def arb_order1(W, M, iterations=15, trace=None, refit=True):
    """First-order alternating refined binarization (spec §3.4b; paper Eq. 4-6, Algorithm 1). Returns (Q, Fit).

    After the loop the scale is refitted once to the last signs; Theorem 1 holds exactly then.
    """
    W = np.asarray(W, dtype=np.float64)
    c = counts(M)
    _, first = residual_binarize(W, M, 1)
    mu, alpha, B = first.shift, first.row[0], first.signs[0]

    def record(iteration, step):
        if trace is not None:
            trace.append((iteration, step, squared_error(W, alpha[:, None] * B + mu[:, None], M)))

    record(0, "init")
    for iteration in range(1, iterations + 1):
        mu = mu + mean_in(W - alpha[:, None] * B - mu[:, None], M)
        record(iteration, "shift")
        alpha = (M * B * (W - mu[:, None])).sum(axis=1) / c
        record(iteration, "scale")
        B = sgn(W - mu[:, None])
        record(iteration, "signs")
    if refit:
        alpha = (M * B * (W - mu[:, None])).sum(axis=1) / c
        record(iterations, "refit scale")
    fit = Fit((B,), (alpha,), shift=mu)
    return fit.dense(M), fit


def nearest_of_four(D, a, b):
    """Signs (B1, B2) of the level ``a B1 + b B2`` nearest to D, for a >= b >= 0 element by element (spec §3.4c)."""
    B1 = sgn(D)
    B2 = B1 * sgn(np.abs(D) - a)
    return B1, B2


def arb_order2(W, M, iterations=15, trace=None, refit=True):
    """Second-order ARB ``alpha1 B1 + alpha2 B2 + mu`` (spec §3.4c; paper's second-order extension). Returns (Q, Fit).

    Each iteration: mu, alpha1, alpha2 (with the new alpha1), then the nearest of the four levels. After the loop
    mu, alpha1 and alpha2 are refitted once to the last signs, in this order: the spec states the refit for order 1
    only, but its figures (§9: .2190 on the first block, 0.2184 / 0.2105 on the layer) are those of this refit and not
    of one that leaves mu alone (.2192, 0.2186 / 0.2111). Without iterations there is no refit.
    """
    W = np.asarray(W, dtype=np.float64)
    c = counts(M)
    _, first = residual_binarize(W, M, 2)
    mu, (a1, a2), (B1, B2) = first.shift, first.row, first.signs

    def record(iteration, step):
        if trace is not None:
            Q = a1[:, None] * B1 + a2[:, None] * B2 + mu[:, None]
            trace.append((iteration, step, squared_error(W, Q, M)))

    def update_scales(iteration, prefix=""):
        nonlocal mu, a1, a2
        mu = mean_in(W - a1[:, None] * B1 - a2[:, None] * B2, M)
        record(iteration, prefix + "shift")
        a1 = (M * B1 * (W - mu[:, None] - a2[:, None] * B2)).sum(axis=1) / c
        record(iteration, prefix + "scale1")
        a2 = (M * B2 * (W - mu[:, None] - a1[:, None] * B1)).sum(axis=1) / c
        record(iteration, prefix + "scale2")

    record(0, "init")
    for iteration in range(1, iterations + 1):
        update_scales(iteration)
        # |a1|, |a2| in descending order is "flip the plane of a negative scale, swap planes where |a2| > |a1|".
        a1, a2 = np.maximum(np.abs(a1), np.abs(a2)), np.minimum(np.abs(a1), np.abs(a2))
        B1, B2 = nearest_of_four(W - mu[:, None], a1[:, None], a2[:, None])
        record(iteration, "signs")
    if refit and iterations > 0:
        update_scales(iterations, "refit ")
    fit = Fit((B1, B2), (a1, a2), shift=mu)
    return fit.dense(M), fit


def arb_x(W, M, S, order=1, iterations=15, x_iterations=15, trace=None):
    """ARB-X: signs from ARB, then shift and scales against the output error (spec §3.4d; paper Eq. 9-11).

    ``[A S C^T]_ii`` is the S-weighted inner product of row i of A and of C. Signs are frozen; order 2 updates mu,
    alpha1, alpha2 one after the other. The group is treated alone. The last refit of ARB is left out: the first sweep
    here re-estimates all of it (with the refit, the start of order 2 in §9 would be .2145 and not .2162).
    Returns (Q, Fit).
    """
    W = np.asarray(W, dtype=np.float64)
    _, start = (arb_order1 if order == 1 else arb_order2)(W, M, iterations, refit=False)
    mu, scales = start.shift, list(start.row)
    target = W * M
    planes = [M * B for B in start.signs]
    ones = M.astype(np.float64)

    def inner(A, C):
        return ((A @ S) * C).sum(axis=1)

    def remainder(without):
        """What the basis vector number ``without`` (None: the shift) has to explain."""
        left = target if without is None else target - mu[:, None] * ones
        for o, (alpha, P) in enumerate(zip(scales, planes, strict=True)):
            if o != without:
                left = left - alpha[:, None] * P
        return left

    def record(iteration, step):
        if trace is not None:
            trace.append((iteration, step, output_error(remainder(None) - mu[:, None] * ones, S)))

    record(0, "init")
    for iteration in range(1, x_iterations + 1):
        mu = inner(remainder(None), ones) / (inner(ones, ones) + X_GUARD)
        record(iteration, "shift")
        for o, P in enumerate(planes):
            scales[o] = inner(remainder(o), P) / (inner(P, P) + X_GUARD)
            record(iteration, f"scale{o + 1}")
    fit = Fit(start.signs, tuple(scales), shift=mu)
    return fit.dense(M), fit


def rc_scales(R, M):
    """First row and column scales of a plane (spec §3.4e): mean |R| per row, then mean |R / row scale| per column.

    Rows whose row scale is 0 say nothing about the columns and are left out of the column means; a column without
    members gets 0.
    """
    row = mean_in(np.abs(R), M)
    total, members = np.zeros(R.shape[1]), np.zeros(R.shape[1])
    for i in range(len(R)):
        if row[i] > 0:
            total += M[i] * np.abs(R[i]) / row[i]
            members += M[i]
    return row, total / np.maximum(1, members)


def rc_row(col, B, R, M):
    """Row scales that minimise ``||M (R - row col B)||^2`` (spec §3.4e; paper Eq. 12)."""
    return (col[None, :] * B * R * M).sum(axis=1) / ((col[None, :] ** 2 * M).sum(axis=1) + RC_GUARD)


def rc_col(row, B, R, M):
    """Column scales that minimise ``||M (R - row col B)||^2`` (spec §3.4e; paper Eq. 13)."""
    return (row[:, None] * B * R * M).sum(axis=0) / ((row[:, None] ** 2 * M).sum(axis=0) + RC_GUARD)


def rc_normalized(row, col, M):
    """Divide the column scales by their mean over the columns of the group, multiply the row scales (spec §3.4f).

    The mean is taken of |col| so that a negative column scale cannot make it vanish; an all-zero plane stays.
    """
    served = M.any(axis=0)
    mean = np.abs(col[served]).mean() if served.any() else 0.0
    return (row * mean, col / mean) if mean > 0 else (row, col)


def arb_rc_order1(W, M, iterations=15, trace=None):
    """First-order ARB-RC, row and column scales, signs fixed (spec §3.4e; paper Eq. 12-13). Returns (Q, Fit)."""
    W = np.asarray(W, dtype=np.float64)
    B = sgn(W)
    row, col = rc_scales(W, M)

    def record(iteration, step):
        if trace is not None:
            trace.append((iteration, step, squared_error(W, row[:, None] * col[None, :] * B, M)))

    record(0, "init")
    for iteration in range(1, iterations + 1):
        row = rc_row(col, B, W, M)
        record(iteration, "row")
        col = rc_col(row, B, W, M)
        record(iteration, "column")
    row, col = rc_normalized(row, col, M)
    fit = Fit((B,), (row,), (col,))
    return fit.dense(M), fit


def arb_rc_order2(W, M, iterations=15, trace=None, refit=True):
    """Second-order ARB-RC (spec §3.4f). Each iteration: r1, c1, r2, c2, then the nearest level. Returns (Q, Fit).

    After the loop r1, c1, r2, c2 are refitted once to the last signs; §3.4f does not say so, but the figures of §9
    (.1673 on the first block, 0.1669 / 0.1372 on the layer) are those after it (without: .1678, 0.1675 / 0.1388).
    Without iterations there is no refit (§9, full pipeline at T = 0: .0619; with it .0597).
    """
    W = np.asarray(W, dtype=np.float64)
    B1 = sgn(W)
    r1, c1 = rc_scales(W, M)
    left = W - np.outer(r1, c1) * B1
    B2 = sgn(left)
    r2, c2 = rc_scales(left, M)

    def record(iteration, step):
        if trace is not None:
            trace.append((iteration, step, squared_error(W, np.outer(r1, c1) * B1 + np.outer(r2, c2) * B2, M)))

    def update_scales(iteration, prefix=""):
        nonlocal r1, c1, r2, c2
        left = W - np.outer(r2, c2) * B2
        r1 = rc_row(c1, B1, left, M)
        record(iteration, prefix + "row1")
        c1 = rc_col(r1, B1, left, M)
        record(iteration, prefix + "column1")
        left = W - np.outer(r1, c1) * B1
        r2 = rc_row(c2, B2, left, M)
        record(iteration, prefix + "row2")
        c2 = rc_col(r2, B2, left, M)
        record(iteration, prefix + "column2")

    record(0, "init")
    for iteration in range(1, iterations + 1):
        update_scales(iteration)
        first, second = np.outer(r1, c1), np.outer(r2, c2)
        swap = np.abs(second) > np.abs(first)  # element by element: which plane carries the larger level
        large = np.where(swap, np.abs(second), np.abs(first))
        small = np.where(swap, np.abs(first), np.abs(second))
        B_large, B_small = nearest_of_four(W, large, small)
        B1 = np.where(swap, B_small, B_large) * sgn(first)
        B2 = np.where(swap, B_large, B_small) * sgn(second)
        record(iteration, "signs")
    if refit and iterations > 0:
        update_scales(iterations, "refit ")
    r1, c1 = rc_normalized(r1, c1, M)
    r2, c2 = rc_normalized(r2, c2, M)
    fit = Fit((B1, B2), (r1, r2), (c1, c2))
    return fit.dense(M), fit


# ---------------------------------------------------------------------------------------------------------------------
# Partition of a block
# ---------------------------------------------------------------------------------------------------------------------


def salient_columns(T, max_salient=50, step=1):
    """Indices of the salient columns of a block, ascending (spec §3.3-9; BiLLM Eq. 4, Algorithm 2).

    Columns are ranked by their sum of |T| (ties: lower index first); the t best are salient for the t with the least
    squared error of T when both sides are residually binarized with order 2 (ties: smaller t).
    """
    width = T.shape[1]
    ranked = np.argsort(-np.abs(T).sum(axis=0), kind="stable")
    best, chosen, tie = np.inf, np.zeros(0, dtype=int), TIE * (T**2).mean()
    for t in range(1, min(max_salient, width - 1), step):
        M = np.zeros(T.shape, dtype=bool)
        M[:, ranked[:t]] = True
        inside, _ = residual_binarize(T, M, 2)
        outside, _ = residual_binarize(T, ~M, 2)
        error = ((T - inside - outside) ** 2).mean()
        if error < best - tie:
            best, chosen = error, np.sort(ranked[:t])
    return chosen


def _search_split(T, member, levels, order, score):
    """Best ``{|T| >= p}`` inside ``member``: (sparse mask, concentrated mask); the lowest p of equals (TIE)."""
    best, chosen, tie = np.inf, None, TIE * score(np.zeros(T.shape))
    for p in levels:
        sparse = member & (np.abs(T) >= p)
        concentrated = member & (np.abs(T) < p)
        Q = residual_binarize(T, sparse, order)[0] + residual_binarize(T, concentrated, order)[0]
        error = score(Q)
        if error < best - tie:
            best, chosen = error, (sparse, concentrated)
    if chosen is None:
        raise ValueError("no split has a finite error: the saliency holds NaN or infinity")
    return chosen


def split(T, salient, quantiles=81, S=None, num_p=1, quantile_entries="block"):
    """Masks of the non-salient part, sparsest first (spec §3.3-10; BiLLM Eq. 9).

    Thresholds are quantiles 0.10 … 0.90 of |T| over the whole block, with the entries already dealt with set to 0
    (``quantile_entries="block"``), or of the remaining entries alone ("members"). The spec's text and the official
    code say "block"; the table of §9 was made with "members" (it gives the printed sparse share 0.096 instead of
    0.100, and every printed error to within one unit in the last digit).
    Score: squared error of T, or ``Tr(R S R^T)`` where S is given (ARB-X). There R holds the residual of the whole
    block: that of the salient columns is the order-2 residual binarization of T, as in every search.
    """
    is_salient = np.zeros(T.shape, dtype=bool)
    is_salient[:, salient] = True
    done, _ = residual_binarize(T, is_salient, 2)
    remaining = ~is_salient
    masks = []
    for _ in range(num_p):
        values = np.abs(T[remaining]) if quantile_entries == "members" else np.abs(T * remaining)
        levels = np.quantile(values, np.linspace(0.10, 0.90, quantiles)) if values.size else [0.0]

        def score(Q, done=done):
            R = T - done - Q
            return (R**2).mean() if S is None else output_error(R, S)

        sparse, concentrated = _search_split(T, remaining, levels, 1, score)
        masks.append(sparse)
        done = done + residual_binarize(T, sparse, 1)[0]
        remaining = concentrated
    return [*masks, remaining]


def split_salient(T, salient, quantiles=81, num_p=1):
    """Masks of the salient part under CGB, sparsest first (spec §3.3-11; paper Eq. 14).

    The same search with order 2 for both halves, quantiles over the non-zero entries, squared error of T.
    """
    remaining = np.zeros(T.shape, dtype=bool)
    remaining[:, salient] = True
    masks = []
    for _ in range(num_p):
        values = np.abs(T[remaining])
        values = values[values != 0]
        levels = np.quantile(values, np.linspace(0.10, 0.90, quantiles)) if len(values) else [0.0]

        def score(Q, inside=remaining):
            return (((T - Q) * inside) ** 2).mean()

        sparse, concentrated = _search_split(T, remaining, levels, 2, score)
        masks.append(sparse)
        remaining = concentrated
    return [*masks, remaining]


# ---------------------------------------------------------------------------------------------------------------------
# A whole layer
# ---------------------------------------------------------------------------------------------------------------------


def fit_group(W, M, S, variant, order, iterations=15, x_iterations=15):
    """Fit one group with the quantizer of ``variant`` (spec §3.3-12, §3.4, §4). Returns (Q, Fit)."""
    if variant == "billm":
        return residual_binarize(W, M, order)
    if variant == "arb":
        return arb_order1(W, M, iterations) if order == 1 else arb_order2(W, M, iterations)
    if variant == "x":
        return arb_x(W, M, S, order, iterations, x_iterations)
    if variant == "rc":
        return arb_rc_order1(W, M, iterations) if order == 1 else arb_rc_order2(W, M, iterations)
    raise ValueError(f"unknown variant {variant!r}")


def quantize_layer(
    W,
    H,
    variant="rc",
    block_size=128,
    column_group_bitmap=True,
    compensation="exact",
    iterations=15,
    x_iterations=15,
    quantiles=81,
    max_salient=50,
    salient_step=1,
    damping=0.01,
    salient_metric="hessian",
    num_p=1,
    round_scales=None,
    quantile_entries="block",
):
    """The block loop of spec §3.3 with the finish of §3.5 (paper Algorithm 1; BiLLM Algorithm 1). Returns (Q, info).

    ``variant``: "rc", "x", "arb", or "billm" (residual binarization, never with a column-group bitmap). ``info`` has
    one dict per block: ``start``, ``end``, ``salient`` (column indices in the layer), ``masks``, ``orders`` and
    ``fits`` in the order salient-sparse, salient-concentrated (or all salient), sparse, concentrated.
    """
    W = np.array(W, dtype=np.float64)
    H = np.asarray(H, dtype=np.float64)
    U = damped_inverse_factor(H, damping)
    d = np.diag(U)
    column_group_bitmap = column_group_bitmap and variant != "billm"
    Q, info = np.zeros(W.shape), []
    for s in range(0, W.shape[1], block_size):
        e = min(s + block_size, W.shape[1])
        Wb, Sb = W[:, s:e].copy(), H[s:e, s:e]
        T = Wb**2 / d[s:e] ** 2 if salient_metric == "hessian" else Wb

        salient = salient_columns(T, max_salient, salient_step)
        if column_group_bitmap:
            salient_masks = split_salient(T, salient, quantiles, num_p)
        else:
            salient_masks = [np.zeros(T.shape, dtype=bool)]
            salient_masks[0][:, salient] = True
        other_masks = split(T, salient, quantiles, Sb if variant == "x" else None, num_p, quantile_entries)
        masks = salient_masks + other_masks
        orders = [2] * len(salient_masks) + [1] * len(other_masks)

        fits = []
        for M, order in zip(masks, orders, strict=True):
            part, fit = fit_group(Wb, M, Sb, variant, order, iterations, x_iterations)
            if round_scales is not None:
                fit = fit.rounded(round_scales)
                part = fit.dense(M)
            fits.append(fit)
            Q[:, s:e] += part

        E = Wb - Q[:, s:e]
        if compensation == "exact":
            W[:, e:] -= np.linalg.solve(U[s:e, s:e].T, E.T).T @ U[s:e, e:]
        elif compensation == "reference":
            W[:, e:] -= (E / d[s:e]) @ U[s:e, e:]
        elif compensation != "none":
            raise ValueError(f"unknown compensation {compensation!r}")
        info.append({"start": s, "end": e, "salient": s + salient, "masks": masks, "orders": orders, "fits": fits})
    return Q, info


def rtn(W, block=None):
    """Plain 1-bit rounding: ``sgn(w)`` times the mean |w| of the row, or of the row inside each block (spec §9)."""
    W = np.asarray(W, dtype=np.float64)
    width = W.shape[1] if block is None else block
    Q = np.zeros(W.shape)
    for s in range(0, W.shape[1], width):
        part = W[:, s : s + width]
        Q[:, s : s + width] = sgn(part) * np.abs(part).mean(axis=1, keepdims=True)
    return Q


# ---------------------------------------------------------------------------------------------------------------------
# Measures
# ---------------------------------------------------------------------------------------------------------------------


def relative_errors(W0, Q, S):
    """``(||W0-Q||^2 / ||W0||^2, Tr(R S R^T) / Tr(W0 S W0^T))`` with R = W0 - Q (spec §9)."""
    R = W0 - Q
    return float((R**2).sum() / (W0**2).sum()), output_error(R, S) / output_error(W0, S)


def synthetic():
    """The synthetic layer of spec §9: (W 768 x 768, X 4096 x 768, S = X^T X / 4096)."""
    rng = np.random.Generator(np.random.PCG64(0))
    W = 0.02 * rng.standard_t(4, (768, 768)) * np.exp(0.5 * rng.normal(size=768))[None]
    X = rng.normal(size=(4096, 768)) @ (np.eye(768) + 0.02 * rng.normal(size=(768, 768)))
    sc = np.exp(0.4 * rng.normal(size=768))
    sc[rng.choice(768, 8, replace=False)] *= 5
    X = X * sc + 0.3 * sc * rng.normal(size=768)
    return W, X, X.T @ X / 4096


def stored_bits(n, m, c, k, variant, cgb):
    """Bits of one n x m layer with c salient columns: raw bitmaps, 16-bit scales (spec §6)."""
    nb = -(-m // k)
    planes = n * (2 * m + c)
    if variant == "rc":
        return planes + 33 * m + (32 * c + 96 * n * nb if cgb else 64 * n * nb)
    if variant in ("x", "arb", "billm"):
        return planes + m + (160 if cgb and variant != "billm" else 112) * n * nb
    raise ValueError(f"unknown variant {variant!r}")
