"""The Triton kernels on a real GPU against the reference on the same device."""

import itertools

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton.language")

from hf_lowbit.kernels import reference
from hf_lowbit.kernels.triton import binary, tune
from hf_lowbit.kernels.tuning import Settings
from tests.kernels.triton.binary_cases import KINDS, Kind, make

pytestmark = pytest.mark.gpu

BATCHES = (0, 1, 3, 17, 33, 64, 513)
SHAPES = [
    (1, 1, 128),
    (40, 72, 32),
    (33, 300, 128),
    (130, 130, 48),
    (576, 576, 128),
    (1536, 576, 64),
    (300, 2048, 256),
]
# Against float64 on the rounded weight. float32: sums of some thousand terms, 2^-24 each. Half precision: the result
# is rounded once, 2^-12 to 2^-11 of it in float16, 2^-9 to 2^-8 in bfloat16. With column scales bfloat16 rounds scale,
# column scale and product where the reference rounds the product alone: four roundings more, so twice as much.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


def tolerance(kind: Kind, dtype: torch.dtype) -> float:
    return TOLERANCE[dtype] * (2 if kind.columns and dtype == torch.bfloat16 else 1)


def expected(x: Tensor, parts: tuple, sizes: tuple, bias: Tensor | None) -> Tensor:
    weight = reference.binary_dequantize(*parts, *sizes).to(x.dtype).double()
    y = x.double() @ weight.T
    return y if bias is None else y + bias.to(x.dtype).double()


def error(got: Tensor, want: Tensor) -> float:
    assert got.shape == want.shape
    return float((got.double() - want).norm() / want.norm()) if want.numel() else 0.0


def compare(case, batch: int, with_bias: bool, dtype: torch.dtype) -> None:
    n, m = case.parts[1].shape[-1], case.sizes[0]
    x = torch.randn(batch, m, device="cuda").to(dtype)
    bias = torch.randn(n, device="cuda") if with_bias else None
    assert binary.supports(x, *case.parts, bias, *case.sizes) == (True, "")
    got = binary.binary_linear(x, *case.parts, bias, *case.sizes)
    assert got.dtype == dtype
    assert error(got, expected(x, case.parts, case.sizes, bias)) < tolerance(case.kind, dtype), (batch, with_bias)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("number", range(len(KINDS)), ids=KINDS.keys())
def test_every_kind_of_weight(number, dtype):
    case = make(list(KINDS.values())[number], *SHAPES[number % len(SHAPES)]).to("cuda")
    for batch, with_bias in ((1, True), (33, False), (513, True)):
        compare(case, batch, with_bias, dtype)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", ["rtn", "rc"])
def test_every_shape_and_batch(name, shape):
    case = make(KINDS[name], *shape).to("cuda")
    for batch, with_bias in itertools.product(BATCHES, (False, True)):
        compare(case, batch, with_bias, torch.float16)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("batch", [1, 16, 2048])
@pytest.mark.parametrize("name", ["rtn", "arb", "rc", "rc-2:4"])
def test_sizes_of_real_models(name, batch, dtype):
    case = make(KINDS[name], 4096, 11008).to("cuda")
    x = torch.randn(batch, 11008, device="cuda").to(dtype)
    got = binary.binary_linear(x, *case.parts, None, *case.sizes)
    assert error(got, expected(x, case.parts, case.sizes, None)) < tolerance(KINDS[name], dtype)
    assert torch.equal(got, binary.binary_linear(x, *case.parts, None, *case.sizes))  # equal bits in every run


@pytest.mark.parametrize("settings", list(tune.candidates(64))[::3], ids=str)
def test_every_candidate_of_the_tuner(settings):
    case = make(KINDS["rc"], 300, 700).to("cuda")
    x = torch.randn(64, 700, device="cuda").half()
    weight = binary.weight_of(x.dtype, *case.parts, *case.sizes)
    for splits in (1, 3):
        got = binary.run(x, weight, None, settings, splits)
        assert error(got, expected(x, case.parts, case.sizes, None)) < TOLERANCE[torch.float16]


@pytest.mark.parametrize("name", ["rtn", "rc"])
def test_strides_and_leading_dimensions(name):
    m = 300
    case = make(KINDS[name], 40, m).to("cuda")
    wide = torch.randn(4, 2 * m, device="cuda").half()
    for x in (wide[:, ::2], wide[:, 1 : m + 1], wide[:, :m].T.contiguous().T, wide[:1, :m].expand(4, m), wide[0, :m]):
        got = binary.binary_linear(x, *case.parts, None, *case.sizes)
        assert error(got, expected(x, case.parts, case.sizes, None)) < TOLERANCE[torch.float16]
    assert binary.binary_linear(wide.view(2, 2, 2, m), *case.parts, None, *case.sizes).shape == (2, 2, 2, 40)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", ["rtn", "rc", "rc-2:4"])
def test_not_a_number_and_infinity(name, dtype):
    m = 300
    case = make(KINDS[name], 40, m).to("cuda")
    x = torch.randn(5, m, device="cuda").to(dtype)
    x[1, 3], x[2, 0], x[3, m - 1] = float("nan"), float("inf"), -float("inf")
    got = binary.binary_linear(x, *case.parts, None, *case.sizes)
    want = expected(x, case.parts, case.sizes, None)
    assert torch.equal(got.isnan(), want.isnan())
    assert torch.equal(got.isinf(), want.isinf())
    assert torch.equal(got[want.isinf()].double(), want[want.isinf()])


def test_replay_of_a_graph():
    case = make(KINDS["rc-2:4"], 300, 512).to("cuda")
    x = torch.randn(1, 512, device="cuda").half()
    binary.binary_linear(x, *case.parts, None, *case.sizes)  # compile outside
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = binary.binary_linear(x, *case.parts, None, *case.sizes)
    x.copy_(torch.randn_like(x))
    graph.replay()
    assert error(out, expected(x, case.parts, case.sizes, None)) < TOLERANCE[torch.float16]


def test_tuning(tmp_path):
    rows = tune.tune("cuda", [(256, 512)], tmp_path / "settings.json", batches=[1])
    assert Settings(*(rows[0][name] for name in Settings.__dataclass_fields__)).block_n >= 32
