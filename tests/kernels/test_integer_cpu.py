"""Compiled products with packed integers against the reference: every form, odd sizes; what they cannot, they say."""

import shutil
import subprocess
from pathlib import Path

import pytest
import torch

import hf_lowbit.kernels.cpu.activation as cpu_activation
import hf_lowbit.kernels.cpu.integer as cpu
from hf_lowbit.kernels import activation, choice, integer, rounding
from hf_lowbit.kernels.activation import Sizes
from tests.kernels.compiled import needs

LIBRARY, ISA = cpu.load()
needs_library = needs(cpu.load)
AVAILABLE = cpu.ISAS[: cpu.ISAS.index(ISA) + 1] if LIBRARY is not None else ()
LINEAR = torch.ops.hf_lowbit.integer_linear
DTYPES = (torch.float16, torch.float32, torch.bfloat16)
# out_features, in_features: one row, odd rows, columns that end within a byte, a vector, a group
SHAPES = [(1, 16), (5, 40), (33, 640), (17, 131), (40, 1000)]
GROUPS = (0, 16, 32, 48, 64, 128, 256)


def weight(n, m, bits, group, symmetric, dtype=torch.float16):
    groups = -(-m // group) if group else 1
    zero = None if symmetric else integer.pack_codes(torch.randint(0, 2**bits, (n, groups)), bits)
    scale = (torch.rand(n, groups) + 0.1).to(dtype)
    return (integer.pack_codes(torch.randint(0, 2**bits, (n, m)), bits), scale, zero), (m, bits, group)


def cases():
    for bits in integer.BITS:
        for number, (n, m) in enumerate(SHAPES):
            for place, group in enumerate(GROUPS):
                case = weight(n, m, bits, group, (number + place) % 2, DTYPES[(number + place) % 3])
                if cpu.unsupported(torch.float32, *case) is None:
                    yield case


def dense(case):
    return integer._rebuilt(*case).double()


def error(got, want):
    """Of the largest value: of few outputs one may be a sum in which almost all cancels."""
    return float((got.double() - want).abs().max() / want.abs().max().clamp(min=1e-30))


@pytest.fixture
def isa(request, monkeypatch):
    """Make the wrappers use an instruction set of our choice."""
    monkeypatch.setattr(cpu, "load", lambda: (LIBRARY, request.param))
    return request.param


every_isa = pytest.mark.parametrize("isa", AVAILABLE, indirect=True)


def test_library_is_there_where_it_could_be_built():
    """Otherwise all that follows would be skipped in silence."""
    assert LIBRARY is not None or shutil.which("g++") is None, ISA


@needs_library
@every_isa
@pytest.mark.parametrize(
    ("dtype", "digits", "tolerance"),
    [(torch.float32, 3, 3e-6), (torch.float16, 2, 1e-3), (torch.bfloat16, 2, 8e-3), (torch.float32, 1, 5e-2)],
    ids=["float32", "float16", "bfloat16", "8 bits"],
)
def test_product_of_every_form(isa, dtype, digits, tolerance):
    torch.manual_seed(0)
    found = list(cases())
    assert len(found) > 100
    for number, case in enumerate(found):
        x = torch.randn((1, 2, 3, 7)[number % 4], case[1][0]).to(dtype)
        bias = torch.randn(case[0][0].shape[0]).to(dtype) if number % 2 else None
        want = x.double() @ dense(case).T + (0 if bias is None else bias.double())
        assert error(cpu.linear(x, case[0], bias, case[1], digits), want) < tolerance, (case[1], number)


@needs_library
@every_isa
def test_unpacked_rows_are_those_of_the_reference(isa):
    torch.manual_seed(0)
    for case in cases():
        made, kept = cpu.weight_of(*case)
        for dtype in DTYPES:
            out = torch.full((kept[0].shape[0], case[1][0]), float("nan"), dtype=dtype)
            cpu.unpack_rows(made, 0, len(out), out)
            assert torch.equal(out, integer._rebuilt(*case).to(dtype)), (case[1], dtype)


@pytest.mark.skipif(not cpu.has_amx(), reason="this processor has no AMX")
def test_products_of_tiles():
    """Some more tokens: each digit is a token of its own."""
    torch.manual_seed(0)
    taken = 0
    for bits in integer.BITS:
        for n, m, group in ((5, 40, 0), (130, 640, 64), (7, 640, 32), (33, 1008, 16), (40, 384, 128), (3, 33, 0)):
            for dtype, tokens in ((torch.float32, 9), (torch.bfloat16, 40), (torch.float16, 4)):
                case = weight(n, m, bits, group, n % 2)
                x, bias = torch.randn(tokens, m).to(dtype), torch.randn(n).to(dtype)
                want = x.double() @ dense(case).T + bias.double()
                tolerance = 3e-6 if dtype is torch.float32 else 8e-3
                assert error(cpu.linear(x, case[0], bias, case[1]), want) < tolerance, (case[1], n)
                taken += 1
    assert taken == 72


@needs_library
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_result_does_not_depend_on_threads_or_on_other_tokens(dtype):
    torch.manual_seed(0)
    case, before = weight(101, 640, 4, 64, False), torch.get_num_threads()
    x = torch.randn(3, 640).to(dtype)
    more = torch.randn(70, 640).to(dtype)
    alone = torch.cat([cpu.linear(row[None], case[0], None, case[1]) for row in x])
    sizes = Sizes(*case[1], 128, "token_group", 8, 64)
    rounded = activation.TABLE.choose(dtype, "cpu", case[0], sizes)
    tensors = (*case[0], None, None, None, None)
    wide, tiles = cpu.linear(more, case[0], None, case[1]), rounded.linear(more, tensors, sizes)
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert torch.equal(cpu.linear(x, case[0], None, case[1]), alone)
            assert torch.equal(
                cpu.linear(more[:8], case[0], None, case[1]), cpu.linear(more[:9], case[0], None, case[1])[:8]
            )
            assert error(cpu.linear(more, case[0], None, case[1]), wide.double()) < 1e-2
            assert torch.equal(rounded.linear(more, tensors, sizes), tiles)
    finally:
        torch.set_num_threads(before)


@needs_library
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [1, 5, 17, 70, 300])
def test_op_takes_this_kernel_for_any_number_of_tokens(tokens, dtype):
    torch.manual_seed(0)
    parts, sizes = case = weight(300, 640, 4, 64, False)
    x = torch.randn(2, tokens, 640).to(dtype)
    want = x.double() @ dense(case).T
    assert integer.TABLE.choose(dtype, "cpu", parts, sizes).name == "cpu"
    tolerance = 3e-6 if dtype is torch.float32 else 1e-2
    assert error(LINEAR(x, *parts, None, *sizes), want) < tolerance
    with choice.forced("reference"):
        assert error(LINEAR(x, *parts, None, *sizes), want) < tolerance
    with choice.forced("cpu-int8"):
        assert error(LINEAR(x[:, :1], *parts, None, *sizes), want[:, :1]) < 5e-2


