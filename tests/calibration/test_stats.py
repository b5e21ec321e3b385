"""Second moments of a layer's inputs against the product written out in float64."""

import pytest
import torch

from hf_lowbit import CalibrationError
from hf_lowbit.calibration.stats import LinearStats

# Relative error of a float32 sum of products: 2^-24 per step, 640 steps at most here; it grows like their root.
TOLERANCE = 1e-5


def by_hand(batches):
    rows = torch.cat([batch.reshape(-1, batch.shape[-1]) for batch in batches]).double()
    return sum(torch.outer(row, row) for row in rows)


def relative(got, want):
    return float((got.double() - want).norm() / want.norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_sum_of_outer_products(dtype):
    batches = [(torch.randn(size, 40, 24) * 3 + 0.5).to(dtype) for size in (4, 4, 4, 3, 1)]
    before = [batch.clone() for batch in batches]
    stats = LinearStats("layer", 24)
    for batch in batches:
        stats.update(batch)
    assert stats.total.dtype == torch.float64
    assert stats.second_moment().dtype == torch.float32
    assert relative(stats.total, by_hand(batches)) < TOLERANCE
    assert torch.equal(stats.total, stats.total.T)
    assert (stats.tokens, stats.sequences) == (16 * 40, 16)
    assert relative(stats.second_moment(), by_hand(batches) * 2 / 16) < TOLERANCE
    assert all(torch.equal(batch, old) for batch, old in zip(batches, before, strict=True))


def test_two_tokens_by_hand():
    stats = LinearStats("layer", 2)
    stats.update(torch.tensor([[[1.0, 2.0], [3.0, -1.0]]]))
    assert stats.total.tolist() == [[10.0, -1.0], [-1.0, 5.0]]
    assert stats.second_moment().tolist() == [[20.0, -2.0], [-2.0, 10.0]]


def test_asking_changes_nothing():
    stats = LinearStats("layer", 3)
    stats.update(torch.randn(2, 5, 3))
    assert torch.equal(stats.second_moment(), stats.second_moment())


def test_sums_of_two_runs_add_up():
    batches = [torch.randn(2, 7, 16) for _ in range(4)]
    whole, first, second = (LinearStats("layer", 16) for _ in range(3))
    for number, batch in enumerate(batches):
        whole.update(batch)
        (first, second)[number % 2].update(batch)
    assert torch.equal(first.total + second.total, whole.total)  # exact, whichever process saw which batch
    assert first.tokens + second.tokens == whole.tokens
    assert first.sequences + second.sequences == whole.sequences


def test_gradients_are_not_kept():
    stats = LinearStats("layer", 3)
    stats.update(torch.randn(2, 5, 3, requires_grad=True))
    assert not stats.total.requires_grad


def test_flattened_batches_count_their_sequences():
    batch = torch.randn(3, 8, 4)
    plain, flat = LinearStats("layer", 4), LinearStats("layer", 4)
    plain.update(batch)
    flat.update(batch.flatten(0, 1), 3)
    assert (flat.tokens, flat.sequences) == (24, 3)
    assert torch.equal(plain.second_moment(), flat.second_moment())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize(("sample", "position"), [(0, 0), (1, 0), (1, 7), (2, 7)])
def test_bad_inputs_name_layer_and_sample(value, flat, sample, position):
    stats = LinearStats("model.layers.1.q_proj", 4)
    stats.update(torch.randn(2, 8, 4))
    total = stats.total.clone()
    batch = torch.randn(3, 8, 4)
    batch[sample, position, 2] = value
    message = rf"model\.layers\.1\.q_proj: inputs hold NaN or infinity in calibration sample {2 + sample}$"
    with pytest.raises(CalibrationError, match=message):
        stats.update(batch.flatten(0, 1) if flat else batch, 3 if flat else None)
    assert torch.equal(stats.total, total)
    assert (stats.tokens, stats.sequences) == (16, 2)


def test_half_precision_infinity_is_found():
    with pytest.raises(CalibrationError, match="sample 0"):
        LinearStats("layer", 2).update(torch.full((1, 1, 2), 7e4).half())


def test_nothing_seen():
    stats = LinearStats("model.experts.7.up_proj", 4)
    with pytest.raises(CalibrationError, match=r"model\.experts\.7\.up_proj: received no calibration input"):
        stats.second_moment()


def test_an_empty_batch_adds_nothing():
    stats = LinearStats("layer", 4)
    stats.update(torch.zeros(0, 4))
    assert stats.tokens == 0
    with pytest.raises(CalibrationError, match="received no calibration input"):
        stats.second_moment()
    stats.update(torch.ones(1, 1, 4))
    assert torch.equal(stats.second_moment(), torch.full((4, 4), 2.0))
