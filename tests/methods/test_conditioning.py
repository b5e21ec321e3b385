"""Conditioning of weights against a slow definition: the proximal step by numeric minimization, descent, examples."""

import itertools
import math

import pytest
import torch

from hf_lowbit.numerics.conditioning import (
    REGULARIZERS,
    compact,
    condition,
    condition_number,
    output_change,
    proximal,
    spread_of,
)

DOUBLE = torch.float64


def spectrum(count, largest=5.0):
    return torch.sort(torch.rand(count, dtype=DOUBLE) * largest, descending=True).values


def minimized(sigma, strength, penalty):
    """argmin ½ ‖s - σ‖² + t · penalty(s), by LBFGS."""
    s = sigma.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [s], max_iter=500, tolerance_grad=1e-13, tolerance_change=1e-16, line_search_fn="strong_wolfe"
    )

    def closure():
        optimizer.zero_grad()
        loss = (s - sigma).square().sum() / 2 + strength * penalty(s)
        loss.backward()
        return loss

    optimizer.step(closure)
    return s.detach()


@pytest.mark.parametrize("strength", [0.003, 0.1, 1.0, 20.0])
@pytest.mark.parametrize("count", [2, 7, 48])
def test_proximal_step_is_the_numeric_minimizer(count, strength):
    sigma = spectrum(count)
    found = compact(sigma, strength)
    torch.testing.assert_close(found, minimized(sigma, strength, spread_of), atol=1e-6, rtol=0)
    torch.testing.assert_close(found.mean(), sigma.mean())  # the mean is preserved
    assert (found.diff() <= 0).all()  # and so is the order
    assert found[0] / found[-1] <= sigma[0] / sigma[-1]


def test_top_is_the_numeric_minimizer_where_the_order_holds():
    sigma, strength = torch.tensor([5.0, 2.0, 1.0, 0.5], dtype=DOUBLE), 0.3
    found = compact(sigma, strength, "top")
    want = minimized(sigma, strength, lambda s: s.max() ** 2 / 2 - s.square().sum() / (2 * len(s)))
    torch.testing.assert_close(found, want, atol=1e-6, rtol=0)
    tied = compact(torch.tensor([2.0, 1.9, 0.1], dtype=DOUBLE), 0.5, "top")
    assert tied[0] == tied[1]


@pytest.mark.parametrize("regularizer", REGULARIZERS)
def test_limits_of_the_strength(regularizer):
    sigma = spectrum(9)
    if regularizer == "clip":
        found = compact(sigma, 0.0, "clip", limit=4.0)
        assert found[0] == sigma[0]
        assert float(found[0] / found[-1]) <= 4.0 + 1e-12
        return
    torch.testing.assert_close(compact(sigma, 0.0, regularizer), sigma)
    if regularizer == "variance":
        torch.testing.assert_close(compact(sigma, 1e12), sigma.mean().expand(9), atol=1e-9, rtol=0)
    else:
        with pytest.raises(ValueError, match="below 9"):
            compact(sigma, 9.0, "top")


@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (16, 16)])
def test_proximal_step_of_a_matrix_is_the_global_minimizer(shape):
    """No other matrix near it, or among random ones with other singular vectors, has a lower objective."""
    weight, strength = torch.randn(shape, dtype=DOUBLE), 0.2

    def objective(w):
        return float((w - weight).square().sum() / 2 + strength * spread_of(torch.linalg.svdvals(w)))

    found = proximal(weight, strength)
    least = objective(found)
    assert least <= objective(weight)
    for size in (1e-3, 0.1, 1.0):
        for _ in range(20):
            assert least <= objective(found + size * torch.randn_like(found)) + 1e-12


@pytest.mark.parametrize("rank", [5, 24])
@pytest.mark.parametrize("strength", [0.01, 0.1, 1.0])
def test_objective_never_rises(rank, strength):
    inputs = torch.randn(200, rank, dtype=DOUBLE) @ torch.randn(rank, 24, dtype=DOUBLE)
    moment = inputs.T @ inputs / 200
    largest = float(torch.linalg.eigvalsh(moment)[-1])
    original = torch.randn(16, 24, dtype=DOUBLE)

    def objective(w):
        change = w - original
        return float(((change @ moment) * change).sum() / 2 + strength * largest * spread_of(torch.linalg.svdvals(w)))

    values = [objective(original)]
    values += [objective(condition(original, moment, strength, steps)) for steps in (1, 2, 3, 5, 8, 13, 30, 60)]
    assert all(after <= before * (1 + 1e-12) for before, after in itertools.pairwise(values))


