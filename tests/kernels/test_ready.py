"""The short way of decoding: the bits of the long one, shared inputs noticed, and nothing stale ever handed out."""

import copy
import pickle
import threading

import pytest
import torch
from torch import nn

from hf_lowbit import PackedLinear
from hf_lowbit.formats import IntegerSpec
from hf_lowbit.kernels import dispatch
from hf_lowbit.kernels.cpu.library import load
from hf_lowbit.report.bench import random_format, random_weight, typical_spec
from tests.kernels.compiled import needs

pytestmark = needs(load)


def layer(rows, bias=False):
    return PackedLinear(
        random_weight(typical_spec(rows, 256)), torch.randn(rows).bfloat16() if bias else None, torch.bfloat16
    )


class Attention(nn.Module):
    """Four layers, of which three read one input."""

    def __init__(self):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = layer(256, bias=True), layer(64), layer(64, bias=True)
        self.o_proj = layer(256)

    def forward(self, x, other=None):
        other = x if other is None else other
        q, k, v = self.q_proj(x), self.k_proj(other), self.v_proj(other)
        return self.o_proj(q + k.repeat_interleave(4, -1) + v.repeat_interleave(4, -1))

    def groups(self):
        return [own._last[3].group for own in (self.q_proj, self.k_proj, self.v_proj, self.o_proj)]


def expected(model, *inputs):
    """What the same layers give one by one, on the long way."""
    with dispatch.forced("cpu"):
        return model(*inputs)


@pytest.fixture
def model():
    torch.manual_seed(0)
    with torch.no_grad():
        yield Attention()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("tokens", [1, 8, 9, 40])
def test_same_bits_with_and_without_sharing(dtype, tokens, model):
    for own in (model.q_proj, model.v_proj):
        own.bias.data = own.bias.data.to(dtype)
    for _ in range(4):
        x = torch.randn(1, tokens, 256).to(dtype)
        assert torch.equal(model(x), expected(model, x))
    q, k, v, o = model.groups()
    assert (q is k is v) and o is None
    assert (q is not None) == (tokens <= 8)


def test_only_layers_with_the_same_input_share(model):
    for _ in range(4):
        x, other = torch.randn(1, 256).bfloat16(), torch.randn(1, 256).bfloat16()
        assert torch.equal(model(x, other), expected(model, x, other))
    q, k, v, o = model.groups()
    assert q is None and o is None and k is v and k is not None


def test_input_written_to_in_between_is_read_again(model):
    for _ in range(3):
        model(torch.randn(1, 256).bfloat16())
    x = torch.randn(1, 256).bfloat16()
    model.q_proj(x)
    x.mul_(2)
    with dispatch.forced("cpu"):
        want = model.k_proj(x)
    assert torch.equal(model.k_proj(x), want)


@pytest.mark.parametrize("change", ["in place", "signs", "replaced", "bias"])
def test_changed_weight_is_seen(change, model):
    for _ in range(3):
        model(torch.randn(1, 256).bfloat16())
    own = model.v_proj
    if change == "in place":
        own.weight_row_scale.mul_(2)
    elif change == "signs":  # those of salient columns were copied
        own.weight_sign.bitwise_not_()
    elif change == "replaced":
        own.weight_row_scale = nn.Parameter(own.weight_row_scale * 2, requires_grad=False)
    else:
        own.bias.add_(1)
    for _ in range(6):
        x = torch.randn(1, 256).bfloat16()
        assert torch.equal(model(x), expected(model, x))


def test_sharing_in_vain_ends(model):
    for _ in range(3):
        model(torch.randn(1, 256).bfloat16())
    assert model.groups()[0] is not None
    for _ in range(5):  # another way through the model: only q is asked for
        x = torch.randn(1, 256).bfloat16()
        with dispatch.forced("cpu"):
            want = model.q_proj(x)
        assert torch.equal(model.q_proj(x), want)
    assert model.groups()[0] is None
    x = torch.randn(1, 256).bfloat16()
    assert torch.equal(model(x), expected(model, x))


def test_gradients_inference_mode_and_odd_inputs_take_the_long_way(model):
    for _ in range(3):
        model(torch.randn(1, 256).bfloat16())
    with torch.enable_grad():
        x = torch.randn(1, 256, requires_grad=True)
        model(x.bfloat16()).sum().backward()
        assert x.grad is not None and x.grad.abs().sum() > 0
    with torch.inference_mode():
        x = torch.randn(1, 256).bfloat16()
        assert torch.equal(model(x), expected(model, x))
    wide = torch.randn(2, 512).bfloat16()[:, ::2]
    assert torch.equal(model(wide), expected(model, wide.contiguous()))
    with pytest.raises(RuntimeError, match="has 128 columns, the weight has 256"):
        model(torch.randn(1, 128).bfloat16())
    bad = torch.full((1, 256), float("nan")).bfloat16()
    assert model(bad).isnan().all()


def test_threads_do_not_mix(model):
    for _ in range(3):
        model(torch.randn(1, 256).bfloat16())
    failures = []

    def work(seed):
        own = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for _ in range(30):
                x = torch.randn(1, 256, generator=own).bfloat16()
                got = model(x)
                alone = [layer.packed.linear(x, layer.bias) for layer in (model.q_proj, model.k_proj, model.v_proj)]
                q, k, v = alone
                want = model.o_proj(q + k.repeat_interleave(4, -1) + v.repeat_interleave(4, -1))
                if not torch.equal(got, want):
                    failures.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_copies_start_anew(model):
    for _ in range(3):
        model(torch.randn(1, 256).bfloat16())
    x = torch.randn(1, 256).bfloat16()
    want = model(x)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(x), want)
        assert twin.groups()[0] is not model.groups()[0]


@pytest.mark.parametrize("threads", [2, 3])
def test_number_of_threads_does_not_matter(threads, model):
    x = torch.randn(5, 256).bfloat16()
    for _ in range(3):
        model(torch.randn(1, 256).bfloat16())
    want, before = model(x), torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        assert torch.equal(model(x.clone()), want)
    finally:
        torch.set_num_threads(before)


def test_integer_layers_share_among_themselves_only():
    """Two of integers and one of signs read the same input: those of one format compute together or not at all."""
    torch.manual_seed(0)

    def integers(rows):
        return PackedLinear(random_format(IntegerSpec(rows, 256, 4, 64, False)), None, torch.bfloat16)

    for others in ([], [layer(64)]):
        layers = [integers(64), integers(33), *others]
        for _ in range(4):
            x = torch.randn(1, 256).bfloat16()
            with torch.no_grad():
                got = [own(x) for own in layers]
                with dispatch.forced("cpu"):
                    want = [own(x) for own in layers]
            assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
        assert (layers[0]._last[3].group is None) == bool(others)
        assert layers[0]._last[3].group is layers[1]._last[3].group
    with torch.no_grad():
        before = layers[0](x)
        layers[0].weight_packed.bitwise_not_()
        assert not torch.equal(layers[0](x), before)
