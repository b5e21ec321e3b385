"""Latents of a cache as rows of bytes: codes of 8, 4 or 3 bits with one scale and one zero point per token and group.

A row holds what is kept of one token, so a cache can append, drop, move and select rows without knowing what is in
them. For groups of ranks ``r_0 … r_{N-1}``::

    scale of each group (float16) | zero point of each group (int16) | codes of group 0 | codes of group 1 | …

Codes of a group fill whole words: one code in a byte (8 bits), two in a byte (4 bits), eight in three bytes (3 bits).
With ``w`` words, word ``j`` holds the codes ``j, j + w, j + 2w, …``, the first in its lowest bits; so the same place
in neighbouring words stands for neighbours in the latent, and nothing has to be shuffled. A word of three bytes is
spread over three planes of ``w`` bytes, lowest byte first.

``z = (code - zero) · scale``. What is stored for a token depends on that token alone: nothing is coded again later,
and tokens may come one by one or all at once.

Source: ReCalKV, released code (per token and group, minimum to maximum, 3 and 4 bits; the packing is ours).
Differs: the zero point is not clamped to the range of codes, so a group whose values all lie on one side of zero loses
nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from hf_lowbit.kernels.cpu import latent as cpu
from hf_lowbit.kernels.ops import unobserved

# bits: (codes in a word, bytes of a word)
WORDS = {8: (1, 1), 4: (2, 1), 3: (8, 3)}
# Most heads give most of their attention to the first tokens, whatever these say: a key rounded there is felt by all
# later tokens. Kept in full, as caches do by default, they cost nothing per further token.
SINK_TOKENS = 4
# A range narrower than this is rounding noise; it also keeps the scale of 8 bits above the smallest float16.
_NARROWEST = 1e-5
# With this the zero point of a group far from zero, but narrow, still fits int16.
_FARTHEST_ZERO = 32000


def row_bytes(ranks: Sequence[int], bits: int) -> int:
    """Return the bytes of one token's row: for ranks that are multiples of 8, ``sum(ranks) · bits / 8 + 4 · N``.

    Raises:
        ValueError: there are no such codes, or a rank is not a number from 1.
    """
    if type(bits) is not int or bits not in WORDS:
        raise ValueError(f"latents are coded with {', '.join(map(str, sorted(WORDS)))} bits, got {bits!r}")
    if not ranks or min(ranks) < 1:
        raise ValueError(f"ranks of groups of latents must be numbers from 1, got {list(ranks)}")
    codes, width = WORDS[bits]
    return 4 * len(ranks) + sum(-(-rank // codes) * width for rank in ranks)


def shares(scores: Tensor, total: Tensor) -> Tensor:
    """Return ``exp(scores - total)``, and 0 where ``total`` is minus infinity: who sees nothing has no shares.

    NaN, of activations that were broken before, stays NaN.

    Args:
        scores: logarithms, floating, any shape.
        total: their ``logsumexp``, broadcastable.
    """
    return (scores - total).exp().masked_fill(total == -torch.inf, 0.0)


def group_places(owners: Sequence[int], ranks: Sequence[int]) -> list[tuple[list[int] | slice, slice]]:
    """Return heads and place in the latent of each group; neighbouring heads as a slice, which copies nothing."""
    found: list[tuple[list[int] | slice, slice]] = []
    start = 0
    for group, rank in enumerate(ranks):
        heads = [head for head, owner in enumerate(owners) if owner == group]
        neighbours = heads[-1] - heads[0] + 1 == len(heads)
        found.append((slice(heads[0], heads[-1] + 1) if neighbours else heads, slice(start, start + rank)))
        start += rank
    return found


def encode_rows(latents: Tensor, ranks: Sequence[int], bits: int) -> Tensor:
    """Code latents.

    Args:
        latents: (..., sum of ranks), floating.
        ranks: width of each group.
        bits: 8, 4 or 3.

    Returns:
        (..., row_bytes), uint8. A group with a value that is not finite decodes to values that are not finite.

    Raises:
        ValueError: ``latents`` are not as wide as the ranks say, or not floating; see also :func:`row_bytes`.
    """
    size = row_bytes(ranks, bits)
    if not latents.dim() or latents.shape[-1] != sum(ranks) or not latents.is_floating_point():
        raise ValueError(
            f"latents must be floating, (..., {sum(ranks)}), got {tuple(latents.shape)} of {latents.dtype}"
        )
    if unobserved(latents):
        rows = cpu.encode(latents, ranks, bits, size)
        if rows is not None:
            return rows
    most = 2**bits - 1
    scales, zeros, codes = [], [], []
    for group in latents.float().split(list(ranks), dim=-1):
        low, high = group.amin(-1, keepdim=True), group.amax(-1, keepdim=True)
        far = torch.maximum(low.abs(), high.abs()) / _FARTHEST_ZERO
        scale = torch.maximum((high - low).clamp(min=_NARROWEST) / most, far).half()
        zero = (-low / scale.float()).round()
        scales.append(scale)
        zeros.append(zero.to(torch.int16))
        codes.append(_pack((group / scale.float()).round().add(zero).clamp(0, most).to(torch.uint8), bits))
    head = [torch.cat(part, dim=-1).view(torch.uint8) for part in (scales, zeros)]
    return torch.cat([*head, *codes], dim=-1)


def decode_rows(rows: Tensor, ranks: Sequence[int], bits: int, dtype: torch.dtype) -> Tensor:
    """Undo :func:`encode_rows` up to rounding.

    Args:
        rows: (..., row_bytes), uint8.
        ranks: as they were given to :func:`encode_rows`.
        bits: likewise.
        dtype: of the result.

    Returns:
        (..., sum of ranks), computed in float32 and rounded to ``dtype``.

    Raises:
        ValueError: ``rows`` are not as wide as ranks and bits say, or not uint8; see also :func:`row_bytes`.
    """
    size = row_bytes(ranks, bits)
    if not rows.dim() or rows.shape[-1] != size or rows.dtype != torch.uint8:
        raise ValueError(f"rows of codes must be uint8, (..., {size}), got {tuple(rows.shape)} of {rows.dtype}")
    groups = len(ranks)
    each, width = WORDS[bits]
    lengths = [-(-rank // each) * width for rank in ranks]
    scales, zeros, *codes = rows.split([2 * groups, 2 * groups, *lengths], dim=-1)
    scale = scales.contiguous().view(torch.float16).float()
    zero = zeros.contiguous().view(torch.int16).float()
    parts = [
        (_unpack(packed, bits)[..., :rank].float() - zero[..., at : at + 1]) * scale[..., at : at + 1]
        for at, (packed, rank) in enumerate(zip(codes, ranks, strict=True))
    ]
    return torch.cat(parts, dim=-1).to(dtype)


def _pack(codes: Tensor, bits: int) -> Tensor:
    each, width = WORDS[bits]
    places = pad(codes, (0, -codes.shape[-1] % each)).unflatten(-1, (each, -1)).int()
    words = torch.zeros_like(places[..., 0, :])
    for place in range(each):
        words = words | places[..., place, :] << (bits * place)
    return torch.cat([(words >> (8 * byte) & 255).to(torch.uint8) for byte in range(width)], dim=-1)


def _unpack(packed: Tensor, bits: int) -> Tensor:
    each, width = WORDS[bits]
    if each == 1:
        return packed
    planes = packed.unflatten(-1, (width, -1)).int()
    words = planes[..., 0, :]
    for byte in range(1, width):
        words = words | planes[..., byte, :] << (8 * byte)
    return torch.cat([words >> (bits * place) & (2**bits - 1) for place in range(each)], dim=-1)
