"""The compiled kernels against the reference: variants, instruction sets, odd sizes; what they cannot, they say."""

import ctypes
import itertools
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

import hf_lowbit.kernels.cpu.binary as cpu
from hf_lowbit.kernels import dispatch, reference
from hf_lowbit.kernels.cpu.library import DTYPES, ISAS, Job, has_amx, load
from tests.kernels.compiled import needs
from tests.kernels.test_binary_op import LINEAR, Case

LIBRARY, ISA = load()
needs_library = needs(load)
AVAILABLE = ISAS[: ISAS.index(ISA) + 1] if LIBRARY is not None else ()
# out_features, in_features: fewer than a tile, odd tiles, short groups, exactly one group, padding of every kind
SIZES = [(1, 16), (5, 130), (17, 128), (16, 300), (33, 640), (40, 72)]


def cases():
    masks, flags = [(0, 0), (2, 4), (4, 8), (3, 5)], (False, True)
    for number, (groups, s, shift, columns, keep, block) in enumerate(
        itertools.product((1, 2), (0, 1, 2), flags, flags, masks, (128, 256))
    ):
        if s > groups or (shift and columns):
            continue
        dtype = (torch.float16, torch.float32, torch.bfloat16)[number % 3]
        yield Case(*SIZES[number % len(SIZES)], groups, s, shift, columns, keep, block, dtype, seed=number)


ALL = list(cases())


def dense(case):
    return reference.binary_dequantize(*case.tensors(), *case.sizes()).double()


def error(got, want):
    return float((got.double() - want).norm() / want.norm().clamp(min=1e-30))


def by_isa(case, x, bias, isa, digits, threads=1):
    """Call the library with an instruction set of our choice."""
    parts = case.tensors()
    made = cpu.Prepared(parts, *case.sizes())
    out = torch.full((len(x), case.n), float("nan"), dtype=x.dtype)
    job = Job(ctypes.pointer(made.weight), None if bias is None else bias.data_ptr(), out.data_ptr())
    failed = LIBRARY.hflb_linear(
        ctypes.byref(job), 1, x.data_ptr(), DTYPES[x.dtype], len(x), digits, ISAS.index(isa), threads
    )
    assert failed == 0
    return out


def test_library_is_there_where_it_could_be_built():
    """Otherwise all that follows would be skipped in silence."""
    assert LIBRARY is not None or shutil.which("g++") is None, ISA


@needs_library
@pytest.mark.parametrize("isa", AVAILABLE)
@pytest.mark.parametrize(
    ("dtype", "digits", "tolerance"),
    [(torch.float32, 3, 3e-6), (torch.float16, 2, 1e-3), (torch.bfloat16, 2, 5e-3), (torch.float32, 2, 1e-4),
     (torch.float32, 1, 3e-2)],
    ids=["float32", "float16", "bfloat16", "16 bits", "8 bits"],
)  # fmt: skip
def test_product_of_every_variant(isa, dtype, digits, tolerance):
    assert len(ALL) > 50
    for case in ALL:
        x = torch.randn(3, case.m).to(dtype)
        bias = torch.randn(case.n).to(dtype) if case.n % 2 else None
        want = x.double() @ dense(case).T + (0 if bias is None else bias.double())
        got = by_isa(case, x, bias, isa, digits)
        assert error(got, want) < tolerance, case


@pytest.mark.skipif(not has_amx(), reason="this processor has no AMX")
def test_products_of_tiles():
    """Many tokens in bfloat16: odd rows, columns and tokens, every variant, and the same for any number of threads."""
    for number, case in enumerate(ALL):
        tokens = (1, 9, 16, 31, 40, 70)[number % 6]
        x = torch.randn(tokens, case.m).bfloat16()
        bias = torch.randn(case.n).bfloat16() if case.n % 2 else None
        parts = case.tensors()
        made = cpu.Prepared(parts, *case.sizes())
        outs = []
        for threads in (1, 2, 3):
            out = torch.full((tokens, case.n), float("nan"), dtype=torch.bfloat16)
            where = None if bias is None else bias.data_ptr()
            assert not LIBRARY.hflb_wide_amx(
                ctypes.byref(made.weight), x.data_ptr(), tokens, where, out.data_ptr(), threads
            )
            outs.append(out)
        rounded = dense(case).bfloat16().double()
        want = x.double() @ rounded.T + (0 if bias is None else bias.double())
        assert error(outs[0], want) < 4e-3, case
        assert all(torch.equal(out, outs[0]) for out in outs[1:])


@needs_library
def test_instruction_sets_agree():
    """The same integers, so only the order of float sums differs."""
    for case in ALL[::3]:
        x = torch.randn(2, case.m)
        outs = [by_isa(case, x, None, isa, 3) for isa in AVAILABLE]
        for out in outs[1:]:
            assert error(out, outs[0].double()) < 2e-6


