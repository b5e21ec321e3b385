"""Products with two factors: every kernel against the definition in float64, and which of them is chosen."""

import itertools
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch import nn

from hf_lowbit import PackedLinear
from hf_lowbit.formats import LowRankFormat, LowRankSpec
from hf_lowbit.kernels import dispatch, low_rank
from hf_lowbit.kernels.cpu import low_rank as cpu
from hf_lowbit.kernels.low_rank import low_rank_linear
from hf_lowbit.report.bench import kernels_of
from tests.kernels.compiled import needs

LIBRARY, ISA = cpu.load()
needs_library = needs(cpu.load)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# rows, rank, columns: ones, less than a vector, whole vectors, ragged ends, rows beyond the four that go together; and
# enough for several threads
SHAPES = [(1, 1, 1), (5, 3, 7), (16, 16, 32), (33, 17, 45), (64, 23, 130), (130, 64, 16), (211, 131, 307)]


def case(n, r, m, held=torch.float32):
    return torch.randn(n, r).to(held), torch.randn(r, m).to(held)


def definition(x, up, down, bias=None):
    y = x.double() @ down.double().T @ up.double().T
    return y if bias is None else y + bias.double()


def error(got, want):
    assert got.shape == want.shape
    return float((got.double() - want).norm() / want.norm()) if want.numel() else 0.0


@needs_library
@pytest.mark.parametrize("isa", [name for name in cpu.ISAS[1:] if name <= "avx512" and ISA in (name, "avx512")])
@pytest.mark.parametrize(("dtype", "held"), itertools.product(DTYPES, DTYPES), ids=str)
def test_compiled_product_against_float64(dtype, held, isa, monkeypatch):
    """Sums are float32, so beside their 2^-24 only the rounding of the result counts: at most half of ``eps``."""
    monkeypatch.setattr(cpu, "load", lambda: (LIBRARY, isa))
    for (n, r, m), tokens, threads in itertools.product(SHAPES, (1, 2, 3, 4, 7, 37), (1, 3)):
        up, down = case(n, r, m, held)
        x, bias = torch.randn(tokens, m).to(dtype), torch.randn(n) if tokens % 2 else None
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            got = cpu.linear(x, up, down, bias)
        finally:
            torch.set_num_threads(before)
        assert got.dtype == dtype
        want = definition(x, up, down, None if bias is None else bias.to(dtype))
        assert error(got, want) < max(0.5 * torch.finfo(dtype).eps, 4e-6), (n, r, m, tokens, threads)


@needs_library
def test_compiled_product_does_not_read_or_write_beyond():
    """Results stand between guards; what lies around the factors is NaN, which would show in any sum."""
    n, r, m = 21, 11, 37
    store = torch.full((4096,), torch.nan)
    up, down = store[64 : 64 + n * r].view(n, r), store[1024 : 1024 + r * m].view(r, m)
    up.normal_(), down.normal_()
    x = torch.randn(3, m)
    out = cpu.Call(up, down, None).run(x)
    assert error(out, definition(x, up, down)) < 1e-6


@needs_library
@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_what_is_not_finite_is_handed_on(value):
    up, down = case(9, 4, 20)
    x = torch.randn(2, 20)
    x[0, 3] = value
    out = cpu.linear(x, up, down, None)
    assert not torch.isfinite(out[0]).any()
    assert torch.isfinite(out[1]).all()


@needs_library
def test_a_middle_beyond_half_precision_survives():
    """The reference rounds what is between to float16 and overflows; here it stays float32."""
    up, down = torch.full((4, 2), 2e-3).half(), torch.full((2, 64), 50.0).half()
    x = torch.full((1, 64), 50.0).half()
    out = cpu.linear(x, up, down, None)
    assert torch.allclose(out.float(), definition(x, up, down).float(), rtol=1e-3)


@pytest.mark.parametrize("name", low_rank.TABLE.kernels)
def test_every_kernel_can_be_forced_or_says_why_not(name):
    up, down = case(24, 7, 40)
    bias = torch.randn(24)
    reason = low_rank.TABLE.kernels[name].why_not(torch.float32, "cpu", up, down)
    with dispatch.forced(name):
        if reason is not None:
            with pytest.raises(RuntimeError, match=f"kernel '{name}' was asked for and cannot multiply: "):
                low_rank_linear(torch.randn(2, 40), up, down, bias)
            return
        for x in (
            torch.randn(2, 40),
            torch.randn(3, 5, 40),
            torch.randn(40),
            torch.randn(6, 80)[:, ::2],
            torch.randn(50, 40),
        ):
            out = low_rank_linear(x, up, down, bias)
            assert error(out, definition(x, up, down, bias)) < 2e-6
        assert low_rank_linear(torch.randn(0, 40), up, down, bias).shape == (0, 24)


def test_choice_by_dtype_layout_and_device():
    up, down = case(24, 7, 40)
    few = "reference" if LIBRARY is None else "cpu"

    def chosen(dtype, device, *factors):
        return low_rank.TABLE.choose(dtype, device, *factors).name

    assert chosen(torch.float32, "cpu", up, down) == few
    assert chosen(torch.bfloat16, "cpu", up.half(), down.half()) == few
    assert chosen(torch.float64, "cpu", up, down) == "reference"
    assert chosen(torch.float32, "cpu", up.T.contiguous().T, down) == "reference"
    assert low_rank.TABLE.reasons(torch.float32, "cuda", up, down)["cpu"] == "cannot: tensors on cuda"
    assert low_rank.TABLE.reasons(torch.float32, "cpu", up, down)["triton"] == "cannot: tensors on cpu"


