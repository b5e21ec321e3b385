"""One choice for each item under a common budget: a multiple-choice knapsack, solved exactly by a library.

======  =========  ==========================================================
symbol  here       meaning
======  =========  ==========================================================
c_ij    costs      what choice j of item i takes of the budget, whole numbers
e_ij    errors     how bad choice j of item i is, >= 0
B       budget     most that all choices together may take
x_ij    (chosen)   1 for the choice of an item, else 0
======  =========  ==========================================================

``min Σ e_ij x_ij`` with ``Σ_j x_ij = 1`` for every i and ``Σ c_ij x_ij <= B``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

# The solver stops within this share of the least error. The relaxation leaves two items open at most, so that it gets
# there at once; the limit bounds a search that does not, and is counted, not timed, so that all machines agree.
_GAP, _NODES = 1e-6, 10_000


class BudgetError(ValueError):
    """A budget that no choice meets."""


def allocate(costs: Sequence[Sequence[int]], errors: Sequence[Sequence[float]], budget: int) -> list[int]:
    """Choose for every item what makes the sum of errors least within the budget.

    Args:
        costs: for each item those of its choices, at least one, whole and not negative.
        errors: the same of errors, finite and not negative.
        budget: most that the choices may cost together; what is larger than all of them forces nothing.

    Returns:
        For each item the number of its choice. Of choices that are as good the cheaper one is taken.

    Raises:
        BudgetError: not even the cheapest choices fit.
        ValueError: costs and errors do not belong together, or are no such numbers.
        ImportError: SciPy is not installed, and the budget binds.
    """
    _check(costs, errors)
    least = sum(min(own) for own in costs)
    if least > budget:
        raise BudgetError(f"a budget of {budget} cannot be met, the least is {least}")
    kept = [_undominated(own, wrong) for own, wrong in zip(costs, errors, strict=True)]  # cheapest first
    best = [own[-1] for own in kept]
    if _total(costs, best) <= budget:
        return best
    room = budget
    while room >= least:
        found = _solved(costs, errors, kept, room)
        over = math.inf if found is None else _total(costs, found) - budget
        if found is not None and over <= 0:
            return found
        if found is None:
            break
        room -= int(over)  # what the solver calls equal may be a few units beyond
    return [own[0] for own in kept]


def needed_library() -> Any:
    """Return ``scipy.optimize``.

    Raises:
        ImportError: it is not installed; says how to get it.
    """
    try:
        import scipy.optimize as found
    except ImportError as error:
        raise ImportError("a budget needs SciPy: pip install 'hf-lowbit[budget]', or pip install scipy") from error
    return found


def _check(costs: Sequence[Sequence[int]], errors: Sequence[Sequence[float]]) -> None:
    if len(costs) != len(errors) or any(len(a) != len(b) for a, b in zip(costs, errors, strict=False)):
        raise ValueError("costs and errors must have the same items and choices")
    for item, (own, wrong) in enumerate(zip(costs, errors, strict=True)):
        if not own:
            raise ValueError(f"item {item} has no choice")
        if not all(type(cost) is int and cost >= 0 for cost in own):
            raise ValueError(f"costs of item {item} must be whole numbers of at least 0, got {list(own)}")
        if not all(0 <= error < math.inf for error in wrong):
            raise ValueError(f"errors of item {item} must be finite and at least 0, got {list(wrong)}")


def _total(costs: Sequence[Sequence[int]], chosen: Sequence[int]) -> int:
    return sum(own[j] for own, j in zip(costs, chosen, strict=True))


def _undominated(costs: Sequence[int], errors: Sequence[float]) -> list[int]:
    """Return the choices that no other one beats in cost and error, by rising cost; errors fall then."""
    found: list[int] = []
    for j in sorted(range(len(costs)), key=lambda j: (costs[j], errors[j], j)):
        if not found or errors[j] < errors[found[-1]]:
            found.append(j)
    return found


def _solved(
    costs: Sequence[Sequence[int]], errors: Sequence[Sequence[float]], kept: Sequence[Sequence[int]], budget: int
) -> list[int] | None:
    """Return the best choices as the solver sees it, None if it found none."""
    optimize = needed_library()
    from scipy.sparse import csr_array, vstack

    base = [costs[i][own[0]] for i, own in enumerate(kept)]  # so that only what is above the cheapest counts
    above = np.array([costs[i][j] - base[i] for i, own in enumerate(kept) for j in own], dtype=np.float64)
    wrong = np.array([errors[i][j] for i, own in enumerate(kept) for j in own], dtype=np.float64)
    owner = np.array([i for i, own in enumerate(kept) for _ in own])
    unit, scale = float(max(above.max(), 1)), float(wrong.max()) or 1.0
    one_each = csr_array((np.ones(len(owner)), (owner, np.arange(len(owner)))), shape=(len(kept), len(owner)))
    high = np.append(np.ones(len(kept)), (budget - sum(base)) / unit)
    low = np.append(np.ones(len(kept)), -np.inf)
    result = optimize.milp(
        wrong / scale,
        integrality=np.ones(len(owner)),
        bounds=optimize.Bounds(0, 1),
        constraints=optimize.LinearConstraint(vstack([one_each, csr_array(above[None] / unit)]), low, high),
        options={"mip_rel_gap": _GAP, "node_limit": _NODES},
    )
    if result.x is None:
        return None
    ends = np.cumsum([len(own) for own in kept])
    return [own[int(part.argmax())] for own, part in zip(kept, np.split(result.x, ends[:-1]), strict=True)]
