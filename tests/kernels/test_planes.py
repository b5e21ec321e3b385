"""The P128 layout, bit by bit, against the sentence that defines it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hf_lowbit.kernels import pack_plane, padded_columns, plane_bytes, unpack_plane


def bits_of(columns: int, *leading: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand((*leading, columns), generator=generator) < 0.5


def packed_by_hand(row: list[bool]) -> list[int]:
    """Bit b of byte j of group g holds column 128*g + 16*b + j; columns that do not exist are 0."""
    groups = -(-len(row) // 128)
    out = []
    for g in range(groups):
        for j in range(16):
            byte = 0
            for b in range(8):
                column = 128 * g + 16 * b + j
                if column < len(row) and row[column]:
                    byte |= 1 << b
            out.append(byte)
    return out


@pytest.mark.parametrize("columns", [1, 15, 16, 17, 40, 72, 127, 128, 129, 130, 256, 300, 576])
def test_layout_is_the_definition(columns):
    bits = bits_of(columns, 3)
    assert pack_plane(bits).tolist() == [packed_by_hand(row) for row in bits.tolist()]


@pytest.mark.parametrize(
    ("column", "byte", "value"),
    [(0, 0, 1), (1, 1, 1), (15, 15, 1), (16, 0, 2), (113, 1, 128), (127, 15, 128), (128, 16, 1), (149, 21, 2)],
)
def test_single_columns_by_hand(column, byte, value):
    bits = torch.zeros(150, dtype=torch.bool)
    bits[column] = True
    want = [0] * 32
    want[byte] = value
    assert pack_plane(bits).tolist() == want
    assert unpack_plane(torch.tensor(want, dtype=torch.uint8), 150).nonzero().flatten().tolist() == [column]


@settings(max_examples=80, deadline=None)
@given(
    columns=st.integers(1, 300),
    leading=st.lists(st.integers(0, 3), max_size=3),
    seed=st.integers(0, 2**31),
)
def test_round_trip(columns, leading, seed):
    bits = bits_of(columns, *leading, seed=seed)
    before = bits.clone()
    plane = pack_plane(bits)
    assert plane.dtype == torch.uint8
    assert plane.is_contiguous()
    assert tuple(plane.shape) == (*leading, plane_bytes(columns))
    assert torch.equal(unpack_plane(plane, columns), bits)
    assert torch.equal(bits, before)
    # Read as a full-width plane, what lies beyond the last column is padding.
    assert not unpack_plane(plane, padded_columns(columns))[..., columns:].any()


@settings(max_examples=40, deadline=None)
@given(columns=st.integers(1, 300), seed=st.integers(0, 2**31))
def test_unpack_ignores_padding_bits(columns, seed):
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randint(256, (2, plane_bytes(columns)), dtype=torch.uint8, generator=generator)
    assert torch.equal(unpack_plane(noise, columns), unpack_plane(pack_plane(unpack_plane(noise, columns)), columns))


def test_non_contiguous_input():
    bits = bits_of(6, 200).T
    assert not bits.is_contiguous()
    assert torch.equal(pack_plane(bits), pack_plane(bits.contiguous()))
    plane = pack_plane(bits_of(200, 4))
    strided = torch.stack([plane, plane], dim=-1)[..., 0]
    assert not strided.is_contiguous()
    assert torch.equal(unpack_plane(strided, 200), unpack_plane(plane, 200))


@pytest.mark.parametrize(
    ("columns", "padded"), [(1, 128), (127, 128), (128, 128), (129, 256), (576, 640), (960, 1024)]
)
def test_sizes(columns, padded):
    assert padded_columns(columns) == padded
    assert plane_bytes(columns) == padded // 8


def test_meta():
    plane = pack_plane(torch.empty((2, 3, 130), dtype=torch.bool, device="meta"))
    assert (plane.device.type, plane.dtype, tuple(plane.shape)) == ("meta", torch.uint8, (2, 3, 32))
    bits = unpack_plane(plane, 130)
    assert (bits.device.type, bits.dtype, tuple(bits.shape)) == ("meta", torch.bool, (2, 3, 130))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.float32])
def test_only_bools_are_packed(dtype):
    with pytest.raises(TypeError, match=f"bool.*{dtype}"):
        pack_plane(torch.ones((2, 128), dtype=dtype))


@pytest.mark.parametrize(("bytes_", "columns"), [(16, 129), (32, 128), (15, 120), (16, 300)])
def test_a_plane_of_another_width_is_refused(bytes_, columns):
    with pytest.raises(ValueError, match=f"{columns} columns has {plane_bytes(columns)} bytes a row, got {bytes_}"):
        unpack_plane(torch.zeros((2, bytes_), dtype=torch.uint8), columns)
