"""The arguments of ``hf_lowbit::latent_decode`` by name, which is how its kernels take them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor


class Case(NamedTuple):
    """One call, in the order of the op's schema.

    Attributes:
        q: (batch, heads, head_dim), normed and rotated.
        keys: (batch, tokens, sum of ranks) floating, or (batch, tokens, row_bytes) uint8.
        values: likewise.
        up_k: (key heads, head_dim, largest rank), zero beyond the rank of a head's group.
        up_v: likewise.
        bias_k: key heads · head_dim numbers, or None.
        bias_v: likewise.
        norm: (head_dim,), factors of an RMS norm of the keys, or None.
        positions: (batch, tokens) int32, or None without rotation.
        inv_freq: (rotated / 2,), or None without rotation.
        mask: (1 or batch, 1 or heads, tokens), boolean (true: seen) or added to the scores, or None.
        groups_k: group of every head.
        ranks_k: rank of every group.
        groups_v: as for the keys.
        ranks_v: likewise.
        scaling: of the scores.
        rope_scale: of cosine and sine.
        eps: of the norm.
        bits: 8, 4 or 3 for rows of codes, 0 for latents.
    """

    q: Tensor
    keys: Tensor
    values: Tensor
    up_k: Tensor
    up_v: Tensor
    bias_k: Tensor | None
    bias_v: Tensor | None
    norm: Tensor | None
    positions: Tensor | None
    inv_freq: Tensor | None
    mask: Tensor | None
    groups_k: Sequence[int]
    ranks_k: Sequence[int]
    groups_v: Sequence[int]
    ranks_v: Sequence[int]
    scaling: float
    rope_scale: float
    eps: float
    bits: int

    @property
    def rotated_pairs(self) -> int:
        """How many pairs of a key's coordinates are rotated."""
        return 0 if self.inv_freq is None else self.inv_freq.numel()


def pairs_of(head_dim: int, half: int) -> tuple[list[int], list[int]]:
    """Return first and second coordinate of each pair of a key's, for kernels that turn all of them alike.

    Pairs that are rotated come first; what is not rotated makes pairs, too (of frequency 0), the last of which may
    lack its second, which is -1 then.
    """
    rest = list(range(2 * half, head_dim))
    more = -(-len(rest) // 2)
    return [*range(half), *rest[:more]], [*range(half, 2 * half), *rest[more:], *([-1] * (len(rest) % 2))]