@needs_library
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("tokens", [1, 8, 100])
def test_what_is_not_finite_is_not_hidden(poison, tokens):
    parts, sizes = weight(20, 160, 4, 32, True)
    x = torch.randn(tokens, 160)
    x[0, 7] = poison
    rounding = Sizes(*sizes, 32, "token_group", 4, 32)
    for product in (
        lambda: LINEAR(x, *parts, None, *sizes),
        lambda: torch.ops.hf_lowbit.integer_act_linear(x, *parts, None, None, None, None, *rounding),
    ):
        got = product()
        with choice.forced("reference"):
            want = product()
        assert torch.equal(got.isfinite(), want.isfinite())
        assert torch.allclose(got[1:], want[1:], rtol=1e-3, atol=1e-3)


@needs_library
@pytest.mark.parametrize("scale", [0.0, 1e-42, 1e-38, 1e30])
def test_tiny_and_huge_activations(scale):
    case = weight(20, 256, 3, 64, False)
    x = torch.randn(2, 256) * scale
    got, want = cpu.linear(x, case[0], None, case[1]), x.double() @ dense(case).T
    assert torch.isfinite(got).all()
    assert float((got.double() - want).abs().max()) <= 1e-5 * float(want.abs().max()) + 1e-26


@needs_library
def test_odd_inputs():
    parts, sizes = case = weight(20, 130, 8, 0, False)
    wide = torch.randn(3, 260)
    assert error(cpu.linear(wide[:, ::2], parts, None, sizes), wide[:, ::2].double() @ dense(case).T) < 3e-6
    shifted = torch.randn(3 * 130 + 1)[1:].view(3, 130)  # not aligned to 8 bytes
    assert error(cpu.linear(shifted, parts, None, sizes), shifted.double() @ dense(case).T) < 3e-6
    rounding = Sizes(*sizes, 0, "token", 8, 0)
    for shape in ((0,), (2, 0), (0, 3)):
        assert LINEAR(torch.randn(*shape, 130), *parts, None, *sizes).shape == (*shape, 20)
        made = activation.integer_act_linear(torch.randn(*shape, 130), (*parts, None, None, None, None), rounding)
        assert made.shape == (*shape, 20)
    assert LINEAR(torch.randn(130), *parts, None, *sizes).shape == (20,)
    transposed = parts[1].T.contiguous().T  # scales that do not lie row by row
    assert error(cpu.linear(wide[:, :130], (parts[0], transposed, parts[2]), None, sizes),
                 wide[:, :130].double() @ dense(case).T) < 3e-6  # fmt: skip


