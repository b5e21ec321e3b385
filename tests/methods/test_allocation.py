"""Allocation under a budget beside a search through all choices."""

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_lowbit.numerics.allocation import BudgetError, allocate

ITEM = st.lists(st.tuples(st.integers(0, 10**6), st.floats(0, 1e3, allow_subnormal=False)), min_size=1, max_size=4)


def total(rows, chosen):
    return sum(own[j] for own, j in zip(rows, chosen, strict=True))


def least_error(costs, errors, budget):
    """The slow way: every combination."""
    every = itertools.product(*(range(len(own)) for own in costs))
    return min((total(errors, chosen) for chosen in every if total(costs, chosen) <= budget), default=None)


@settings(max_examples=60, deadline=None)
@given(st.lists(ITEM, min_size=1, max_size=5), st.floats(0, 1.2))
def test_least_error_within_the_budget(items, share):
    costs, errors = [[c for c, _ in own] for own in items], [[e for _, e in own] for own in items]
    low, high = sum(map(min, costs)), sum(map(max, costs))
    budget = low + int(share * (high - low))
    chosen = allocate(costs, errors, budget)
    assert total(costs, chosen) <= budget
    assert total(errors, chosen) == pytest.approx(least_error(costs, errors, budget), rel=1e-5, abs=1e-5)


@settings(max_examples=20, deadline=None)
@given(st.lists(ITEM, min_size=1, max_size=5))
def test_a_larger_budget_is_never_worse_and_the_largest_forces_nothing(items):
    costs, errors = [[c for c, _ in own] for own in items], [[e for _, e in own] for own in items]
    low, high = sum(map(min, costs)), sum(map(max, costs))
    found = [total(errors, allocate(costs, errors, low + (high - low) * step // 4)) for step in range(5)]
    for before, after in itertools.pairwise(found):
        assert after <= before * (1 + 1e-5) + 1e-5
    assert found[-1] == sum(map(min, errors))


def test_the_exact_budget_and_one_less():
    costs, errors = [[10, 20], [30, 31, 90]], [[3.0, 1.0], [9.0, 8.0, 0.0]]
    assert allocate(costs, errors, 51) == [1, 1]
    assert allocate(costs, errors, 50) == [1, 0]
    assert allocate(costs, errors, 40) == [0, 0]
    with pytest.raises(BudgetError, match="a budget of 39 cannot be met, the least is 40"):
        allocate(costs, errors, 39)


def test_of_equal_choices_the_cheaper_one():
    assert allocate([[7, 5, 6]], [[1.0, 1.0, 1.0]], 100) == [1]


def test_bytes_of_a_large_model_are_counted_to_the_last_one():
    # costs of billions, where a solver's tolerance is thousands of units
    costs = [[10**9 + i, 2 * 10**9 + 3 * i, 4 * 10**9] for i in range(40)]
    errors = [[8.0 + i, 2.0 + i / 7, 0.0] for i in range(40)]
    for budget in (40 * 10**9 + 780, 55 * 10**9 + 1, 61 * 10**9 - 1, 99 * 10**9 + 12345):
        chosen = allocate(costs, errors, budget)
        assert total(costs, chosen) <= budget
    assert allocate(costs, errors, 40 * 10**9 + 780) == [0] * 40


@pytest.mark.parametrize(
    ("costs", "errors", "said"),
    [
        ([[1]], [[1.0], [2.0]], "the same items"),
        ([[1]], [[1.0, 2.0]], "the same items"),
        ([[]], [[]], "no choice"),
        ([[-1]], [[1.0]], "whole numbers"),
        ([[1.5]], [[1.0]], "whole numbers"),
        ([[1]], [[math.nan]], "finite"),
        ([[1]], [[-1.0]], "finite"),
    ],
)
def test_refusals(costs, errors, said):
    with pytest.raises(ValueError, match=said):
        allocate(costs, errors, 10)
