"""The kernels for one new token over latents in Triton's interpreter, against the reference; no GPU needed.

``test_triton_latent.py`` runs this file in a process that has the interpreter switched on. bfloat16 arithmetic is
wrong there, so 16-bit products run in float16.
"""

import pytest
import torch

from hf_lowbit.kernels import latent_attention
from hf_lowbit.kernels.latent_case import Case
from hf_lowbit.kernels.triton import latent
from tests.kernels.test_latent_op import CASES, arguments

# float32 sums in another order, and sines of angles up to 5000 rounded another way
TOLERANCE = 1e-4


@pytest.fixture(autouse=True)
def poison_outputs():
    """Fill what is allocated and not written with NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def test_the_interpreter_is_on():
    assert latent.INTERPRETED


def reference(case):
    return latent_attention.TABLE.kernels["reference"].linear(case)


def check(case, compute=torch.float32, tolerance=TOLERANCE, **options):
    assert latent.why_not(case) is None
    out, lse = latent.run(case, compute, options.pop("cores", 1), **options)
    right, right_lse = reference(case)
    assert out.dtype == case.q.dtype and lse.dtype == torch.float32
    assert (out.double() - right.double()).norm() < tolerance * right.double().norm()
    assert (lse - right_lse).abs().max() < 10 * tolerance * right_lse.abs().max().clamp(min=1)


@pytest.mark.parametrize("name", CASES)
def test_every_case(name):
    check(Case(*arguments(name, tokens=37, batch=2)), block_t=16)


@pytest.mark.parametrize("name", ["rotary", "wide"])
def test_a_single_token(name):
    check(Case(*arguments(name, tokens=1, batch=1)), block_t=16)


@pytest.mark.parametrize(("name", "bits"), [("rotary", 8), ("ragged-groups", 4), ("ragged-groups", 3), ("plain", 3)])
def test_codes(name, bits):
    check(Case(*arguments(name, tokens=21, batch=1, bits=bits)), block_t=16)


@pytest.mark.parametrize("cores", [3, 100])
def test_stretches_add_up(cores, monkeypatch):
    monkeypatch.setattr(latent, "_STRETCH", 16)
    check(Case(*arguments("ragged-groups", tokens=60, batch=1)), block_t=16, cores=cores)


def test_half_precision():
    check(Case(*arguments("rotary", dtype=torch.float16)), torch.float16, 2e-3, block_t=16)


def test_stretches_of_a_cache_merge():
    given = arguments("rotary")
    parts = []
    for place in (slice(0, 4), slice(4, 11)):
        part = list(given)
        for at in (1, 2, 8):
            part[at] = part[at][:, place]
        parts.append(latent.run(Case(*part), torch.float32, 1, 16))
    right, _ = reference(Case(*given))
    torch.testing.assert_close(latent_attention.merge(parts), right, atol=1e-4, rtol=1e-3)


def test_static_memory_that_is_not_full():
    given = arguments("one-head-groups", tokens=40)
    for at in (1, 2, 8):
        given[at] = given[at][:, :23]
    given[10] = given[10][..., :23]
    check(Case(*given), block_t=16)


def test_a_row_that_sees_nothing_gives_zero():
    given = arguments("one-head-groups")
    given[6] = None  # a bias would be added to it
    given[10] = given[10].clone()
    given[10][0] = False
    out, lse = latent.run(Case(*given), torch.float32, 1, 16)
    assert (out[0] == 0).all() and (lse[0] == -torch.inf).all() and torch.isfinite(out[1]).all()


@pytest.mark.parametrize("at", [0, 1, 2], ids=["query", "keys", "values"])
def test_nan_is_handed_on(at):
    given = arguments("one-head-groups")
    given[at] = given[at].clone()
    given[at][1] = torch.nan
    given[10] = None  # all is seen
    out, _ = latent.run(Case(*given), torch.float32, 1, 16)
    assert out[1].isnan().all() and torch.isfinite(out[0]).all()


def test_what_is_not_taken_and_why():
    case = Case(*arguments("rotary"))
    assert latent.why_not(case._replace(q=case.q.double())).startswith("q of torch.float64")
    assert latent.why_not(case._replace(keys=case.keys[:, :0])) == "nothing to attend to"
    wide = case._replace(up_k=torch.zeros(3, 300, 10))
    assert latent.why_not(wide) == "heads of 300, at most 256"
    many = case._replace(q=torch.zeros(2, 99, 8))
    assert latent.why_not(many) == "99 queries share a group of values, at most 64"
