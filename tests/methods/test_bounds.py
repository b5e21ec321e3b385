"""Grids with two ends, the search for them, and what is learned of them."""

import math

import pytest
import torch

from hf_lowbit.kernels.rounding import on_range, range_codes
from hf_lowbit.numerics.bounds import is_one_sided, learned_grid, sample, search_bounds

DOUBLE = torch.float64


def defined(values, low, high, bits):
    """The grid, one value at a time."""
    step = (high - low) / (2**bits - 1) if high > low else 1.0
    return torch.tensor(
        [round((min(max(float(v), low), high) - low) / step) * step + low for v in values], dtype=DOUBLE
    )


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_grid_is_the_definition(bits):
    values = torch.randn(300, dtype=DOUBLE) * 2
    ends = torch.tensor([-1.7, 2.3], dtype=DOUBLE)
    found = on_range(values, ends, bits)
    torch.testing.assert_close(found, defined(values, -1.7, 2.3, bits))
    codes = range_codes(values, ends, bits)
    assert codes.min() == 0
    assert codes.max() == 2**bits - 1
    torch.testing.assert_close(on_range(found, ends, bits), found)  # idempotent
    torch.testing.assert_close(on_range(ends, ends, bits), ends)  # both ends are on it


def test_constant_tensors():
    values = torch.full((5,), -3.25)
    low, high = search_bounds(values, 2)
    assert (low, high) == (-3.25, -3.25)
    assert torch.equal(on_range(values, torch.tensor([low, high]), 2), values)


def slow_search(values, bits, candidates, one):
    low, high = float(values.min()), float(values.max())
    errors = {}
    for i in range(candidates):
        ends = (low, high - i * (high - low) / candidates) if one else (
            low + i * (high - low) / (2 * candidates), high - i * (high - low) / (2 * candidates)
        )  # fmt: skip
        errors[ends] = float((defined(values, *ends, bits) - values).norm())
    return min(errors, key=errors.get), errors


@pytest.mark.parametrize("one", [False, True])
@pytest.mark.parametrize("bits", [2, 4])
def test_search_is_the_definition(bits, one):
    values = torch.randn(150, dtype=DOUBLE).float().double()
    values = values.abs() if one else values
    want, errors = slow_search(values, bits, 25, one)
    found = search_bounds(values, bits, candidates=25)
    assert is_one_sided(float(values.min()), float(values.max())) == one
    assert errors[min(errors, key=lambda ends: abs(ends[1] - found[1]))] <= errors[want] * (1 + 1e-6)
    assert found == pytest.approx(want, abs=1e-6)


@pytest.mark.parametrize("shape", ["normal", "positive", "outliers"])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_search_is_never_worse_than_the_whole_range(bits, shape):
    values = torch.randn(5000)
    values = {"normal": values, "positive": values.abs(), "outliers": values**5}[shape]

    def error(ends):
        return float((on_range(values, torch.tensor(ends), bits) - values).norm())

    assert error(search_bounds(values, bits)) <= error(search_bounds(values, bits, "minmax")) * (1 + 1e-6)


def test_output_takes_the_range_whose_error_is_least():
    values, tried = torch.randn(4000) ** 3, []

    def error(ends):
        tried.append(tuple(ends.tolist()))
        return abs(float(ends[0]) + 1) + abs(float(ends[1]) - 2)  # off the middle: only percentiles come near

    found = search_bounds(values, 3, "output", candidates=20, error=error)
    assert len(tried) == 20 + 8
    assert found == pytest.approx(min(tried, key=lambda ends: abs(ends[0] + 1) + abs(ends[1] - 2)))
    assert tried[0] == pytest.approx((float(values.min()), float(values.max())))
    own = search_bounds(values, 3, "output", candidates=20)  # without products: the error of the values themselves

    def distance(ends):
        return float((on_range(values, torch.tensor(ends), 3) - values).norm())

    assert distance(own) == pytest.approx(min(map(distance, tried)), rel=1e-5)


def test_percentiles_leave_out_the_ends():
    values = torch.linspace(-1, 1, 2001)
    assert search_bounds(values, 4, "percentile", percentile=0.99) == pytest.approx((-0.98, 0.98), abs=1e-3)
    positive = torch.linspace(0, 1, 1001)
    assert search_bounds(positive, 4, "percentile", percentile=0.99) == pytest.approx((0.0, 0.99), abs=1e-3)
    assert search_bounds(positive, 4, "percentile", percentile=0.99, sides="two")[0] == pytest.approx(0.01, abs=1e-3)


def test_limits_are_those_of_the_whole_tensor():
    values = torch.linspace(0, 1, 100)
    assert search_bounds(values, 4, "minmax", limits=(-2.0, 7.0)) == (-2.0, 7.0)


def test_samples_are_spread_evenly():
    values = torch.arange(1000).float()
    found = sample(values, 11)
    assert len(found) == 11
    assert found[0] == 0
    assert found[-1] == 999
    assert torch.equal(sample(values, 2000), values)


def test_what_cannot_be_searched_is_refused():
    for wrong in ({"candidates": 0}, {"percentile": 1.5}, {"percentile": math.nan}):
        with pytest.raises(ValueError, match=r"candidates must be at least 1 and percentile from 0.5 to 1"):
            search_bounds(torch.ones(3), 2, **wrong)
    with pytest.raises(ValueError, match="all of them finite"):
        search_bounds(torch.tensor([1.0, float("nan")]), 4)
    with pytest.raises(ValueError, match="need values"):
        search_bounds(torch.empty(0), 4)
    with pytest.raises(ValueError, match="search must be one of"):
        search_bounds(torch.ones(3), 4, "other")


def test_gradients_of_learned_ends():
    """With rounding as the identity: what lies outside moves its end, what lies inside both through the step."""
    values = torch.tensor([-3.0, -0.9, 0.1, 0.62, 4.0], dtype=DOUBLE, requires_grad=True)
    low, high = (torch.tensor(end, dtype=DOUBLE, requires_grad=True) for end in (-1.0, 1.0))
    out = learned_grid(values, (low, high), 2)
    torch.testing.assert_close(out.detach(), on_range(values.detach(), torch.tensor([-1.0, 1.0], dtype=DOUBLE), 2))
    weights = torch.tensor([1.0, 10.0, 100.0, 1000.0, 10000.0], dtype=DOUBLE)
    (out * weights).sum().backward()
    assert torch.equal(values.grad, weights * torch.tensor([0, 1, 1, 1, 0], dtype=DOUBLE))
    # the same with the rounding residual r = q - v held fixed: x̂ = l + s (v + r), v = (x - l) / s
    codes = range_codes(values.detach(), (low.detach(), high.detach()), 2)
    place = (values.detach() + 1) / (2 / 3)
    a, b = (torch.tensor(end, dtype=DOUBLE, requires_grad=True) for end in (-1.0, 1.0))
    step = (b - a) / 3
    inside = (values.detach() - a) / step
    smooth = a + step * (inside + (codes - place))
    fixed = torch.where(values.detach() < -1, a, torch.where(values.detach() > 1, b, smooth))
    (fixed * weights).sum().backward()
    torch.testing.assert_close(low.grad, a.grad)
    torch.testing.assert_close(high.grad, b.grad)