def test_inputs_of_low_rank_leave_room():
    """Claim of the paper: where inputs barely reach, κ falls while outputs stay."""
    torch.manual_seed(1)
    weight = torch.randn(40, 32, dtype=DOUBLE) * torch.logspace(0, -3, 32, dtype=DOUBLE)
    inputs = torch.randn(500, 12, dtype=DOUBLE) @ torch.randn(12, 32, dtype=DOUBLE)
    moment = inputs.T @ inputs
    before = condition_number(weight)
    mild, strong = (condition(weight, moment, t, 60) for t in (0.003, 0.03))
    assert before > 1000
    assert condition_number(mild) < before / 5
    assert output_change(weight, mild, moment) < 0.02
    assert condition_number(strong) < before / 50
    assert output_change(weight, strong, moment) < 0.1


def test_change_of_outputs_is_that_of_the_products():
    weight, other = torch.randn(2, 6, 9, dtype=DOUBLE)
    inputs = torch.randn(50, 9, dtype=DOUBLE)
    want = (inputs @ (other - weight).T).norm() / (inputs @ weight.T).norm()
    assert output_change(weight, other, inputs.T @ inputs) == pytest.approx(float(want))


def test_nothing_to_do():
    moment = torch.eye(6)
    for weight in (torch.zeros(4, 6), torch.randn(1, 6)):
        assert torch.equal(condition(weight, moment, 0.1), weight)
    weight = torch.randn(4, 6)
    assert torch.equal(condition(weight, torch.zeros(6, 6), 0.1), weight)
    assert torch.equal(condition(weight, moment, 0.0), weight)
    assert condition_number(torch.zeros(3, 3)) == 1.0
    assert condition_number(torch.diag(torch.tensor([1.0, 0.0]))) == pytest.approx(1e12)


def test_a_singular_weight_is_lifted():
    weight = torch.diag(torch.tensor([4.0, 2.0, 0.0], dtype=DOUBLE))
    found = torch.linalg.svdvals(proximal(weight, 0.5))
    torch.testing.assert_close(found[-1], torch.tensor(0.5 * 2.0 / 1.5, dtype=DOUBLE))  # t σ̄ / (1 + t)


def test_half_precision_is_computed_in_float64_and_given_back():
    weight, moment = torch.randn(8, 12), torch.eye(12)
    half = condition(weight.bfloat16(), moment, 0.1)
    assert half.dtype == torch.bfloat16
    want = condition(weight.bfloat16().double(), moment.double(), 0.1)
    assert torch.equal(half, want.bfloat16())
    with pytest.raises(ValueError, match="float32 or float64"):
        condition(weight, moment, 0.1, dtype=torch.float16)


def test_what_cannot_be_is_refused():
    moment = torch.eye(3)
    moment[0, 0] = math.nan
    with pytest.raises(ValueError, match="NaN or infinity"):
        condition(torch.randn(2, 3), moment, 0.1)
    with pytest.raises(ValueError, match="must be one of variance, top, clip"):
        compact(torch.ones(2), 0.1, "other")
    with pytest.raises(ValueError, match="at least 0"):
        compact(torch.ones(2), -0.1)
    weight, moment = torch.randn(2, 3), torch.eye(3)
    for arguments, message in (
        ({"moment": torch.eye(2)}, r"a weight \(2, 3\) does not fit a second moment \(2, 2\)"),
        ({"weight": torch.full((2, 3), math.nan)}, "the weight holds NaN or infinity"),
        ({"weight": torch.ones(2, 3, dtype=torch.int64)}, "must be floating, got torch.int64"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"regularizer": "clip", "limit": 0.5}, "limit must be at least 1, got 0.5"),
        ({"regularizer": "top", "strength": 2.0}, r"strength of 'top' must be at least 0 \(top: below 2\), got 2.0"),
    ):
        with pytest.raises(ValueError, match=message):
            condition(**{"weight": weight, "moment": moment, "strength": 0.1, **arguments})
    for strength in (math.inf, math.nan):
        with pytest.raises(ValueError, match="at least 0"):
            compact(torch.ones(2), strength)
