"""The op for one new token against the definition, written out token by token in float64."""

import math

import pytest
import torch

from hf_lowbit.kernels import dispatch
from hf_lowbit.kernels.latent_attention import merge
from hf_lowbit.kernels.latent_codec import decode_rows, encode_rows

# key heads, queries of each, head_dim, groups of keys, ranks, groups of values, ranks, rotated, norm, bias, mask
CASES = {
    "plain": (2, 1, 8, (0, 0), (6,), (0, 0), (5,), 0, False, False, None),
    "rotary": (3, 3, 8, (0, 0, 0), (10,), (0, 0, 0), (7,), 8, False, False, None),
    "one-head-groups": (4, 2, 8, (0, 1, 2, 3), (8, 8, 8, 8), (0, 0, 0, 0), (12,), 8, False, True, "bool"),
    "ragged-groups": (4, 4, 8, (0, 1, 0, 1), (7, 3), (1, 0, 0, 2), (5, 2, 8), 8, True, False, "float"),
    "partial": (2, 8, 12, (0, 0), (9,), (1, 0), (4, 6), 6, False, True, "heads"),
    "norm-alone": (2, 2, 8, (0, 1), (4, 8), (0, 0), (9,), 0, True, True, "bool"),
    "wide": (1, 5, 16, (0,), (16,), (0,), (1,), 16, True, True, "float"),
}


