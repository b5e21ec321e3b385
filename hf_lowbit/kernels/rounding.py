"""Activations on integer grids: the basis in which rows are rounded, their codes and scales.

Modes, by which columns and tokens share a scale ``s = max|x̃| / (2^(bits-1) - 1)``:

===============  ==========================================================  =====================================
mode             scale                                                       integer product
===============  ==========================================================  =====================================
none             nothing is rounded                                          no
token_group      (tokens, ⌈columns / group_size⌉)                            yes
token            (tokens, 1)                                                 yes, one factor at the end
channel          (1, columns), over all tokens of the call                   no: it varies inside the sum
channel_token    (1, columns), then (tokens, 1) of what that leaves          no
static           one for all calls, from the stored ``act_bounds`` (l, u)    yes
dynamic          one for the call, from its least and largest value          yes
===============  ==========================================================  =====================================

The last two have codes from 0 to ``2^bits - 1`` of a grid from l to u: ``x̃ ≈ s q + l``, s = (u - l) / (2^bits - 1).
What lies outside is clipped, and u = l makes s = 1, q = 0. The integer form then has two more terms, of sums of codes:
``s s_w (Σ q q_w - zero Σ q) + l s_w (Σ q_w - columns · zero)``.

Bits are 2 to 8, or 16: nothing is rounded (to tell what weights cost apart from activations).

NaN and infinity are handed on, never clamped: whatever shares a scale with one becomes NaN, so that a token with one
has NaN in all outputs; with a scale over tokens, all tokens do. A group of zeros has scale 1. Scales are float32 and
are never stored: activations of models in bfloat16 leave the range of half precision.

Source: DVD-Quant (arXiv 2505.18663), Eq. 10 (mode channel); groups of columns as in the kernels that the paper's
speed was measured with, whose shape it does not give; token scales as in QuaRot (arXiv 2404.00456).
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from hf_lowbit.kernels.hadamard import rotate

SCALE_MODES = ("token_group", "token", "channel", "channel_token")
# Modes whose codes are unsigned, on one grid with two ends.
RANGE_MODES = ("static", "dynamic")
MODES = ("none", *SCALE_MODES, *RANGE_MODES)
# Modes whose scales come out of the sum, so that codes are multiplied as integers.
INTEGER_MODES = ("token_group", "token", *RANGE_MODES)
# Of these, those with signed codes and scales of a token: there are kernels for them.
KERNEL_MODES = ("token_group", "token")
UNROUNDED = 16  # "bits" that stand for activations as they are
ACT_BITS = (*range(2, 9), UNROUNDED)


def check_act_bits(bits: Any) -> None:
    """Raise ValueError unless activations can have so many bits."""
    if type(bits) is not int or bits not in ACT_BITS:
        raise ValueError(f"activations have 2 to 8 bits, or 16 for not rounded, got {bits!r}")


def transform(x: Tensor, smooth: Tensor | None, signs: Tensor | None, rotation: int) -> Tensor:
    """Return the rows that codes are made of.

    Args:
        x: (..., columns), floating.
        smooth: (columns,), > 0, what columns are divided by, or None.
        signs: (columns,), ±1, or None.
        rotation: order of the Hadamard blocks, 0 for none.

    Returns:
        (..., columns), float32.
    """
    found = x.float()
    if smooth is not None:
        found = found / smooth.float()
    if signs is not None:
        found = found * signs.float()
    return rotate(found, rotation)


def untransform(rows: Tensor, smooth: Tensor | None, signs: Tensor | None, rotation: int) -> Tensor:
    """Return rows of a weight that was made for transformed inputs in the basis of plain inputs.

    ``x̃ W̃ᵀ = x Wᵀ`` with ``W = ((W̃ (I ⊗ H)ᵀ) · signs) / smooth``: a weight is multiplied by ``smooth``, and ``signs``
    and rotation are orthogonal.

    Args:
        rows: (..., columns), floating.
        smooth: (columns,) or None.
        signs: (columns,) or None.
        rotation: order of the Hadamard blocks.

    Returns:
        (..., columns), dtype of ``rows``.
    """
    found = rotate(rows, rotation, inverse=True)
    found = found if signs is None else found * signs.to(rows.dtype)
    return found if smooth is None else found / smooth.to(rows.dtype)


@dataclasses.dataclass
class ActivationCodes:
    """Activations on integer grids; ``x̃[i, j] ≈ codes[i, j] · token[i, g] · channel[j]`` for column j of group g.

    Attributes:
        codes: (tokens, columns), int8; uint8 for modes static and dynamic.
        token: (tokens, groups), (tokens, 1) or (1, 1), float32; None if all tokens share ``channel``.
        channel: (1, columns), float32, or None.
        group_size: columns of a group of ``token``.
        low: (1, 1), float32, what code 0 stands for; None for 0.
    """

    codes: Tensor
    token: Tensor | None
    channel: Tensor | None
    group_size: int
    low: Tensor | None = None

    def dequantized(self) -> Tensor:
        """Return (tokens, columns), float32."""
        found = self.codes.float()
        if self.token is not None:
            found = found * spread(self.token, self.group_size, found.shape[1])
        found = found if self.channel is None else found * self.channel
        return found if self.low is None else found + self.low


def spread(scale: Tensor, group_size: int, columns: int) -> Tensor:
    """Repeat scales (rows, groups) for the columns of each group: (rows, columns), or (rows, 1) for one group."""
    if scale.shape[1] == 1:
        return scale
    return scale.repeat_interleave(group_size, dim=1)[:, :columns]


def quantize_activation(x: Tensor, mode: str, bits: int, group_size: int = 0) -> ActivationCodes:
    """Round rows to integers with scales that come from the rows themselves.

    Args:
        x: (tokens, columns), float32, transformed; any number of tokens.
        mode: one of :data:`SCALE_MODES`; of the others see :func:`quantize_range`.
        bits: 2 to 8.
        group_size: columns that share a scale, for mode token_group; the last group of a row may be shorter.

    Returns:
        Codes ``round(x / s)``, half to even, with ``s = max|x| / (2^(bits-1) - 1)``; 0 with scale NaN where NaN or
        infinity was.

    Raises:
        ValueError: there is no such mode, or it is token_group without a group size.

    Source: DVD-Quant, Eq. 10, for mode channel: ``Λ = diag(s_j)``, ``s_j = max_i |x_ij|``, ``X̂ = Q(X Λ⁻¹)`` with Q on
    a fixed grid of [-1, 1]. The paper does not say whether grids have a zero point; rotated rows are centred at 0, so
    they have none here.
    """
    if mode not in SCALE_MODES:
        raise ValueError(f"activation mode must be one of {', '.join(SCALE_MODES)}, got {mode!r}")
    if mode == "token_group" and group_size < 1:
        raise ValueError(f"group_size must be at least 1 for mode token_group, got {group_size}")
    most = 2 ** (bits - 1) - 1
    tokens, columns = x.shape
    if mode == "token_group":
        groups = -(-columns // group_size)
        parts = pad(x, (0, groups * group_size - columns)).view(tokens, groups, group_size)
        token = _step(parts.abs().amax(2), most)
        codes = _rounded(parts, token.unsqueeze(2), most).reshape(tokens, groups * group_size)[:, :columns]
        return ActivationCodes(codes.contiguous(), token, None, group_size)
    if mode == "token":
        token = _step(x.abs().amax(1, keepdim=True), most)
        return ActivationCodes(_rounded(x, token, most), token, None, columns)
    largest = x.abs().amax(0, keepdim=True) if tokens else x.new_zeros((1, columns))
    if mode == "channel":
        channel = _step(largest, most)
        return ActivationCodes(_rounded(x, channel, most), None, channel, columns)
    channel = _step(largest, 1)
    even = x / channel
    token = _step(even.abs().amax(1, keepdim=True), most)
    return ActivationCodes(_rounded(even, token, most), token, channel, columns)


def _step(largest: Tensor, most: int) -> Tensor:
    """Scale of a group from its largest magnitude: 1 where that is 0 or vanishes, NaN where it is not finite."""
    step = largest / most
    step = torch.where(step == 0, torch.ones_like(step), step)
    return torch.where(torch.isfinite(step), step, torch.full_like(step, math.nan))


def _rounded(x: Tensor, step: Tensor, most: int) -> Tensor:
    """Codes; what is not finite becomes 0, its scale says the rest (a cast of NaN to integers is undefined)."""
    return (x / step).round().clamp(-most, most).nan_to_num(0.0).to(torch.int8)


def range_step(low: Tensor, high: Tensor, bits: int) -> Tensor:
    """Return the step of a grid of ``2^bits`` values with the given ends; 1 where both are one value."""
    step = (high - low) / (2**bits - 1)
    return torch.where(step > 0, step, torch.ones_like(step))


def range_codes(x: Tensor, ends: Any, bits: int) -> Tensor:
    """Return codes on a grid with two ends, whole numbers in the dtype of ``x``; NaN is handed on.

    Args:
        x: floating, any shape.
        ends: two tensors, or one with two rows, that broadcast: what code 0 and what the last code stand for.
        bits: of a code.
    """
    low, high = ends
    return ((torch.minimum(torch.maximum(x, low), high) - low) / range_step(low, high, bits)).round()


def on_range(x: Tensor, ends: Any, bits: int) -> Tensor:
    """Return the nearest values on a grid with two ends, see :func:`range_codes`."""
    low, high = ends
    return range_codes(x, ends, bits) * range_step(low, high, bits) + low


def quantize_range(x: Tensor, bounds: Tensor | None, bits: int) -> ActivationCodes:
    """Round rows on one grid.

    Args:
        x: (tokens, columns), float32.
        bounds: (2,), least and largest value of the grid; None takes those of ``x``.
        bits: 2 to 8.

    Returns:
        Codes, uint8. The step of a token with NaN or infinity is NaN: to clip what has overflowed would hide it. Where
        the range comes from ``x``, all tokens are NaN then.

    Source: 2DQuant (arXiv 2406.06649), Eq. 1 and 2.
    """
    ends = bounds
    if ends is None:
        ends = torch.stack([x.min(), x.max()]) if x.numel() else x.new_zeros(2)
    low, high = ends.float().view(2, 1, 1)
    codes = range_codes(x, (low, high), bits)
    finite = torch.isfinite(x.abs().amax(1, keepdim=True))
    step = torch.where(finite, range_step(low, high, bits), torch.full_like(low, math.nan))
    return ActivationCodes(codes.nan_to_num(0.0).to(torch.uint8), step, None, x.shape[1], low)


def integer_form(
    found: ActivationCodes, codes: Tensor, scale: Tensor, zero: Tensor | None, bits: int, group_size: int
) -> Tensor:
    """Multiply codes by codes, the way kernels do; for tests and as their description.

    Args:
        found: of modes token_group or token.
        codes: (n, columns), uint8, unpacked codes of the weight.
        scale: (n, groups), floating.
        zero: (n, groups), or None for the middle of the range.
        bits: of a weight's code.
        group_size: columns that share a weight scale, 0 for all.

    Returns:
        (tokens, n), float32, without bias.
    """
    columns = codes.shape[1]
    if found.token is None or found.channel is not None:
        raise ValueError("scales of channels cannot be taken out of the sum")
    ends = {columns, *range(0, columns, group_size or columns), *range(0, columns, found.group_size)}
    stretches = sorted(ends)
    out = found.codes.new_zeros((found.codes.shape[0], codes.shape[0]), dtype=torch.float32)
    for start, end in itertools.pairwise(stretches):
        group, own = (start // group_size if group_size else 0), start // found.group_size
        own_codes, own_weights = found.codes[:, start:end].double(), codes[:, start:end].double()
        middle: Any = 2.0 ** (bits - 1) if zero is None else zero[:, group].double()
        # whole numbers below 2^53 are exact in float64
        whole = own_codes @ own_weights.T - own_codes.sum(1, keepdim=True) * middle
        factor = scale[:, group].float()
        out += found.token[:, min(own, found.token.shape[1] - 1), None] * factor * whole.float()
        if found.low is not None:
            out += found.low * factor * (own_weights.sum(1) - (end - start) * middle).float()
    return out
