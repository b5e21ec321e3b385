"""Sequences in which passages return."""

import pytest
import torch

from hf_lowbit.calibration.recall import with_returns


@pytest.mark.parametrize(("length", "share"), [(512, 0.25), (512, 0.9), (64, 0.5), (20, 0.25), (2, 0.5), (5, 0.0)])
def test_the_end_is_made_of_passages_from_before(length, share):
    sequence = torch.randperm(10 * length)[:length]  # every token once, so a passage tells where it comes from
    before = sequence.clone()
    found = with_returns(sequence, share)
    assert torch.equal(sequence, before) and found.shape == sequence.shape and found.dtype == sequence.dtype
    kept = length - int(share * length)
    assert torch.equal(found[:kept], sequence[:kept])
    place = {int(token): at for at, token in enumerate(sequence[:kept])}
    places = [place[int(token)] for token in found[kept:]]
    lengths, start = [], 0
    for at in range(1, len(places) + 1):
        if at == len(places) or places[at] != places[at - 1] + 1:
            lengths.append(at - start)
            start = at
    assert all(1 <= one <= 94 for one in lengths)  # two that happen to follow each other look like one
    if kept >= 47 and lengths:
        assert all(one >= 16 for one in lengths[:-1])
    assert torch.equal(with_returns(sequence, share), found)


def test_other_texts_have_other_passages():
    places = []
    for first in (0, 1):
        sequence = torch.arange(first, first + 512)
        places.append(with_returns(sequence, 0.25)[384:] - first)
    assert not torch.equal(*places)


@pytest.mark.parametrize("share", [-0.1, 0.95, float("nan")])
def test_shares_that_cannot_be(share):
    with pytest.raises(ValueError, match=r"a share from 0 to 0.9 are wanted"):
        with_returns(torch.arange(10), share)


def test_one_sequence_at_a_time():
    with pytest.raises(ValueError, match=r"one sequence .* got \(2, 5\)"):
        with_returns(torch.zeros(2, 5, dtype=torch.int64), 0.5)