def arguments(case, tokens=11, batch=2, dtype=torch.float32, bits=0):
    heads, rep, width, groups_k, ranks_k, groups_v, ranks_v, rotated, norm, bias, mask = CASES[case]
    generator = torch.Generator().manual_seed(2)

    def draw(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    ups = []
    for owners, ranks in ((groups_k, ranks_k), (groups_v, ranks_v)):
        up = draw(heads, width, max(ranks))
        for head, owner in enumerate(owners):
            up[head, :, ranks[owner] :] = 0
        ups.append(up)
    stored = [draw(batch, tokens, sum(ranks)) for ranks in (ranks_k, ranks_v)]
    if bits:
        stored = [encode_rows(z, ranks, bits) for z, ranks in zip(stored, (ranks_k, ranks_v), strict=True)]
    shown = None
    if mask is not None:
        shown = torch.rand(batch, heads * rep if mask == "heads" else 1, tokens, generator=generator) < 0.7
        shown[..., -1] = True
        if mask != "bool":
            shown = torch.where(shown, draw(*shown.shape), torch.tensor(torch.finfo(dtype).min, dtype=dtype))
    return [
        draw(batch, heads * rep, width),
        *stored,
        *ups,
        draw(heads * width) if bias else None,
        draw(heads * width) if bias else None,
        draw(width) if norm else None,
        torch.randint(0, 5000, (batch, tokens), generator=generator).int() if rotated else None,
        1 / 100 ** (torch.arange(rotated // 2) / max(rotated, 1)) if rotated else None,
        shown,
        list(groups_k),
        list(ranks_k),
        list(groups_v),
        list(ranks_v),
        width**-0.5,
        1.2 if rotated else 1.0,
        1e-6 if norm else 0.0,
        bits,
    ]


def by_definition(q, zk, zv, up_k, up_v, bias_k, bias_v, norm, positions, inv_freq, mask, gk, rk, gv, rv, *rest):
    """The formulas of the module's docstring for one row, one head and one token at a time."""
    scaling, rope_scale, eps, _ = rest
    batch, heads, width = q.shape
    rep = heads // len(gk)
    out, lse = torch.zeros(batch, heads, width).double(), torch.zeros(batch, heads).double()

    def part(z, owner, ranks):
        start = sum(ranks[:owner])
        return z[start : start + ranks[owner]].double()

    for row in range(batch):
        for head in range(heads):
            kv = head // rep
            scores = []
            for token in range(zk.shape[1]):
                key = up_k[kv, :, : rk[gk[kv]]].double() @ part(zk[row, token], gk[kv], rk)
                if bias_k is not None:
                    key = key + bias_k.view(len(gk), width)[kv]
                if norm is not None:
                    key = key / (key.square().mean() + eps).sqrt() * norm
                if inv_freq is not None:
                    half = len(inv_freq)
                    # the angle is formed in float32, as models do
                    angle = (positions[row, token].float() * inv_freq).double()
                    first, second = key[:half].clone(), key[half : 2 * half].clone()
                    key[:half] = rope_scale * (first * angle.cos() - second * angle.sin())
                    key[half : 2 * half] = rope_scale * (second * angle.cos() + first * angle.sin())
                score = scaling * float(q[row, head].double() @ key)
                if mask is not None:
                    shown = mask[row, head if mask.shape[1] > 1 else 0, token]
                    score = (score if shown else -math.inf) if mask.dtype == torch.bool else score + float(shown)
                scores.append(score)
            scores = torch.tensor(scores).double()
            lse[row, head] = scores.logsumexp(0)
            mixed = (scores - lse[row, head]).exp() @ zv[row].double()
            out[row, head] = up_v[kv, :, : rv[gv[kv]]].double() @ part(mixed, gv[kv], rv)
            if bias_v is not None:
                out[row, head] += bias_v.view(len(gv), width)[kv]
    return out, lse


@pytest.mark.parametrize("case", CASES)
def test_the_op_is_its_definition(case):
    given = arguments(case)
    expected, expected_lse = by_definition(*given)
    out, lse = torch.ops.hf_lowbit.latent_decode(*given)
    # float32 against float64; angles of up to 5000 radians cost three digits of their seven
    assert (out - expected).norm() < 1e-4 * expected.norm()
    torch.testing.assert_close(lse, expected_lse.float(), atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("bits", [8, 4, 3])
@pytest.mark.parametrize("case", ["plain", "ragged-groups"])
def test_codes_are_decoded_first(case, bits):
    given = arguments(case, bits=bits)
    plain = list(given)
    plain[1] = decode_rows(given[1], given[12], bits, torch.float32)
    plain[2] = decode_rows(given[2], given[14], bits, torch.float32)
    plain[-1] = 0
    for found, right in zip(
        torch.ops.hf_lowbit.latent_decode(*given), torch.ops.hf_lowbit.latent_decode(*plain), strict=True
    ):
        assert torch.equal(found, right)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype):
    given = arguments("rotary", dtype=dtype)
    exact = [part.float() if isinstance(part, torch.Tensor) and part.is_floating_point() else part for part in given]
    with dispatch.forced("reference"):
        out, lse = torch.ops.hf_lowbit.latent_decode(*given)
        right, right_lse = torch.ops.hf_lowbit.latent_decode(*exact)
    assert out.dtype == dtype and lse.dtype == torch.float32
    torch.testing.assert_close(out, right.to(dtype), atol=0, rtol=0)
    assert torch.equal(lse, right_lse)


@pytest.mark.parametrize("case", CASES)
def test_parts_of_a_cache_merge_to_the_whole(case):
    given = arguments(case)
    parts = []
    for place in (slice(0, 4), slice(4, 5), slice(5, 11)):
        part = list(given)
        for at in (1, 2, 8):
            part[at] = None if part[at] is None else part[at][:, place]
        part[10] = None if part[10] is None else part[10][..., place]
        parts.append(torch.ops.hf_lowbit.latent_decode(*part))
    right = torch.ops.hf_lowbit.latent_decode(*given)[0]
    torch.testing.assert_close(merge(parts), right, atol=1e-5, rtol=1e-5)


def test_a_row_that_sees_nothing_gives_zero():
    given = arguments("one-head-groups")
    given[6] = None  # a bias would be added to it
    given[10] = given[10].clone()
    given[10][0] = False
    out, lse = torch.ops.hf_lowbit.latent_decode(*given)
    assert (out[0] == 0).all() and (lse[0] == -torch.inf).all()
    assert torch.isfinite(out[1]).all()
    assert torch.isfinite(merge([(out, lse), (out, lse)])).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("at", [0, 1, 2], ids=["query", "keys", "values"])
def test_nan_is_handed_on(at, dtype):
    given = arguments("one-head-groups", dtype=dtype)
    given[at] = given[at].clone()
    given[at][1] = torch.nan
    given[10] = None  # all is seen
    out, lse = torch.ops.hf_lowbit.latent_decode(*given)
    assert out[1].isnan().all() and torch.isfinite(out[0]).all()
    assert merge([(out, lse), (out, lse)])[1].isnan().all()


@pytest.mark.parametrize("case", ["rotary", "ragged-groups", "wide"])
def test_torch_finds_no_fault_with_the_registration(case):
    torch.library.opcheck(torch.ops.hf_lowbit.latent_decode, arguments(case))


def test_a_kernel_can_be_forced():
    given = arguments("rotary")
    with dispatch.forced("reference"):
        out, _ = torch.ops.hf_lowbit.latent_decode(*given)
    assert torch.equal(out, torch.ops.hf_lowbit.latent_decode(*given)[0])


@pytest.mark.parametrize(
    ("at", "value", "message"),
    [
        (0, torch.zeros(2, 3), "q must be"),
        (0, torch.zeros(2, 9, 8, dtype=torch.int64), "q must be"),
        (1, torch.zeros(2, 11, 9), r"keys have shape \(2, 11, 9\), expected \(2, tokens, 10\)"),
        (1, torch.zeros(3, 11, 10), "keys have shape"),
        (1, torch.zeros(2, 11, 10, dtype=torch.uint8), "does not go with bits=0"),
        (2, torch.zeros(2, 10, 7), "11 keys of 3 heads, 10 values of 3"),
        (3, torch.zeros(3, 8, 9), "factor of the keys"),
        (4, torch.zeros(2, 8, 7), "factor of the values"),
        (5, torch.zeros(5), "bias of the keys has 5 values"),
        (7, torch.zeros(9), "norm has shape"),
        (8, None, "positions and inv_freq go together"),
        (8, torch.zeros(2, 10, dtype=torch.int32), "do not fit"),
        (9, torch.zeros(5), "5 frequencies do not fit"),
        (10, torch.zeros(2, 1, 10), "does not spread to"),
        (10, torch.zeros(2, 4, 11), "does not spread to"),
        (11, [0, 0, 1], "groups of the keys do not fit 3 heads"),
        (18, 5, "bits must be 0, 3, 4 or 8, got 5"),
        (0, torch.zeros(2, 0, 8), r"q must be .* got \(2, 0, 8\) of torch.float32"),
        (1, torch.zeros(2, 11, 10, dtype=torch.int32), "keys are torch.int32, which does not go with bits=0"),
        (3, torch.zeros(0, 8, 10), r"factor of the keys has shape \(0, 8, 10\)"),
        (4, torch.zeros(3, 8, 7, dtype=torch.int32), "factor of the values is torch.int32, which is not floating"),
        (5, torch.zeros(24, device="meta"), "q is on cpu, bias_k on meta"),
        (6, torch.zeros(24, device="meta"), "q is on cpu, bias_v on meta"),
        (7, torch.zeros(8, device="meta"), "q is on cpu, norm on meta"),
        (8, torch.zeros(2, 11), "positions are torch.float32, expected integers of 32 or 64 bits"),
        (9, torch.zeros(2, 2), r"inv_freq has shape \(2, 2\)"),
        (10, torch.zeros(1, 1, 11, dtype=torch.int64), "mask is torch.int64, expected boolean or floating"),
        (12, [10, 0], r"ranks of the keys must be numbers from 1, got \[10, 0\]"),
        (14, [], r"ranks of the values must be numbers from 1, got \[\]"),
    ],
)
def test_what_does_not_fit_is_refused(at, value, message):
    given = arguments("rotary")
    given[at] = value
    with pytest.raises(RuntimeError, match=message):
        torch.ops.hf_lowbit.latent_decode(*given)