@needs_library
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"group": 20}, "groups of 20 columns, not a multiple of 8"),
        ({"packed": lambda p: p[:, :-1]}, r"packed is torch.uint8 \(4, 127\), expected torch.uint8 \(4, 128\)"),
        ({"scale": lambda s: s[:, :-1]}, r"scale is torch.float16 \(4, 3\), expected torch.float16 \(4, 4\)"),
        ({"zero": lambda z: z[:-1]}, r"zero_point is torch.uint8 \(3, 2\)"),
        ({"scale": lambda s: s.double()}, "scales of torch.float64"),
    ],
    ids=["group", "columns of codes", "columns of scales", "rows of zero points", "dtype of scales"],
)
def test_what_it_cannot_is_said_and_nothing_of_it_reaches_the_library(change, reason):
    (packed, scale, zero), sizes = weight(4, 256, 4, change.get("group", 64), False)
    parts = tuple(
        change.get(name, lambda p: p)(p) for name, p in (("packed", packed), ("scale", scale), ("zero", zero))
    )
    with (
        choice.forced("cpu"),
        pytest.raises(RuntimeError, match=f"'cpu' was asked for and cannot multiply: .*{reason}"),
    ):
        integer.TABLE.choose(torch.float32, "cpu", parts, sizes)
    assert integer.TABLE.choose(torch.float32, "cpu", parts, sizes).name == "reference"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"packed": torch.zeros(8, 31, dtype=torch.uint8)},
            r"packed is torch.uint8 \(8, 31\), expected uint8 \(8, 32\)",
        ),
        (
            {"packed": torch.zeros(8, 64, dtype=torch.uint8)},
            r"packed is torch.uint8 \(8, 64\), expected uint8 \(8, 32\)",
        ),
        ({"packed": torch.zeros(8, 32, dtype=torch.int32)}, "packed is torch.int32"),
        ({"scale": torch.ones(8)}, r"scale is torch.float32 \(8,\), expected floating \(8, 2\)"),
        ({"scale": torch.ones(8, 1)}, r"scale is torch.float32 \(8, 1\)"),  # which torch would broadcast
        ({"scale": torch.ones(8, 2, dtype=torch.int32)}, "scale is torch.int32"),
        (
            {"zero": torch.zeros(8, 2, dtype=torch.uint8)},
            r"zero_point is torch.uint8 \(8, 2\), expected uint8 \(8, 1\)",
        ),
        ({"zero": torch.zeros(8, 1)}, r"zero_point is torch.float32 \(8, 1\), expected floating \(8, 2\)"),
        ({"bits": 5}, "no weight has 64 columns in groups of 32 with 5 bits"),
        ({"group": -1}, "no weight has 64 columns in groups of -1 with 4 bits"),
        ({"columns": -64}, "no weight has -64 columns"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_no_op_reads_beyond_a_weight(changes, message):
    given = {"packed": torch.zeros(8, 32, dtype=torch.uint8), "scale": torch.ones(8, 2), "zero": None}
    given |= {"columns": 64, "bits": 4, "group": 32} | changes
    parts, sizes = (
        [given[name] for name in ("packed", "scale", "zero")],
        [given[n] for n in ("columns", "bits", "group")],
    )
    x = torch.randn(3, 64)
    with pytest.raises(RuntimeError, match=f"integer_linear: {message}"):
        LINEAR(x, *parts, None, *sizes)
    with pytest.raises(RuntimeError, match=f"integer_dequantize: {message}"):
        torch.ops.hf_lowbit.integer_dequantize(*parts, *sizes)
    with pytest.raises(RuntimeError, match=f"integer_act_linear: {message}"):
        torch.ops.hf_lowbit.integer_act_linear(x, *parts, None, None, None, None, *sizes, 0, "token", 4, 0)


def test_an_absent_library_is_a_reason(monkeypatch):
    parts, sizes = case = weight(4, 256, 4, 64, True)
    monkeypatch.setattr(cpu, "load", lambda: (None, "it was not built"))
    assert integer.TABLE.reasons(torch.float32, "cpu", parts, sizes)["cpu"] == (
        "cannot: no compiled library: it was not built"
    )
    x = torch.randn(2, 256)
    assert error(LINEAR(x, *parts, None, *sizes), x.double() @ dense(case).T) < 3e-6
    rounding = Sizes(*sizes, 0, "token", 8, 0)
    assert activation.TABLE.reasons(torch.float32, "cpu", parts, rounding)["reference"].startswith("taken")


# Rounded activations ---------------------------------------------------------------------------------------------

ROTATED = [(5, 40, 0), (33, 640, 128), (17, 1536, 1536), (130, 192, 64), (20, 720, 20), (7, 144, 36), (9, 256, 8)]
SCALED = [(0, 0), (64, 64), (32, 64), (128, 32), (16, 16), (48, 16), (64, 0), (0, 32)]


@needs_library
@every_isa
@pytest.mark.parametrize("bits", integer.BITS)
def test_rounded_rows_and_their_products(isa, bits):
    """Codes are those of the definition but where float32 decides a tie; the product of codes is exact to its sums."""
    torch.manual_seed(0)
    for number, ((n, m, rotation), (group, act_group)) in enumerate((a, b) for a in ROTATED for b in SCALED):
        parts, own = case = weight(n, m, bits, group, number % 2, DTYPES[number % 3])
        mode = "token_group" if act_group else "token"
        sizes = Sizes(*own, rotation, mode, (4, 8, 2, 6)[number % 4], act_group)
        if cpu_activation.unsupported(parts, sizes) is not None:
            continue
        smooth = (torch.rand(m) + 0.5).half() if number % 5 < 2 else None
        signs = (torch.randint(0, 2, (m,)) * 2 - 1).to(torch.int8) if number % 3 else None
        dtype = DTYPES[number // 3 % 3]
        x = (torch.randn((1, 3, 9, 33)[number % 4], m) * torch.randn(m).exp()).to(dtype)
        made = cpu_activation.round_rows(x, smooth, signs, sizes)
        rows = rounding.transform(x, smooth, signs, rotation)
        want = rounding.quantize_activation(rows, mode, sizes.act_bits, act_group)
        steps = (made[0].int() - want.codes.int()).abs()
        assert int(steps.max()) <= 1 and float(steps.float().mean()) < 1e-3, (case[1], sizes)
        torch.testing.assert_close(made[1], want.token, rtol=3e-6, atol=0)
        grid = rounding.ActivationCodes(*made, None, want.group_size).dequantized().double()
        bias = torch.randn(n).to(dtype) if number % 2 else None
        exact = grid @ dense(case).T + (0 if bias is None else bias.double())
        out = cpu_activation.product(*made, act_group, parts, bias, own, torch.float32)
        assert error(out, exact) < 1e-5, (case[1], sizes)
        through_op = activation.integer_act_linear(x, (*parts, bias, smooth, signs, None), sizes)
        assert through_op.dtype == dtype
        assert error(through_op, exact) < (1e-5 if dtype is torch.float32 else 1e-2)


@needs_library
@pytest.mark.parametrize("mode", rounding.MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_mode_has_a_kernel(mode, dtype):
    """What cannot be multiplied as integers is still multiplied by packed codes."""
    torch.manual_seed(0)
    parts, own = weight(24, 192, 4, 32, False)
    sizes = Sizes(*own, 64, mode, 8, 32 if mode == "token_group" else 0)
    bounds = torch.tensor([-2.0, 2.5]) if mode == "static" else None
    tensors = (*parts, torch.randn(24).to(dtype), torch.rand(192).half() + 0.5, None, bounds)
    x = torch.randn(2, 5, 192).to(dtype)
    assert activation.TABLE.choose(dtype, "cpu", parts, sizes).name == "cpu"
    got = activation.integer_act_linear(x, tensors, sizes)
    with choice.forced("reference"):
        want = activation.integer_act_linear(x, tensors, sizes)
    assert error(got, want.double()) < (
        2e-3 if dtype is torch.float32 else 1e-2
    )  # a code of a few may be the next one


@pytest.mark.slow
@pytest.mark.timeout(2400)  # compiling with the sanitizers takes minutes
@pytest.mark.skipif(shutil.which("g++") is None, reason="the sanitizers need a compiler")
def test_library_under_the_sanitizers(tmp_path):
    """Random weights in buffers of exact size; AddressSanitizer and UBSan end the program at the first slip."""
    here = Path(__file__).parent
    sources = sorted((Path(cpu.__file__).parent / "csrc").glob("integer_*.cpp"))
    flags = ["-O1", "-g", "-std=c++17", "-fno-strict-aliasing", "-fopenmp", f"-I{sources[0].parent}"]
    checks = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    program = tmp_path / "sanitize"
    subprocess.run(["g++", *flags, *checks, *sources, here / "sanitize_integer.cpp", "-o", program], check=True)
    done = subprocess.run([program, "400"], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout == "400\n"
