"""The kernels of format ``binary`` in Triton's interpreter, against the reference; no GPU needed.

The interpreter has to be switched on before Triton is imported, so ``test_triton_interpreter.py`` runs this file in a
process of its own. Alone: ``TRITON_INTERPRET=1 python -m pytest tests/kernels/triton/interpreted_binary.py``.

bfloat16 arithmetic is wrong in the interpreter, so bfloat16 inputs are multiplied in float32 here, as the kernels'
compile-time type allows; the 16-bit paths run in float16.
"""

import json

import pytest
import torch
from torch import Tensor

from hf_lowbit.kernels import reference, tuning
from hf_lowbit.kernels.triton import binary, tune
from hf_lowbit.kernels.tuning import Settings
from tests.kernels.triton.binary_cases import KINDS, Case, make

SMALL = Settings(32, 16, 4, 2)
# Sums of up to 500 terms of random sign in float32, in another order than the float64 sum: some 2^-24 of the norm of
# the result per root of the number of terms. 1e-5 leaves a factor of ten and catches a single wrong weight.
TOLERANCE = 1e-5


@pytest.fixture(autouse=True)
def poison_outputs():
    """Fill what is allocated and not written with NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def test_the_interpreter_is_on():
    assert binary.INTERPRETED


def dense(case: Case, dtype: torch.dtype) -> Tensor:
    """The weight as the reference rounds it for inputs of ``dtype``, float64."""
    return reference.binary_dequantize(*case.parts, *case.sizes).to(dtype).double()


def expected(x: Tensor, case: Case, bias: Tensor | None, compute: torch.dtype) -> Tensor:
    y = x.to(compute).double() @ dense(case, compute).T
    return y if bias is None else y + bias.to(compute).double()


def error(got: Tensor, want: Tensor) -> float:
    assert got.shape == want.shape
    return float((got.double() - want).norm() / want.norm())


def run(x, case, bias=None, settings=SMALL, splits=1, compute=torch.float32):
    weight = binary.weight_of(compute, *case.parts, *case.sizes)
    return binary.run(x, weight, bias, settings, splits, compute, torch.float32)


# (n, m, block): rows and columns that no tile divides, less than one group, more than three, padded planes, blocks of
# several groups, of less than one, of all columns, and of a number of planes that does not divide a group (48).
SHAPES = [(33, 300, 128), (17, 130, 128), (40, 300, 48), (70, 200, 256), (5, 450, 64), (34, 77, 100), (3, 272, 16)]


@pytest.mark.parametrize("compute", [torch.float32, torch.float16], ids=["plain", "packed"])
@pytest.mark.parametrize("number", range(len(KINDS)), ids=KINDS.keys())
def test_every_kind_of_weight(number, compute):
    kind = list(KINDS.values())[number]
    n, m, block = SHAPES[number % len(SHAPES)]
    case = make(kind, n, m, block, seed=number)
    x, bias = torch.randn(3, m), torch.randn(n)
    splits = 1 + (number + (compute == torch.float16)) % 2
    got = run(x, case, bias, splits=splits, compute=compute)
    assert error(got, expected(x, case, bias, compute)) < TOLERANCE


@pytest.mark.parametrize(
    ("name", "shape"), [*(("rtn", s) for s in SHAPES), *(("arb", s) for s in SHAPES[2:])], ids=str
)
def test_every_shape(name, shape):
    case = make(KINDS[name], *shape, seed=7)
    x = torch.randn(3, shape[1])
    assert error(run(x, case), expected(x, case, None, torch.float32)) < TOLERANCE


@pytest.mark.parametrize(("name", "share"), [("arb", 0.6), ("rc", 0.6), ("billm", 1.0), ("arb", 0.0)])
def test_many_and_few_salient_columns(name, share):
    case = make(KINDS[name], 17, 300, share=share)
    assert len(case.parts[5]) > (128 if share else 0)  # more than one group of gathered columns
    x = torch.randn(2, 300)
    assert error(run(x, case, splits=2), expected(x, case, None, torch.float32)) < TOLERANCE


@pytest.mark.parametrize("missing", [4, 7], ids=["first", "second"])
def test_column_scales_for_one_plane_of_salient_columns_only(missing):
    case = make(KINDS["rc"], 17, 150)
    case = Case(case.kind, _with(case.parts, missing, None), case.sizes)
    x = torch.randn(2, 150)
    assert error(run(x, case), expected(x, case, None, torch.float32)) < TOLERANCE


@pytest.mark.parametrize("batch", [0, 1, 3, 16, 33])
def test_every_batch(batch):
    case = make(KINDS["rc"], 33, 200)
    x, bias = torch.randn(batch, 200), torch.randn(33)
    got = run(x, case, bias, splits=2)
    assert got.shape == (batch, 33)
    assert not batch or error(got, expected(x, case, bias, torch.float32)) < TOLERANCE


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_every_dtype_of_scales(dtype):
    case = make(KINDS["everything"], 17, 150, dtype=dtype)
    x = torch.randn(2, 150)
    assert error(run(x, case), expected(x, case, None, torch.float32)) < TOLERANCE


def test_inputs_in_bfloat16():
    case = make(KINDS["arb"], 17, 150)
    x, bias = torch.randn(2, 150).bfloat16(), torch.randn(17).bfloat16()
    assert error(run(x, case, bias), expected(x, case, bias, torch.float32)) < TOLERANCE


@pytest.mark.parametrize("name", ["rtn", "rc"])
def test_strides_and_leading_dimensions(name):
    m = 150
    case = make(KINDS[name], 17, m)
    spread = torch.randn(4, 2 * m)[:, ::2]
    for x in (torch.randn(m, 4).T, spread, torch.randn(1, m).expand(4, m), torch.randn(3, 2, m), torch.randn(m)):
        want = expected(x.reshape(-1, m), case, None, torch.float32).view(*x.shape[:-1], 17)
        assert error(run(x, case), want) < TOLERANCE
    assert run(torch.randn(2, 0, m), case).shape == (2, 0, 17)


@pytest.mark.parametrize("splits", [2, 3, 4])
def test_pieces_add_up_and_repeat_bit_for_bit(splits):
    case = make(KINDS["rc"], 33, 450)
    x, bias = torch.randn(3, 450), torch.randn(33)
    got = run(x, case, bias, splits=splits)
    assert error(got, expected(x, case, bias, torch.float32)) < TOLERANCE
    assert torch.equal(got, run(x, case, bias, splits=splits))


@pytest.mark.parametrize("name", ["rtn", "rc", "rc-2:4"])
@pytest.mark.parametrize("compute", [torch.float32, torch.float16], ids=["plain", "packed"])
def test_not_a_number_and_infinity_come_out_where_the_reference_has_them(name, compute):
    m = 150
    case = make(KINDS[name], 17, m)
    x = torch.randn(5, m)
    x[1, 3] = float("nan")
    x[2, 0] = float("inf")  # a salient column, where there are any
    x[3, m - 1] = -float("inf")
    got, want = run(x, case, compute=compute), expected(x, case, None, compute)
    assert torch.equal(got.isnan(), want.isnan())
    assert torch.equal(got.isinf(), want.isinf())
    assert torch.equal(got[want.isinf()], want[want.isinf()].float())
    assert got[[0, 4]].isfinite().all()


def inside(tensor: Tensor | None, margin: int = 4096) -> Tensor | None:
    """The same tensor in the middle of memory that is all NaN, or all ones, before and after it."""
    if tensor is None:
        return None
    beyond = float("nan") if tensor.is_floating_point() else torch.iinfo(tensor.dtype).max
    memory = torch.full((tensor.numel() + 2 * margin,), beyond, dtype=tensor.dtype)
    memory[margin:-margin] = tensor.flatten()
    return memory[margin:-margin].view(tensor.shape)


@pytest.mark.parametrize("compute", [torch.float32, torch.float16], ids=["plain", "packed"])
@pytest.mark.parametrize("name", ["rtn", "rc", "everything"])
def test_nothing_outside_of_the_tensors_counts(name, compute, monkeypatch):
    case = make(KINDS[name], 17, 150, 48)
    guarded = Case(case.kind, tuple(map(inside, case.parts)), case.sizes)
    x, bias = inside(torch.randn(3, 150)), inside(torch.randn(17))
    written = []
    new_empty = Tensor.new_empty

    def with_margins(self, size, **options):
        if size == 0:  # the interpreter's own
            return new_empty(self, size, **options)
        written.append(inside(new_empty(self, size, **options)))
        return written[-1]

    monkeypatch.setattr(Tensor, "new_empty", with_margins)
    got = run(x, guarded, bias, splits=2, compute=compute)
    monkeypatch.undo()
    assert error(got, expected(x, case, bias, compute)) < TOLERANCE
    assert len(written) == (2 if case.parts[5] is None else 3)  # result, partial sums, gathered inputs
    for out in written:
        memory = torch.as_strided(out, (out.untyped_storage().nbytes() // out.itemsize,), (1,), 0)
        assert memory[:4096].isnan().all()
        assert memory[-4096:].isnan().all()


def test_padding_bits_of_planes_and_inputs_beyond_the_last_column_do_not_count():
    case = make(KINDS["rtn"], 17, 150)
    sign = case.parts[0].clone()
    sign[:, 18:] |= 0xF0  # bits 4 to 7 of the second group: columns 192 and up, none of which exists
    wide = torch.full((3, 256), float("nan"))
    wide[:, :150] = torch.randn(3, 150)
    dirty = Case(case.kind, (sign, *case.parts[1:]), case.sizes)
    assert not torch.equal(sign, case.parts[0])
    assert error(run(wide[:, :150], dirty), expected(wide[:, :150], case, None, torch.float32)) < TOLERANCE


@pytest.mark.parametrize("settings", [(16, 16), (64, 32), (128, 64)], ids=str)
def test_tiles_larger_and_smaller_than_the_problem(settings):
    case = make(KINDS["billm"], 40, 140)
    x = torch.randn(20, 140)
    got = run(x, case, settings=Settings(*settings, 4, 2))
    assert error(got, expected(x, case, None, torch.float32)) < TOLERANCE


# The public function ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["rtn", "rc-2:4"])
def test_binary_linear_with_shipped_settings(name):
    case = make(KINDS[name], 40, 260)
    x, bias = torch.randn(2, 260), torch.randn(40)
    assert binary.supports(x, *case.parts, bias, *case.sizes) == (True, "")
    got = binary.binary_linear(x, *case.parts, bias, *case.sizes)
    assert got.dtype == torch.float32
    assert error(got, reference.binary_linear(x, *case.parts, bias, *case.sizes).double()) < TOLERANCE


def test_the_result_has_the_dtype_of_the_input():
    case = make(KINDS["rc"], 40, 260)
    x = torch.randn(2, 260).half()
    got = binary.binary_linear(x, *case.parts, None, *case.sizes)
    assert got.dtype == torch.float16
    # the result is rounded once: at most 2^-11 of it
    assert error(got, expected(x, case, None, torch.float16)) < 2.0**-11


def test_changed_weights_are_noticed():
    case = make(KINDS["rc-2:4"], 17, 256, dtype=torch.float32)
    x = torch.randn(2, 256)
    run(x, case)
    case.parts[0].bitwise_xor_(0b1000)  # signs: the compute form is stale
    case.parts[4].mul_(2)  # column scales
    assert error(run(x, case), expected(x, case, None, torch.float32)) < TOLERANCE


# name: (kind, what is changed, the reason)
REFUSED = {
    "dtype": ("rtn", lambda parts, sizes: (parts, sizes, torch.float64), r"x is torch\.float64"),
    "block": ("rtn", lambda parts, sizes: (parts, (300, 40, 0, 0), None), "block_size 40 is not a multiple of 16"),
    "blocks": ("rtn", lambda parts, sizes: (parts, (300, 64, 0, 0), None), r"row_scale has shape .* expected"),
    "mask": ("rtn", lambda parts, sizes: (parts, (300, 128, 2, 4), None), "there is no mask"),
    "strides": ("rtn", lambda parts, sizes: (_with(parts, 1, _strided(parts[1])), sizes, None), "row_scale is not"),
    "scale": ("rtn", lambda parts, sizes: (_with(parts, 1, parts[1].double()), sizes, None), "row_scale is torch"),
    "device": ("rtn", lambda parts, sizes: (_with(parts, 1, parts[1].to("meta")), sizes, None), "scale is on meta"),
    "address": (
        "rtn",
        lambda parts, sizes: (_with(parts, 0, _shifted(parts[0])), sizes, None),
        "starts at an address",
    ),
    "shape": ("rc", lambda parts, sizes: (_with(parts, 5, parts[5][:-1]), sizes, None), "col_scale2 has shape"),
    "planes": ("rc", lambda parts, sizes: (_with(parts, 2, parts[2].repeat(3, 1, 1)), sizes, None), "3 group planes"),
    "second": ("rc", lambda parts, sizes: (_with(parts, 6, None), sizes, None), "without a second plane"),
    "codes": ("rc", lambda parts, sizes: (_ungrouped(parts), sizes, None), "2 groups of salient columns without"),
    "index": ("rc", lambda parts, sizes: (_with(parts, 5, parts[5].long()), sizes, None), "salient is torch.int64"),
}


def _with(parts, number, part):
    return (*parts[:number], part, *parts[number + 1 :])


def _ungrouped(parts):
    """Two salient groups and one plain one, and no plane that says which."""
    return (parts[0], parts[1][:5], None, *parts[3:])


def _strided(tensor):
    return torch.stack([tensor, tensor], dim=-1)[..., 0]


def _shifted(tensor):
    return torch.cat([tensor.new_zeros(1), tensor.flatten()])[1:].view(tensor.shape)


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_supported_is_refused_with_the_reason(name):
    kind, change, reason = REFUSED[name]
    case = make(KINDS[kind], 17, 300)
    x = torch.randn(2, 300)
    assert binary.supports(x, *case.parts, None, *case.sizes) == (True, "")
    parts, sizes, dtype = change(case.parts, case.sizes)
    assert not binary.supports(x.to(dtype or x.dtype), *parts, None, *sizes)[0]
    with pytest.raises(NotImplementedError, match=reason):
        binary.binary_linear(x.to(dtype or x.dtype), *parts, None, *sizes)


def test_sizes_that_cannot_be_addressed_are_refused():
    rows, columns = 2**20, 2**14
    sign = torch.empty((1, columns // 8), dtype=torch.uint8).expand(rows, -1)
    scale = torch.empty((1, 1, 1), dtype=torch.float16).expand(1, 1, rows)
    parts = (sign, scale, None, None, None, None, None, None, None)
    assert "at most 2147483647" in binary.unsupported(torch.float16, parts, (columns, columns, 0, 0))
    case = make(KINDS["rtn"], 17, 16)
    x = torch.empty((1, 16)).expand(2**30, 16)
    assert "tokens are too many" in binary.supports(x, *case.parts, None, *case.sizes)[1]


@pytest.mark.parametrize(("batch", "blocks"), [(1, {16}), (40, {16, 32, 64}), (5000, {64, 128, 256})])
def test_candidates_have_tiles_for_the_batch(batch, blocks):
    assert {settings.block_m for settings in tune.candidates(batch)} == blocks


def test_tuning_writes_the_fastest_settings(tmp_path):
    calls = []

    def clock(call):
        calls.append(call())
        return float(-len(calls))  # the last one wins

    path = tmp_path / "binary.some-gpu.json"
    few = [*tune.candidates(1), tuning.choose("binary", (), 32, 1, 16, 128)]
    rows = tune.tune("cpu", [(16, 128)], path, batches=[1], dtype=torch.float32, clock=clock)
    assert json.loads(path.read_text()) == rows
    (row,) = tuning.parse(rows, "test")
    assert (row.bits, row.batch, row.out_features, row.in_features) == (32, 1, 16, 128)
    assert row.settings.block_n == 128  # of the last candidate
    assert len(calls) == len({(s.block_n, s.block_m, s.num_warps, s.num_stages) for s in few})
    assert all(call.shape == (1, 16) for call in calls)


@pytest.mark.slow
def test_a_larger_weight():
    case = make(KINDS["rc"], 512, 2048)
    x, bias = torch.randn(16, 2048), torch.randn(512)
    for compute in (torch.float32, torch.float16):
        got = run(x, case, bias, settings=Settings(64, 16, 4, 3), splits=4, compute=compute)
        assert error(got, expected(x, case, bias, compute)) < TOLERANCE
