"""Sequences in which passages return, so that a loss depends on finding again what stands far back.

A model that meets a passage a second time looks up how it went on the first time: keys are compared, values copied.
Plain text hardly asks for that, and statistics of it hardly count what would spoil it.
"""

from __future__ import annotations

import zlib

import torch
from torch import Tensor

_SHORTEST, _LONGEST = 16, 47  # tokens of a passage: a sentence or two


def with_returns(sequence: Tensor, share: float) -> Tensor:
    """Replace the end of a sequence by passages from before it.

    Args:
        sequence: (tokens,), token ids; not modified.
        share: of its tokens, from 0 to 0.9, that are replaced.

    Returns:
        (tokens,): the beginning as it was, then passages of it, 16 to 47 tokens each. Which ones, the sequence alone
        decides, so that the same text gives the same passages in any run.

    Raises:
        ValueError: ``sequence`` is not of one dimension, or ``share`` is out of range.
    """
    if sequence.dim() != 1 or not 0 <= share <= 0.9:
        raise ValueError(f"one sequence and a share from 0 to 0.9 are wanted, got {tuple(sequence.shape)} and {share}")
    kept = len(sequence) - int(share * len(sequence))
    head, pieces, missing = sequence[:kept], [], len(sequence) - kept
    generator = torch.Generator().manual_seed(zlib.crc32(sequence.cpu().contiguous().numpy().tobytes()))
    while missing > 0:
        length = min(int(torch.randint(_SHORTEST, _LONGEST + 1, (), generator=generator)), missing, kept)
        start = int(torch.randint(kept - length + 1, (), generator=generator))
        pieces.append(head[start : start + length])
        missing -= length
    return torch.cat([head, *pieces])
