"""The float64 oracle of PBS²P against the figures of its specification ("spec §…") and its own identities."""

import functools
import itertools

import arb_oracle as arb
import numpy as np
import pbs2p_oracle as oracle
import pytest

BLOCK = 128


@functools.cache
def first_block():
    """First block of the synthetic layer: weight, Gram matrix, diagonal of the inverse factor of the whole layer."""
    W, _, S = arb.synthetic()
    return W[:, :BLOCK], S[:BLOCK, :BLOCK], np.diag(arb.damped_inverse_factor(S))[:BLOCK]


@functools.cache
def block_errors(counts, refresh, solver="joint"):
    """L after every step of the first block in one group, relative to ``Tr(W S Wᵀ)``."""
    W, S, d = first_block()
    keeps = [oracle.keep_mask(W**2 / d**2, n, 8) for n in counts]
    trace = []
    everything = [np.ones(W.shape, dtype=bool)]
    oracle.spbo(W, S, everything, [1], keeps, solver=solver, refresh=refresh, trace=trace)
    return [row[2] / arb.output_error(W, S) for row in trace]


STEPS = (8, 7, 6, 5, 4)


@pytest.mark.parametrize(
    ("refresh", "solver", "known"),
    [
        (False, "joint", [0.4771, 0.4631, 0.4465, 0.4280, 0.4081]),
        (False, "alternating", [0.4780, 0.4632, 0.4466, 0.4280, 0.4081]),
        (True, "joint", [0.4771, 0.4176, 0.3856, 0.3631, 0.3447]),
    ],
)
def test_errors_of_the_first_block(refresh, solver, known):
    """Spec §9, first table. Signs are accepted row by row here: up to 1 % better than block by block."""
    assert block_errors(STEPS, refresh, solver) == pytest.approx(known, rel=0.01 if refresh else 0.002)


def test_pruning_lowers_the_error_in_this_block():
    """Spec §1 and §9: the error falls at every step, also with the signs of the dense start."""
    for refresh in (False, True):
        errors = block_errors(STEPS, refresh)
        assert all(after < before for before, after in itertools.pairwise(errors))


def test_steps_matter_with_the_refresh_alone():
    """Spec §9: without it stepwise and one shot coincide."""
    assert block_errors((8, 4), False)[-1] == pytest.approx(block_errors(STEPS, False)[-1], rel=0.01)
    assert block_errors((8, 4), True)[-1] > 1.02 * block_errors(STEPS, True)[-1]


def small(rows=6, columns=64, seed=0):
    rng = np.random.default_rng(seed)
    W = rng.standard_t(3, (rows, columns))
    X = rng.normal(size=(200, columns)) @ (np.eye(columns) + 0.3 * rng.normal(size=(columns, columns)))
    return W, X.T @ X / 200


def groups_of(W, S):
    return oracle.partition(W**2, S, "cgb", "spbo", 9, 12)


@pytest.mark.parametrize("solver", ["joint", "alternating"])
def test_no_update_raises_the_error(solver):
    """Spec §3.3: L never rises inside a step; the ridge leaves a millionth."""
    W, S = small()
    masks, orders, _ = groups_of(W, S)
    keeps = [oracle.keep_mask(W**2, n, 8) for n in range(8, 0, -1)]
    trace = []
    oracle.spbo(W, S, masks, orders, keeps, iterations=3, solver=solver, trace=trace)
    for before, solved, refreshed in trace:
        assert solved <= before * (1 + 1e-6)
        assert refreshed <= solved


def test_joint_solve_is_the_minimum():
    """Spec §3.3-9: no change of a single coefficient lowers L, and many alternations come near it."""
    W, S = small()
    masks, orders, _ = groups_of(W, S)
    K = oracle.keep_mask(W**2, 4, 8)
    _, rows = oracle.spbo(W, S, masks, orders, [np.ones_like(K), K], iterations=3, refresh=False)
    for i, row in enumerate(rows):
        F = oracle.features_of(K[i], row.sign, row.sign2, [M[i] for M in masks], orders)
        least = oracle.error(F, S, W[i], row.coefficients)
        for p, step in itertools.product(range(len(F)), (-1e-2, 1e-2)):
            changed = row.coefficients.copy()
            changed[p] += step
            assert oracle.error(F, S, W[i], changed) >= least * (1 - 1e-6)


def test_refresh_takes_the_nearest_level():
    """Spec §3.3-10, against all levels, negative scales included."""
    rng = np.random.default_rng(1)
    w = rng.normal(size=40)
    masks = [np.arange(40) < 25, np.arange(40) >= 25]
    for a, b in [(0.7, 0.2), (-0.7, 0.2), (0.1, -0.6), (-0.3, -0.4), (0.5, 0.0)]:
        row = oracle.Row(np.ones(40), np.ones(40), np.array([0.1, -0.2, a, -0.5, b]))
        sign, sign2 = oracle.refreshed(w, row, masks, [2, 1])
        for j in range(25):
            best = min(abs(w[j] - 0.1 - s * a - t * b) for s, t in itertools.product((-1, 1), repeat=2))
            assert abs(w[j] - 0.1 - sign[j] * a - sign2[j] * b) == pytest.approx(best, abs=1e-12)
        for j in range(25, 40):
            assert abs(w[j] + 0.2 + 0.5 * sign[j]) == pytest.approx(min(abs(w[j] - 0.3), abs(w[j] + 0.7)), abs=1e-12)


def test_groups_without_members_get_zero():
    """Spec §5: their features are zero and the ridge makes the coefficients 0."""
    W, S = small(3, 16)
    empty = np.zeros(W.shape, dtype=bool)
    _, rows = oracle.spbo(W, S, [empty, ~empty], [2, 1], [~empty], iterations=2)
    for row in rows:
        assert row.coefficients[[0, 2, 4]] == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize(("n", "m", "columns"), [(4, 8, 24), (5, 8, 21), (3, 5, 13), (16, 16, 20), (1, 2, 7)])
def test_masks(n, m, columns):
    """Spec §3.2-6 and §5: exactly N of each group, ceil(N q / M) of the last, nested from step to step."""
    E = np.random.default_rng(0).random((4, columns))
    before = oracle.keep_mask(E, m, m)
    assert before.all()
    for count in range(m - 1, n - 1, -1):
        K = oracle.keep_mask(E, count, m)
        assert not (K & ~before).any()
        for start in range(0, columns, m):
            width = min(m, columns - start)
            assert (K[:, start : start + width].sum(axis=1) == -(-count * width // m)).all()
        before = K


def test_mean_cosine_leaves_zero_tokens_out():
    """Spec §5."""
    a = np.array([[1.0, 0.0], [0.0, 0.0], [1.0, 1.0]])
    b = np.array([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
    assert oracle.mean_cosine(a, b) == pytest.approx((1 + 0.5**0.5) / 2)


def test_counts_are_repaired_to_the_budget():
    """Spec §3.1-4: rounding alone misses the mean of a bowl with a flat bottom; the ends keep most."""
    cosines = [0.01] + [0.97] * 28 + [0.5]
    importances = oracle.importance(cosines, "one_minus_cos")
    counts = oracle.kept_per_block(importances, 4, 3, 6)
    assert sum(counts) == 4 * 30
    assert counts[0] == counts[-1] == 6
    assert sum(3 if value < 1 else 6 for value in importances) < 4 * 30
