"""δ-GBS on paper: which steps take many bits, against Eq. 11 written out as a sum, and the published strip."""

import math

import pytest
import torch

from hf_lowbit.methods.dvd_quant import schedule


def strip(changes, delta, warmup=2):
    """Bits of all steps of a trajectory, as the package decides. ``changes[t]`` is that of step t against t - 1."""
    drift, found = schedule.Drift(), []
    for step, change in enumerate(changes):
        high, drift = schedule.decide(drift, delta, warmup)
        found.append(high)
        if step:
            drift = schedule.observe(drift, change)
    return found


def slow_strip(changes, delta, warmup=2):
    """Eq. 11: few bits while the changes since the last step with many bits, that step's own included, are below δ."""
    found = []
    for step in range(len(changes)):
        highs = [t for t in range(step) if found[t]]
        last = highs[-1] if highs else 0
        since = [changes[t] for t in range(max(last, 1), step)]
        found.append(step < warmup or not math.fsum(since) < delta)
    return found


@pytest.mark.parametrize("delta", [0.0, 0.02, 0.09, 0.3, math.inf])
@pytest.mark.parametrize("warmup", [0, 1, 2, 5])
def test_rule_is_that_of_the_paper(delta, warmup):
    generator = torch.Generator().manual_seed(int(100 * min(delta, 1)) + warmup)
    for _ in range(20):
        changes = (0.1 * torch.rand(40, generator=generator)).tolist()
        assert strip(changes, delta, warmup) == slow_strip(changes, delta, warmup)


def test_ends_of_the_range():
    assert all(strip([0.01] * 10, 0.0))
    assert strip([0.01] * 10, math.inf) == [True] * 2 + [False] * 8
    assert strip([0.01] * 5, math.inf, warmup=0) == [False] * 5


def test_published_strip_of_50_steps():
    """The figure has high bits at 0-3, 5, 7, 9, 12, 15, ..., 36, 38, ..., 42, 44-49: 25 of 50, 6 bits in the mean.

    That is what comes of changes that are large at both ends, half of δ beside them and a third of it between.
    """
    changes = [1.0] * 3 + [0.6] * 6 + [0.4] * 27 + [0.6] * 7 + [1.0] * 7
    published = [*range(4), 5, 7, 9, *range(12, 37, 3), 38, 40, 42, *range(44, 50)]
    assert [step for step, high in enumerate(strip(changes, 1.0)) if high] == published
    assert len(published) == 25


def test_no_number_is_a_large_change():
    assert strip([0.0, 0.0, 0.0, math.nan, 0.0, 0.0], 0.1) == [True, True, False, False, True, False]


def test_relative_change():
    output, previous = torch.tensor([[3.0, -1.0]]), torch.tensor([[1.0, 1.0]])
    assert schedule.relative_change(output, previous) == 2.0
    assert schedule.relative_change(output, torch.zeros(1, 2)) == 0.0
    half = torch.full((70000,), 1.0, dtype=torch.float16)  # its sum is beyond what the dtype holds
    assert schedule.relative_change(2 * half, half) == 1.0
