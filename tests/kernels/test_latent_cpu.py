"""The CPU kernel for one new token over latents, against the reference."""

import pytest
import torch

from hf_lowbit.kernels import dispatch, latent_attention
from tests.kernels.test_latent_op import CASES, arguments

NORMED = [name for name, case in CASES.items() if case[8]]
TAKEN = [name for name in CASES if name not in NORMED]


def both(given):
    found = torch.ops.hf_lowbit.latent_decode(*given)
    with dispatch.forced("reference"):
        right = torch.ops.hf_lowbit.latent_decode(*given)
    return found, right


def check(given):
    assert latent_attention.choose(*given).name == "cpu"
    (out, lse), (right, right_lse) = both(given)
    assert out.dtype == torch.bfloat16 and lse.dtype == torch.float32
    # rounded three times to 8 bits on the way, where the reference rounds once at the end
    assert (out.float() - right.float()).norm() < 2e-2 * right.float().norm()
    assert (lse - right_lse).abs().max() < 0.05 * right_lse.abs().max().clamp(min=1)


@pytest.mark.parametrize("tokens", [1, 11, 600])  # less than a stretch, and several of them
@pytest.mark.parametrize("case", TAKEN)
def test_the_kernel_gives_what_the_reference_gives(case, tokens, monkeypatch):
    monkeypatch.setattr(latent_attention.latent_cpu, "_MOST", 256)
    check(arguments(case, tokens=tokens, batch=3, dtype=torch.bfloat16))


@pytest.mark.parametrize("bits", [8, 4, 3])
@pytest.mark.parametrize("case", ["rotary", "one-head-groups", "partial"])
def test_codes_are_decoded(case, bits):
    check(arguments(case, dtype=torch.bfloat16, bits=bits))


def test_rows_with_the_same_positions_share_their_turns():
    given = arguments("rotary", dtype=torch.bfloat16)
    given[8] = given[8][:1].expand(2, -1).contiguous()
    check(given)


def test_a_rotation_of_each_row_matters():
    given = arguments("rotary", dtype=torch.bfloat16)
    (out, _), _ = both(given)
    given[8] = given[8].flip(0)
    (other, _), _ = both(given)
    assert (out - other).abs().max() > 0.1


def test_a_row_that_sees_nothing_gives_zero():
    given = arguments("one-head-groups", dtype=torch.bfloat16)
    given[6] = None  # a bias would be added to it
    given[10] = given[10].clone()
    given[10][0] = False
    out, lse = torch.ops.hf_lowbit.latent_decode(*given)
    assert (out[0] == 0).all() and (lse[0] == -torch.inf).all() and torch.isfinite(out[1]).all()


@pytest.mark.parametrize("case", NORMED)
def test_norms_of_keys_go_to_the_reference(case):
    given = arguments(case, dtype=torch.bfloat16)
    assert latent_attention.choose(*given).name == "reference"
    with dispatch.forced("cpu"), pytest.raises(RuntimeError, match="a norm of the keys needs the keys"):
        torch.ops.hf_lowbit.latent_decode(*given)


def test_float32_goes_to_the_reference():
    assert latent_attention.choose(*arguments("rotary")).name == "reference"
