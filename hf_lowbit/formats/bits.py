"""Checks of bit planes and scales read from a file."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_lowbit.kernels import pack_plane, padded_columns, unpack_plane
from hf_lowbit.kernels.planes import GROUP


def padding_is_zero(plane: Tensor, columns: int) -> bool:
    """Return whether every padding bit of a P128 plane (..., bytes) of ``columns`` columns is 0.

    Kernels rely on it: a set padding bit would add a weight that does not exist.
    """
    full = padded_columns(columns)
    if full == columns:
        return True
    # the padding lies in the last group of 128 columns, in 16 bytes
    padding = pack_plane(torch.arange(full - GROUP, full, device=plane.device) >= columns)
    return not bool((plane[..., -padding.shape[0] :] & padding).any())


def pruned_evenly(mask: Tensor, columns: int, n: int, m: int) -> bool:
    """Return whether each group of ``m`` columns of a P128 mask (rows, bytes) keeps ``n`` (a short one ceil(n·q/m)).

    A wrong count would shift every later sign of the row.
    """
    bits = unpack_plane(mask, columns)
    full = columns - columns % m
    counts = bits[:, :full].unflatten(1, (-1, m)).sum(-1) if full else bits.new_zeros((bits.shape[0], 0))
    tail = columns - full
    tail_ok = not tail or bool((bits[:, full:].sum(-1) == -(-n * tail // m)).all())
    return tail_ok and bool((counts == n).all())


def scale_problems(name: str, tensor: Tensor, signed: bool) -> list[str]:
    """Return what is wrong with a scale tensor: non-finite values, or negative ones unless ``signed``."""
    if not signed and _surely_fine(tensor):
        return []
    if not bool(torch.isfinite(tensor).all()):
        return [f"{name} holds NaN or infinity"]
    if not signed and bool((tensor < 0).any()):
        return [f"{name} holds a negative scale"]
    return []


def _surely_fine(tensor: Tensor) -> bool:
    """Return whether all values are finite and have no sign, told from their bits; False for -0, which is fine.

    Bits of such floats, read as integers, lie from 0 to those of the largest finite one. ``isfinite`` of half
    precision is some thirty times slower on a CPU, and most of the time of loading a model was spent there.
    """
    integers = {torch.float16: torch.int16, torch.bfloat16: torch.int16, torch.float32: torch.int32}.get(tensor.dtype)
    if integers is None or not tensor.numel():
        return False
    bits = tensor.view(integers)
    largest = torch.tensor(torch.finfo(tensor.dtype).max, dtype=tensor.dtype).view(integers)
    return int(bits.amin()) >= 0 and int(bits.amax()) <= int(largest)