@needs_library
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_result_does_not_depend_on_threads_or_on_other_tokens(dtype):
    case = Case(100, 640, 2, 2, columns=True, block=128)
    x = torch.randn(7, case.m).to(dtype)
    alone = torch.cat([by_isa(case, row[None], None, ISA, 2) for row in x])
    for threads in (1, 2, 3, 9):
        assert torch.equal(by_isa(case, x, None, ISA, 2, threads), alone)


@needs_library
@pytest.mark.parametrize("isa", AVAILABLE)
def test_unpacked_rows_are_those_of_the_reference(isa):
    for case in ALL:
        parts = case.tensors()  # which the prepared form points into
        made = cpu.Prepared(parts, *case.sizes())
        want = dense(case).float()
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            out = torch.full((case.n, case.m), float("nan"), dtype=dtype)
            args = (ctypes.byref(made.weight), 0, case.n, out.data_ptr(), DTYPES[dtype], 0, ISAS.index(isa), 1)
            assert LIBRARY.hflb_dequantize(*args) == 0
            assert torch.equal(out, want.to(dtype)), (case, dtype)


@needs_library
@pytest.mark.parametrize("tokens", [1, 3, cpu.MOST_TOKENS, cpu.MOST_TOKENS + 1, 70])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_op_takes_this_kernel_for_any_number_of_tokens(tokens, dtype):
    case = Case(300, 640, 2, 2, columns=True, block=128)
    x = torch.randn(tokens, case.m).to(dtype)
    want = x.double() @ dense(case).T
    args = case.linear_args(x, None)
    assert dispatch.choose(dtype, "cpu", case.tensors(), case.sizes()).name == "cpu"
    assert error(LINEAR(*args), want) < (1e-5 if dtype == torch.float32 else 1e-2)
    with dispatch.forced("reference"):
        by_reference = LINEAR(*args)
    assert error(by_reference, want) < (1e-5 if dtype == torch.float32 else 1e-2)
    with dispatch.forced("cpu-int8"):
        coarse = LINEAR(*args)
    if tokens <= cpu.MOST_TOKENS:
        assert 1e-4 < error(coarse, want) < 2e-2


@needs_library
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("tokens", [1, 40])
def test_what_is_not_finite_is_not_hidden(poison, tokens):
    case = Case(20, 130, 2, 1, columns=True, block=128)
    x = torch.randn(tokens, case.m)
    x[0, 7] = poison
    got = LINEAR(*case.linear_args(x, None))
    with dispatch.forced("reference"):
        want = LINEAR(*case.linear_args(x, None))
    assert torch.equal(got.isnan(), want.isnan())
    assert torch.equal(got[0].isinf(), want[0].isinf())
    assert torch.allclose(got[1:], want[1:], rtol=1e-4, atol=1e-5)


@needs_library
@pytest.mark.parametrize("scale", [0.0, 1e-42, 1e-38, 1e30])
def test_tiny_and_huge_activations(scale):
    case = Case(20, 256, 2, 2, columns=True, block=128)
    x = torch.randn(2, case.m) * scale
    got, want = LINEAR(*case.linear_args(x, None)), x.double() @ dense(case).T
    assert torch.isfinite(got).all()
    assert float((got.double() - want).abs().max()) <= 1e-5 * float(want.abs().max()) + 1e-36


@needs_library
def test_one_large_activation_does_not_drown_the_others():
    """Scales are those of 128 columns, so an outlier costs its own group only."""
    case = Case(20, 512, 1, block=128)
    x = torch.randn(1, case.m)
    x[0, 300] = 1e6
    W = dense(case)
    without = x.clone()
    without[0, 256:384] = 0
    got = LINEAR(*case.linear_args(without, None))
    assert error(got, without.double() @ W.T) < 1e-6


@needs_library
def test_odd_inputs():
    case = Case(20, 130, 2, 2, columns=True, block=128)
    wide = torch.randn(3, 260)
    strided = wide[:, ::2]
    assert error(LINEAR(*case.linear_args(strided, None)), strided.double() @ dense(case).T) < 1e-6
    shifted = torch.randn(3 * 130 + 1)[1:].view(3, 130)  # not aligned to 8 bytes
    assert error(LINEAR(*case.linear_args(shifted, None)), shifted.double() @ dense(case).T) < 1e-6
    for shape in ((0,), (2, 0), (0, 3)):
        assert LINEAR(*case.linear_args(torch.randn(*shape, 130), None)).shape == (*shape, 20)
    one = torch.randn(130)
    assert error(LINEAR(*case.linear_args(one, None)), one.double() @ dense(case).T) < 1e-6