@needs_library
@pytest.mark.parametrize(("dtype", "held"), itertools.product(DTYPES, DTYPES), ids=str)
def test_many_tokens_are_left_to_torch(dtype, held, monkeypatch):
    seen = []
    monkeypatch.setattr(cpu.Call, "run", lambda self, x: seen.append(len(x)) or x)
    up, down = case(24, 7, 40, held)
    most = cpu.most_tokens(dtype, held)
    for tokens in (1, most, most + 1, 4 * most):
        low_rank_linear(torch.randn(tokens, 40).to(dtype), up, down, None)
    assert seen == [1, most]


def test_an_absent_library_is_a_reason(monkeypatch):
    monkeypatch.setattr(cpu, "load", lambda: (None, "it was not built"))
    up, down = case(24, 7, 40)
    found = low_rank.TABLE.reasons(torch.float32, "cpu", up, down)
    assert found["cpu"] == "cannot: no compiled library: it was not built"
    assert found["reference"] == "taken: torch, two dense products"
    layer = PackedLinear(LowRankFormat.pack(up, down, torch.float32), None, torch.float32)
    assert layer(torch.randn(1, 40)).shape == (1, 24)


def test_table_of_kernels_says_which_runs():
    found = kernels_of(LowRankSpec(24, 40, 7, "bfloat16"), torch.bfloat16, "cpu")
    assert set(found) == set(low_rank.TABLE.kernels)
    assert found["cpu"].startswith("taken: C++" if LIBRARY is not None else "cannot")


@needs_library
@pytest.mark.parametrize("tokens", [1, 50])
def test_short_way_of_a_layer_gives_what_the_op_gives(tokens):
    """By bits, since it is the same kernel; and it follows weights that are replaced, moved and written to."""
    form = LowRankFormat.pack(*case(24, 7, 40), torch.bfloat16)
    layer = PackedLinear(form, torch.randn(24), torch.bfloat16)
    x = torch.randn(tokens, 40).bfloat16()

    def by_op():
        return torch.ops.hf_lowbit.low_rank_linear(x, layer.weight_up, layer.weight_down, layer.bias)

    with torch.no_grad():
        layer.bias.data = layer.bias.data.bfloat16()
        first = layer(x)
        assert torch.equal(first, by_op())
        layer.weight_up.data = 2 * layer.weight_up.data
        assert torch.equal(layer(x), by_op())
        layer.weight_down.mul_(0.5)
        assert torch.equal(layer(x), by_op())
        layer.weight_up = nn.Parameter(torch.zeros_like(layer.weight_up), requires_grad=False)
        assert torch.equal(layer(x), layer.bias.expand(tokens, -1))
        assert not torch.equal(layer(x), first)


def test_autocast_leaves_the_dtype_of_the_activations():
    layer = PackedLinear(LowRankFormat.pack(*case(24, 7, 40), torch.float32), None, torch.float32)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert [layer(torch.randn(tokens, 40)).dtype for tokens in (1, 99)] == [torch.float32] * 2


def test_wrong_arguments_are_refused_before_any_kernel():
    up, down = case(24, 7, 40)
    for x, u, d, bias, message in (
        (torch.randn(2, 41), up, down, None, "x has shape \\(2, 41\\), the weight has 40 columns"),
        (torch.ones(2, 40, dtype=torch.int32), up, down, None, "must be floating point"),
        (torch.randn(2, 40), up[:, :5], down, None, "factors of rank 5 and 7"),
        (torch.randn(2, 40), up, down, torch.randn(23), "bias has shape \\(23,\\), expected \\(24,\\)"),
        (torch.randn(2, 40), up, down.to("meta"), None, "x is on cpu, the weight on cpu and meta"),
        (torch.randn(2, 40), up, down, torch.randn(24, device="meta"), "x is on cpu, the bias on meta"),
        (torch.randn(2, 40), up[0], down, None, "factors must be matrices of at least one rank and column"),
        (torch.randn(2, 40), up[:, :0], down[:0], None, "got \\(24, 0\\) and \\(0, 40\\)"),
        (torch.randn(2, 0), up, down[:, :0], None, "got \\(24, 7\\) and \\(7, 0\\)"),
    ):
        with pytest.raises(RuntimeError, match=message):
            low_rank_linear(x, u, d, bias)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(shutil.which("g++") is None, reason="the sanitizers need a compiler")
def test_library_under_the_sanitizers(tmp_path):
    """Random factors in buffers of exact size; AddressSanitizer and UBSan end the program at the first slip."""
    here = Path(__file__).parent
    sources = sorted((Path(cpu.__file__).parent / "csrc").glob("low_rank*.cpp"))
    flags = ["-O1", "-g", "-std=c++17", "-fno-strict-aliasing", "-fopenmp", f"-I{sources[0].parent}"]
    checks = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    program = tmp_path / "sanitize"
    subprocess.run(["g++", *flags, *checks, *sources, here / "sanitize_low_rank.cpp", "-o", program], check=True)
    done = subprocess.run([program, "400"], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout == "400\n"
