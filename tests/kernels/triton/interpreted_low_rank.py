"""The kernels of format ``low_rank`` in Triton's interpreter, against float64; no GPU needed.

Run by ``test_triton_interpreter.py``; alone: ``TRITON_INTERPRET=1 python -m pytest`` and this file. bfloat16
arithmetic is wrong in the interpreter, so bfloat16 inputs are multiplied in float32 here; the 16-bit way runs in
float16.
"""

import itertools

import pytest
import torch

from hf_lowbit.kernels.triton import low_rank
from hf_lowbit.kernels.triton.low_rank import Shape

SMALL = Shape(block_r=16, block_n=16, block_k=32, block_m=16, shares=1)
# rows, rank, columns: ones, less than a tile, whole tiles, ragged ends, several groups of ranks
CASES = [(1, 1, 1), (5, 3, 7), (16, 16, 32), (33, 17, 45), (64, 40, 130), (130, 64, 16)]
# Sums of some hundred terms in float32: 2^-24 of the norm for each root of their number, with room.
TOLERANCE = 1e-5


@pytest.fixture(autouse=True)
def poison_outputs():
    """Fill what is allocated and not written with NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def factors(n, r, m, held=torch.float32):
    """Factors with NaN right behind them, which a slip past the last number would read."""
    found = []
    for rows, columns in ((n, r), (r, m)):
        store = torch.full((rows * columns + 4096,), torch.nan, dtype=held)
        found.append(store[: rows * columns].view(rows, columns))
        found[-1].copy_(torch.randn(rows, columns))
    return found


def error(got, x, up, down, bias, compute):
    middle = (x.to(compute).double() @ down.to(compute).double().T).to(compute).double()
    want = middle @ up.to(compute).double().T
    want = want if bias is None else want + bias.to(compute).double()
    assert got.shape == want.shape
    return float((got.double() - want).norm() / want.norm())


def test_the_interpreter_is_on():
    assert low_rank.interpreted()
    assert low_rank.unsupported(torch.float32, *factors(3, 2, 4)) is None


@pytest.mark.parametrize("case", CASES, ids=str)
def test_odd_shapes(case):
    n, r, m = case
    up, down = factors(n, r, m)
    for tokens, bias, shape in itertools.product(
        (1, 3, 17), (None, torch.randn(n)), (SMALL, Shape(32, 16, 16, 16, 3), Shape(64, 32, 64, 32, 2), None)
    ):
        x = torch.randn(tokens, m)
        got = low_rank.run(x, up, down, bias, shape)
        assert got.dtype == torch.float32
        assert error(got, x, up, down, bias, torch.float32) < TOLERANCE, (tokens, shape)


@pytest.mark.parametrize("held", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision(held):
    """float16 products of float16 numbers are exact in float32; the middle and the result are rounded once, 2^-11."""
    up, down = factors(33, 40, 45, held)
    x, bias = torch.randn(5, 45).half(), torch.randn(33)
    got = low_rank.run(x, up, down, bias, SMALL)
    assert got.dtype == torch.float16
    assert error(got, x, up, down, bias, torch.float16) < 2.0**-11


def test_bfloat16_inputs_with_float32_products():
    up, down = factors(33, 20, 45, torch.bfloat16)
    x = torch.randn(2, 3, 45).bfloat16()
    got = low_rank.run(x, up, down, None, SMALL, torch.float32)
    assert got.shape == (2, 3, 33)
    assert error(got.view(6, 33), x.view(6, 45), up, down, None, torch.float32) < 2.0**-8  # the result is rounded


def test_strides_and_nothing_to_do():
    up, down = factors(20, 7, 24)
    wide = torch.randn(9, 60)
    for x in (wide[:, 5:29], wide[:, ::2][:, :24], torch.randn(24, 9).T, torch.randn(24)):
        got = low_rank.run(x, up, down, None, SMALL)
        rows = x.reshape(-1, 24)
        assert error(got.reshape(-1, 20), rows, up, down, None, torch.float32) < TOLERANCE
    assert low_rank.run(torch.randn(0, 24), up, down, None).shape == (0, 20)


def test_equal_bits_in_every_run():
    up, down = factors(40, 50, 60)
    x = torch.randn(4, 60)
    assert torch.equal(low_rank.run(x, up, down, None, SMALL), low_rank.run(x, up, down, None, SMALL))


def test_what_cannot_be_multiplied_is_said():
    up, down = factors(20, 7, 24)
    assert "float64" in low_rank.unsupported(torch.float64, up, down)
    assert low_rank.unsupported(torch.float32, up[:, ::2], down) == "factors are not contiguous"
    with pytest.raises(NotImplementedError, match="low_rank_linear in Triton: x is torch"):
        low_rank.low_rank_linear(torch.randn(1, 24).double(), up, down, None)


@pytest.mark.parametrize(("rows", "rank", "tokens"), [(1, 1, 1), (576, 115, 1), (4096, 819, 16), (4096, 819, 32)])
@pytest.mark.parametrize("cores", [1, 132])
def test_every_rank_and_row_has_its_program(rows, rank, tokens, cores):
    shape = low_rank.shape_of(rows, rank, tokens, cores, torch.float16)
    x, up, down = torch.empty(tokens, 64), torch.empty(rows, rank), torch.empty(rank, 64)
    per_share = low_rank.kernel_arguments(x, up, down, None, x, shape, torch.float16)["rows_per_share"]
    assert per_share * shape.shares >= rows
    assert shape.groups(rank) * shape.block_r >= rank
