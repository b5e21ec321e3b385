"""Bits of weights under a budget: the three terms, and the order in which parts are raised."""

import random

import pytest
import torch

from hf_lowbit.methods.quantcache.allocation import (
    Damage,
    allocate,
    perceptual_damage,
    sensitivities,
    temporal_damage,
)


def drawn(seed, parts=12):
    """Parts of many sizes whose damage falls with the bits."""
    numbers = random.Random(seed)
    parameters = {f"blocks.{i}.ffn": numbers.randint(1, 50) for i in range(parts)}
    sensitivity = {}
    for part in parameters:
        worst = numbers.random()
        sensitivity[part] = {4: worst, 8: worst * numbers.random() * 0.3}
    return parameters, sensitivity


def mean(parameters, bits):
    return sum(parameters[part] * bits[part] for part in bits) / sum(parameters.values())


@pytest.mark.parametrize("seed", range(5))
def test_budget_holds_and_more_budget_takes_no_bits_away(seed):
    parameters, sensitivity = drawn(seed)
    before = None
    for tenth in range(40, 170, 3):
        bits = allocate(parameters, sensitivity, (4, 8, 16), tenth / 10)
        assert bits == allocate(dict(reversed(parameters.items())), sensitivity, (16, 4, 8), tenth / 10)
        assert 4 <= mean(parameters, bits) <= tenth / 10
        assert set(bits.values()) <= {4, 8, 16}
        assert before is None or all(bits[part] >= before[part] for part in bits)
        before = bits
    assert set(before.values()) == {16}
    assert set(allocate(parameters, sensitivity, (4, 8, 16), 4.0).values()) == {4}


def test_parts_are_raised_by_what_a_bit_of_theirs_gains():
    parameters = {"a": 10, "b": 10, "c": 40}
    # gains per bit: a .3 / 40, b .1 / 40, c .5 / 160
    sensitivity = {"a": {4: 0.4, 8: 0.1}, "b": {4: 0.1, 8: 0.0}, "c": {4: 0.5, 8: 0.0}}
    found = {budget: allocate(parameters, sensitivity, (4, 8), budget) for budget in (4, 4.7, 6, 7.4, 8)}
    assert [tuple(bits.values()) for bits in found.values()] == [
        (4, 4, 4), (8, 4, 4), (8, 4, 4), (8, 4, 8), (8, 8, 8),
    ]  # fmt: skip


def test_budget_weighs_parts_by_their_parameters():
    """Printed, the budget counts every layer once; then the large part would be raised here."""
    sensitivity = {"small": {4: 0.2, 8: 0.0}, "large": {4: 0.3, 8: 0.0}}
    assert allocate({"small": 1, "large": 99}, sensitivity, (4, 8), 6.0) == {"small": 8, "large": 4}


def test_budget_below_the_fewest_bits_is_refused():
    with pytest.raises(ValueError, match="b_avg must be at least 4"):
        allocate({"a": 1}, {"a": {}}, (4, 8), 3.5)
    for budget in (float("nan"), "6"):
        with pytest.raises(ValueError, match=f"b_avg must be at least 4, .* got {budget!r}"):
            allocate({"a": 1}, {"a": {}}, (4, 8), budget)


def test_bits_that_are_named_twice_count_once():
    sensitivity = {"a": {4: 0.4, 8: 0.1}, "b": {4: 0.1, 8: 0.0}}
    parameters = {"a": 1, "b": 2}
    assert allocate(parameters, sensitivity, (4, 4, 8), 6.0) == allocate(parameters, sensitivity, (4, 8), 6.0)


def test_terms_count_in_shares_of_their_sum():
    damage = {
        "a": {4: Damage(1e-3, 0.02, 5.0), 8: Damage(1e-4, 0.0, 0.0)},
        "b": {4: Damage(3e-3, 0.06, 5.0), 8: Damage(0.0, 0.0, 1.0)},
    }
    found = sensitivities(damage)
    assert found["a"][4] == pytest.approx((0.25 + 0.25 + 0.5) / 3)
    assert found["b"][4] == pytest.approx((0.75 + 0.75 + 0.5) / 3)
    assert found["a"][8] == pytest.approx(0.025 / 3)
    assert found["b"][8] == pytest.approx(0.1 / 3)
    assert sensitivities(damage, (0, 0, 1))["a"] == {4: pytest.approx(0.5), 8: 0.0}
    still = {part: {4: Damage(1.0, 1.0, 0.0)} for part in "ab"}  # one frame: no differences
    assert sensitivities(still)["a"][4] == pytest.approx(1 / 3)
    for weights in ((1, 1), (1, 1, -1), (1, 1, float("nan")), (1, 1, float("inf")), 3):
        with pytest.raises(ValueError, match="must be 3 numbers of at least 0"):
            sensitivities(damage, weights)


def test_damages_against_their_definitions():
    torch.manual_seed(0)
    dense = torch.randn(2, 3, 4, 5, 5)
    quantized = dense + 0.1 * torch.randn(2, 3, 4, 5, 5)
    a, b = dense.double(), quantized.double()
    assert perceptual_damage(dense, quantized) == pytest.approx(1 - float((a * b).sum() / (a.norm() * b.norm())))
    wrong = sum(float(((a[:, :, f + 1] - a[:, :, f]) - (b[:, :, f + 1] - b[:, :, f])).abs().sum()) for f in range(3))
    size = sum(float((a[:, :, f + 1] - a[:, :, f]).abs().sum()) for f in range(3))
    assert temporal_damage(dense, quantized, 2) == pytest.approx(wrong / size)
    assert temporal_damage(dense[:, :, :1], quantized[:, :, :1], 2) == 0
    assert perceptual_damage(torch.zeros(3), torch.zeros(3)) == 0
    assert perceptual_damage(torch.zeros(3), torch.ones(3)) == 1
