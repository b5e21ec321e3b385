"""Format ``latent``: factors survive, heads keep their order, sizes are exact, nothing damaged passes ``validate``."""

import dataclasses

import pytest
import torch
from safetensors.torch import load, save

from hf_lowbit import PackedLinear
from hf_lowbit.formats import FORMATS, LatentFormat, LatentSpec
from hf_lowbit.formats.low_rank import FACTOR_DTYPES

# groups of heads, their ranks, rows of a head, columns
CASES = [
    ([[0, 1, 2]], [5], 8, 24),
    ([[0], [1], [2]], [3, 3, 3], 8, 40),
    ([[0, 2], [1]], [9, 2], 8, 24),
    ([[3, 1], [0, 2]], [4, 7], 6, 11),
    ([[0]], [1], 1, 1),
]


def factors(groups, ranks, rows, columns):
    torch.manual_seed(0)
    ups = [torch.randn(len(group), rows, rank) for group, rank in zip(groups, ranks, strict=True)]
    return ups, [torch.randn(rank, columns) for rank in ranks]


def packed(case=CASES[2], dtype=torch.float32, **changes):
    form = LatentFormat.pack(case[0], *factors(*case), dtype)
    return dataclasses.replace(form, **changes)


def dense(case):
    """The weight, head by head."""
    (groups, _, rows, columns), (ups, downs) = case, factors(*case)
    weight = torch.zeros(sum(map(len, groups)), rows, columns, dtype=torch.float64)
    for group, up, down in zip(groups, ups, downs, strict=True):
        for slot, head in enumerate(group):
            weight[head] = up[slot].double() @ down.double()
    return weight.flatten(0, 1)


@pytest.mark.parametrize("dtype", FACTOR_DTYPES.values(), ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_file_meta_and_exact_bytes(case, dtype):
    groups, ranks, rows, columns = case
    form = packed(case, dtype)
    heads = sum(map(len, groups))
    assert form.nbytes == (sum(ranks) * columns + heads * rows * max(ranks)) * dtype.itemsize
    assert LatentSpec.from_json(form.spec.to_json(), "layer") == form.spec
    assert (form.spec.width, form.spec.head_dim) == (sum(ranks), rows)
    empty = LatentFormat.empty(form.spec)
    assert {name: (tuple(t.shape), t.dtype) for name, t in empty.state().items()} == LatentFormat.shapes(form.spec)
    again = LatentFormat.from_state(load(save(form.state())), form.spec)
    again.validate("layer")
    assert all(torch.equal(again.state()[name], tensor) for name, tensor in form.state().items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_heads_keep_their_order_whatever_the_groups(case, dtype):
    """Tolerance: three roundings to ``dtype`` (factor, latent, result), and the sum in it."""
    form, weight = packed(case), dense(case)
    assert torch.allclose(form.unpack().double(), weight, rtol=1e-5, atol=1e-5)
    bias = torch.randn(len(weight))
    for x in (torch.randn(2, 5, case[3]).to(dtype), torch.randn(case[3]).to(dtype), torch.randn(0, case[3]).to(dtype)):
        out, want = form.linear(x, bias), x.double() @ weight.T + bias.double()
        assert out.dtype == dtype
        assert out.shape == want.shape
        if x.numel():
            assert float((out.double() - want).norm() / want.norm()) < 6 * torch.finfo(dtype).eps


def test_the_middle_is_what_a_cache_would_keep():
    form = packed(CASES[3])
    x = torch.randn(2, 7, 11)
    z = form.latent(x)
    assert z.shape == (2, 7, form.spec.width)
    assert torch.equal(form.expand(z), form.linear(x, None))
    # head 0 is in the second group: it depends on the second part of the latent alone
    assert form.spec.offsets == (0, 4)
    assert form.spec.group_of_head == (1, 0, 1, 0)
    z[..., :4] = 0
    assert torch.equal(form.expand(z)[..., :6], form.linear(x, None)[..., :6])
    assert not form.expand(z)[..., 6:12].any()


def test_gradients_and_compile():
    layer = PackedLinear(packed(), None, torch.float32)
    x = torch.randn(3, 24, requires_grad=True)
    layer(x).sum().backward()
    assert torch.allclose(x.grad, layer.packed.unpack().sum(0).expand(3, -1), atol=1e-4)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    assert torch.equal(compiled(x), layer(x))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"groups": [[0, 1], [1]]}, "groups must put each of the heads 0 to 2 into exactly one"),
        ({"groups": [[0, 1, 2], []]}, "groups must put"),
        ({"groups": [[0, 1, True]]}, "groups must put"),
        ({"groups": "012"}, "groups must put"),
        ({"groups": [[0, 1], [2.0]]}, "groups must put"),
        ({"ranks": [9]}, "ranks must hold one rank for each of 2 groups"),
        ({"ranks": [9, 0]}, "a group of 1 heads has rank 1 to 8, got 0"),
        ({"ranks": [17, 1]}, "a group of 2 heads has rank 1 to 16, got 17"),
        ({"ranks": [True, 1]}, "got True"),
        ({"num_heads": 5}, "out_features 24 is not a multiple of num_heads 5"),
        ({"num_heads": 0}, "num_heads must be an integer from 1"),
        ({"num_heads": 2**20}, "num_heads must be an integer from 1"),
        ({"dtype": "float64"}, "dtype must be one of float16"),
        ({"dtype": ["float16"]}, "dtype must be one of"),
        ({"out_features": -1}, "out_features must be an integer"),
        ({"extra": 1}, "unknown key 'extra'"),
    ],
    ids=str,
)
def test_a_bad_spec_is_refused_in_words(changes, message):
    data = {**packed().spec.to_json(), **changes}
    with pytest.raises(ValueError, match=message):
        LatentSpec.from_json(data, "layer")


def test_damaged_tensors_are_refused_by_name():
    form = packed()
    bad = form.up.clone()
    bad[1, 0, 5] = 0.5  # head 1 is in the group of rank 2
    with pytest.raises(ValueError, match="layer: up is not zero beyond the rank"):
        packed(up=bad).validate("layer")
    with pytest.raises(ValueError, match="layer: down holds NaN or infinity"):
        packed(down=form.down * float("nan")).validate("layer")
    with pytest.raises(ValueError, match="layer: up is"):
        packed(up=form.up[:2]).validate("layer")
    with pytest.raises(ValueError, match="cannot store factors"):
        LatentFormat.pack([[0, 1]], [torch.randn(1, 4, 2)], [torch.randn(2, 8)], torch.float32)
    with pytest.raises(ValueError, match="a group of 1 heads has rank 1 to 4, got 6"):
        LatentFormat.pack([[0]], [torch.randn(1, 4, 6)], [torch.randn(6, 8)], torch.float32)
    assert FORMATS["latent"] is LatentFormat