@needs_library
@pytest.mark.parametrize(
    ("case", "reason"),
    [
        (Case(4, 256, 3, block=128), "more than two groups"),
        (Case(4, 256, 4, 2, block=128), "more than two groups"),
        (Case(4, 256, 2, block=64), "blocks of 64 columns, not a multiple of 128"),
        (Case(4, 256, 2, shift=True, columns=True, block=128), "row shifts together with column scales"),
    ],
)
def test_what_it_cannot_is_said_and_left_to_the_reference(case, reason):
    x = torch.randn(2, case.m)
    assert cpu.unsupported(torch.float32, case.tensors(), case.sizes()) == reason
    assert dispatch.choose(torch.float32, "cpu", case.tensors(), case.sizes()).name == "reference"
    assert error(LINEAR(*case.linear_args(x, None)), x.double() @ dense(case).T) < 1e-6
    message = f"'cpu' was asked for and cannot multiply: {reason}"
    with dispatch.forced("cpu"), pytest.raises(RuntimeError, match=message):
        LINEAR(*case.linear_args(x, None))


def test_an_absent_library_is_a_reason(monkeypatch):
    case = Case(4, 256, 2, block=128)
    monkeypatch.setattr(cpu, "load", lambda: (None, "it was not built"))
    assert cpu.unsupported(torch.float32, case.tensors(), case.sizes()) == "no compiled library: it was not built"
    found = dispatch.reasons(torch.float32, "cpu", case.tensors(), case.sizes())
    assert found["cpu"] == "cannot: no compiled library: it was not built"
    assert found["reference"].startswith("taken")
    x = torch.randn(2, case.m)
    assert error(LINEAR(*case.linear_args(x, None)), x.double() @ dense(case).T) < 1e-6


@needs_library
def test_reasons_name_one_kernel_that_is_taken():
    case = Case(4, 256, 2, block=128)
    found = dispatch.reasons(torch.float32, "cpu", case.tensors(), case.sizes())
    assert [name for name, text in found.items() if text.startswith("taken")] == ["cpu"]
    assert found["cpu-int8"].startswith("on request")
    on_gpu = dispatch.reasons(torch.float32, "cuda", case.tensors(), case.sizes())
    assert on_gpu["cpu"] == "cannot: tensors on cuda"
    assert on_gpu["triton"].startswith("cannot: ")  # the tensors of this case are on the CPU all the same
    assert found["triton"] == "cannot: tensors on cpu"
    double = dispatch.reasons(torch.float64, "cpu", case.tensors(), case.sizes())
    assert "activations of torch.float64" in double["cpu"]


def test_an_unknown_kernel_cannot_be_forced():
    with (
        pytest.raises(ValueError, match="unknown kernel 'gpu'; known: cpu, cpu-int8, triton, reference"),
        dispatch.forced("gpu"),
    ):
        pass


@needs_library
def test_prepared_form_follows_the_weight():
    """It is made once, again when a tensor changes in place, and freed with the weight."""
    case = Case(20, 256, 2, 2, columns=True, block=128)
    parts = case.tensors()
    first = cpu.prepared(parts, *case.sizes())
    assert cpu.prepared(parts, *case.sizes()) is first
    x = torch.randn(1, case.m)
    before = LINEAR(x, *parts, None, *case.sizes())
    parts[0].zero_()  # all signs are -1 now
    assert cpu.prepared(parts, *case.sizes()) is not first
    after = LINEAR(x, *parts, None, *case.sizes())
    with dispatch.forced("reference"):
        want = LINEAR(x, *parts, None, *case.sizes())
    assert error(after, want.double()) < 1e-6
    assert not torch.allclose(before, after)
    count = len(cpu._PREPARED)
    del parts, first
    assert len(cpu._PREPARED) == count - 1


@pytest.mark.slow
@pytest.mark.timeout(1200)  # compiling with the sanitizers takes minutes
@pytest.mark.skipif(shutil.which("g++") is None, reason="the sanitizers need a compiler")
def test_library_under_the_sanitizers(tmp_path):
    """Random weights in buffers of exact size; AddressSanitizer and UBSan end the program at the first slip."""
    here = Path(__file__).parent
    sources = sorted((Path(cpu.__file__).parent / "csrc").glob("*.cpp"))
    flags = ["-O1", "-g", "-std=c++17", "-fno-strict-aliasing", "-fopenmp", f"-I{sources[0].parent}"]
    checks = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    program = tmp_path / "sanitize"
    subprocess.run(["g++", *flags, *checks, *sources, here / "sanitize.cpp", "-o", program], check=True)
    done = subprocess.run([program, "400"], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout == "400\n"
