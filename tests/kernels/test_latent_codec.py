"""Rows of bytes: what they hold, how long they are, and how near the decoded latents are."""

import pytest
import torch

from hf_lowbit.kernels import latent_codec
from hf_lowbit.kernels.latent_codec import WORDS, decode_rows, encode_rows, row_bytes

BITS = sorted(WORDS)


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("ranks", [(8,), (96,), (64, 32), (5, 1, 17), (1,)])
def test_every_value_is_within_a_step(bits, ranks):
    latents = drawn(2, 7, sum(ranks)) * 3
    rows = encode_rows(latents, ranks, bits)
    assert rows.dtype == torch.uint8
    assert rows.shape == (2, 7, row_bytes(ranks, bits))
    found = decode_rows(rows, ranks, bits, torch.float32)
    for group, coded in zip(latents.split(ranks, -1), found.split(ranks, -1), strict=True):
        width = group.amax(-1, keepdim=True) - group.amin(-1, keepdim=True)
        # half a step of rounding, at the ends of the range up to as much again: zero points are whole numbers; a
        # group of one value has no range, its step is what keeps the zero point within int16
        step = torch.maximum(width / (2**bits - 1), group.abs().amax(-1, keepdim=True) / 32000)
        assert ((coded - group).abs() <= 1.02 * step).all()


@pytest.mark.parametrize("bits", BITS)
def test_length_of_a_row_is_the_formula_of_the_paper_for_ranks_of_whole_words(bits):
    assert row_bytes((96,), bits) == 96 * bits // 8 + 4
    assert row_bytes((64, 32), bits) == 96 * bits // 8 + 8
    assert row_bytes((9,), bits) == {8: 9, 4: 5, 3: 6}[bits] + 4


def test_the_layout_of_a_row():
    """Written out by hand: scale 1 and zero 2, then codes in words that are as far apart as there are words."""
    latents = torch.arange(16.0) - 2
    expected = torch.tensor([1.0], dtype=torch.float16).view(torch.uint8).tolist()
    expected += torch.tensor([2], dtype=torch.int16).view(torch.uint8).tolist()
    expected += [low | (low + 8) << 4 for low in range(8)]
    assert encode_rows(latents, (16,), 4).tolist() == expected

    latents = torch.tensor([0, 7, 1, 6, 2, 5, 3, 4, 4, 3, 5, 2, 6, 1, 7, 0.0])
    words = [sum(int(latents[word + 2 * place]) << (3 * place) for place in range(8)) for word in range(2)]
    planes = [words[word] >> (8 * byte) & 255 for byte in range(3) for word in range(2)]
    row = encode_rows(latents, (16,), 3)
    assert row[4:].tolist() == planes
    torch.testing.assert_close(decode_rows(row, (16,), 3, torch.float32), latents, atol=0, rtol=0)


@pytest.mark.parametrize("bits", BITS)
def test_whole_multiples_of_a_scale_come_back_exactly(bits):
    most = 2**bits - 1
    latents = torch.cat([torch.arange(most + 1.0), torch.arange(most + 1.0) + 100]).view(2, -1) * 0.25
    found = decode_rows(encode_rows(latents, (most + 1,), bits), (most + 1,), bits, torch.float32)
    assert torch.equal(found, latents)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("level", [0.0, 5.0, -5.0, 1000.0, 1e-7])
def test_constant_groups_keep_their_value(bits, level):
    latents = torch.full((3, 12), level)
    found = decode_rows(encode_rows(latents, (12,), bits), (12,), bits, torch.float32)
    assert ((found - latents).abs() <= max(1e-5, abs(level) / 32000)).all()


@pytest.mark.parametrize("bits", BITS)
def test_a_row_depends_on_its_token_alone(bits):
    latents = drawn(1, 1, 6, 24)
    whole = encode_rows(latents, (16, 8), bits)
    one_by_one = torch.cat([encode_rows(token, (16, 8), bits) for token in latents.split(1, dim=2)], dim=2)
    assert torch.equal(whole, one_by_one)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("odd", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_so_and_spoils_no_other_token(bits, odd):
    latents = drawn(3, 16)
    latents[1, 4] = odd
    found = decode_rows(encode_rows(latents, (16,), bits), (16,), bits, torch.float32)
    assert not torch.isfinite(found[1]).any()
    assert torch.isfinite(found[[0, 2]]).all()


def test_more_bits_are_nearer_and_half_precision_is_taken():
    latents = drawn(50, 64).to(torch.bfloat16)
    errors = []
    for bits in (8, 4, 3):
        found = decode_rows(encode_rows(latents, (64,), bits), (64,), bits, torch.bfloat16)
        assert found.dtype == torch.bfloat16
        errors.append(float((found.float() - latents.float()).square().mean()))
    assert errors[0] < errors[1] / 50 < errors[2] / 100


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bits", [8, 4, 3])
def test_the_library_codes_as_torch_does(bits, dtype, monkeypatch):
    generator = torch.Generator().manual_seed(5)
    ranks = (24, 7, 1)
    rows = torch.randn(2, 1, 50, sum(ranks), generator=generator) * torch.logspace(-6, 3, 50)[:, None]
    rows[0, 0, 3] = 2.5  # no range
    rows[0, 0, 4] = 900 + 1e-3 * rows[0, 0, 4]  # far from zero, but narrow
    rows = rows.to(dtype)
    found = encode_rows(rows, ranks, bits)
    spread = encode_rows(rows.repeat(1, 1, 1, 2)[..., : sum(ranks)], ranks, bits)  # not one row after the other
    monkeypatch.setattr(latent_codec.cpu, "encode", lambda *_: None)
    assert torch.equal(found, encode_rows(rows, ranks, bits))
    assert torch.equal(spread, found)


@pytest.mark.parametrize(
    ("latents", "ranks", "bits", "message"),
    [
        (torch.zeros(3, 4), (8, 8), 4, r"floating, \(..., 16\), got \(3, 4\)"),  # the library would read past them
        (torch.zeros(3, 16), (8,), 4, r"floating, \(..., 8\), got \(3, 16\)"),
        (torch.zeros(3, 16), (17, -1), 4, r"numbers from 1, got \[17, -1\]"),
        (torch.zeros(3, 16), (16, 0), 4, r"numbers from 1, got \[16, 0\]"),
        (torch.zeros(3, 0), (), 4, r"numbers from 1, got \[\]"),
        (torch.zeros(()), (1,), 4, r"floating, \(..., 1\), got \(\)"),
        (torch.zeros(3, 16, dtype=torch.int32), (16,), 4, "got .* of torch.int32"),
        (torch.zeros(3, 16), (16,), 5, "3, 4, 8 bits, got 5"),
        (torch.zeros(3, 16), (16,), 4.0, "3, 4, 8 bits, got 4.0"),
    ],
)
def test_latents_that_do_not_fit_are_refused(latents, ranks, bits, message):
    with pytest.raises(ValueError, match=message):
        encode_rows(latents, ranks, bits)


@pytest.mark.parametrize(
    ("rows", "ranks", "bits", "message"),
    [
        (torch.zeros(3, 12, dtype=torch.uint8), (14,), 4, r"uint8, \(..., 11\), got \(3, 12\)"),
        (torch.zeros(3, 12), (16,), 4, "got .* of torch.float32"),
        (torch.zeros(3, 12, dtype=torch.uint8), (16,), 5, "3, 4, 8 bits, got 5"),
    ],
)
def test_rows_that_do_not_fit_are_refused(rows, ranks, bits, message):
    with pytest.raises(ValueError, match=message):
        decode_rows(rows, ranks, bits, torch.float32)
