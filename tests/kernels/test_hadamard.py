"""Hadamard matrices: orders of layers that exist, products with them, what there is no matrix for."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from hf_lowbit.numerics.rotation import BLOCKS, block_order, core_of, full_order, hadamard, random_signs, rotate

# columns of linear layers in diffusers' transformers, and the core that each needs
LAYERS = {
    1152: 36, 4608: 36, 3072: 12, 12288: 12, 1536: 12, 8960: 140, 15360: 60, 1920: 60, 7680: 60, 5120: 20, 13824: 108,
    2304: 36, 9216: 36, 2048: 1, 4096: 1, 8192: 1, 512: 1, 384: 12, 576: 36, 640: 20, 896: 28,
}  # fmt: skip


@pytest.mark.parametrize("order", [1, 2, 4, 12, 20, 24, 28, 36, 44, 60, 68, 76, 108, 128, 140, 368])
def test_entries_are_signs_and_rows_are_orthogonal(order):
    matrix = hadamard(order) * order**0.5
    assert torch.equal(matrix.round().abs(), torch.ones(order, order, dtype=torch.float64))
    assert torch.allclose(matrix, matrix.round(), atol=1e-12)
    whole = matrix.round()
    assert torch.equal(whole @ whole.T, order * torch.eye(order, dtype=torch.float64))


def test_every_layer_has_one():
    assert {columns: core_of(columns) for columns in LAYERS} == LAYERS
    for columns in LAYERS:
        x = torch.randn(3, columns, dtype=torch.float64)
        turned = rotate(x, full_order(columns))
        # a rotation keeps lengths and angles, and is undone by its transposed matrix
        assert torch.allclose(turned @ turned.T, x @ x.T, atol=1e-9)
        assert torch.allclose(rotate(turned, columns, inverse=True), x, atol=1e-9)
        one = torch.zeros(1, columns, dtype=torch.float64)
        one[0, 7] = 1
        assert torch.allclose(rotate(one, columns).abs(), torch.full_like(one, columns**-0.5), atol=1e-12)


@pytest.mark.parametrize("order", [2, 12, 28, 64, 384, 512, 1536])
def test_product_is_that_with_the_matrix(order):
    x = torch.randn(2, 3, 2 * order, dtype=torch.float64)
    blocks = torch.block_diag(hadamard(order), hadamard(order))
    assert torch.allclose(rotate(x, order), x @ blocks, atol=1e-10)
    assert torch.allclose(rotate(x, order, inverse=True), x @ blocks.T, atol=1e-10)
    half = x.to(torch.bfloat16)
    assert rotate(half, order).dtype == torch.bfloat16
    assert rotate(x[:0], order).shape == (0, 3, 2 * order)
    assert rotate(x, 0) is x


@pytest.mark.parametrize("order", [0, -4, 3, 6, 14, 18, 92, 172, 4 * 521, 2**10 * 1021])
def test_there_is_none(order):
    """Odd numbers and twice odd ones have none; of 92 and 172 there are some, but not of Paley's."""
    assert core_of(order) is None
    if order > 0:
        with pytest.raises(ValueError, match=f"no Hadamard matrix of order {order} is known"):
            hadamard(order)


def test_what_does_not_fit():
    with pytest.raises(ValueError, match="blocks of 12 columns do not divide 40 columns"):
        rotate(torch.zeros(1, 40), 12)
    assert [block_order(columns) for columns in (384, 192, 96, 48, 40, 130)] == [128, 64, 32, 16, 0, 0]
    assert block_order(384, largest=32) == 32
    assert full_order(130) == full_order(1) == 0
    assert BLOCKS == (128, 64, 32, 16)


def test_signs_follow_their_seed():
    signs = random_signs(1000, 3)
    assert signs.dtype == torch.int8
    assert torch.equal(signs.abs(), torch.ones_like(signs))
    assert abs(int(signs.long().sum())) < 150
    assert torch.equal(signs, random_signs(1000, 3))
    assert not torch.equal(signs, random_signs(1000, 4))


def test_matrices_made_without_gradients_serve_later_ones():
    with torch.inference_mode():
        rotate(torch.zeros(1, 44), 44)
    x = torch.randn(1, 44, requires_grad=True)
    rotate(x, 44).square().sum().backward()
    assert torch.allclose(x.grad, 2 * x)


@pytest.mark.parametrize("x", [torch.ones(2, 4, dtype=torch.int32), torch.tensor(1.0)], ids=["whole", "scalar"])
def test_what_has_no_floating_columns_is_refused(x):
    with pytest.raises(ValueError, match="rotated are floating"):
        rotate(x, 4)


def test_a_call_on_tensors_without_contents_spoils_no_later_one():
    order = 44  # whose matrix in float32 no other test has made
    with FakeTensorMode():
        assert rotate(torch.empty(2, order), order).shape == (2, order)
    x = torch.randn(2, order)
    torch.testing.assert_close(rotate(rotate(x, order), order, inverse=True), x)
