"""Which heads share a latent: similarity of heads, and partitions into groups of given sizes.

A head is a block of rows of a projection. What the rows put out on the calibration inputs is known by their Gram
matrix ``C = W G Wᵀ`` (:mod:`hf_lowbit.numerics.low_rank`); a group of heads is compressed well when the eigenvalues of
its block of ``C`` fall fast.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Groups = list[list[int]]
# Exact costs that a search looks at in one sweep, for each head; each is one set of eigenvalues of a group.
_TRIALS = 4
_SWEEPS = 3


def contiguous(heads: int, size: int) -> Groups:
    """Heads in their order, ``size`` to a group; the last group is smaller where ``size`` does not divide."""
    return [list(range(start, min(start + size, heads))) for start in range(0, heads, size)]


def head_similarity(weight: Tensor, second_moment: Tensor | None, heads: int) -> Tensor:
    """Linear CKA of every pair of heads, on whitened weights.

    Args:
        weight: (heads · head_dim, m), float64.
        second_moment: (m, m), float64, G; None is the identity.
        heads: number of heads.

    Returns:
        (heads, heads), from 0 to 1, with ones on the diagonal; 0 for a head without variance.

    Source: ReCalKV (arXiv 2505.24357), head-wise similarity; Kornblith et al., arXiv 1905.00414, for linear CKA.
    Differs: the m x m Gram matrices of that form are never made; the same value follows from blocks of head_dim². A
    head is ``(W_h S)ᵀ`` with its column means removed, which depends on the root S of G; the symmetric one is taken,
    since it needs no convention for order or signs.
    """
    whitened = weight if second_moment is None else weight @ _symmetric_root(second_moment)
    centred = whitened - whitened.mean(1, keepdim=True)
    rows = weight.shape[0] // heads
    blocks = (centred @ centred.T).reshape(heads, rows, heads, rows).permute(0, 2, 1, 3)
    products = blocks.square().sum((2, 3))
    own = products.diagonal().sqrt()
    scale = own[:, None] * own[None]
    similarity = torch.where(scale > 0, products / torch.where(scale > 0, scale, 1.0), 0.0)
    similarity.fill_diagonal_(1.0)
    return similarity


def _symmetric_root(gram: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh((gram + gram.T) / 2)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


def greedy(similarity: Tensor, sizes: Sequence[int]) -> Groups:
    """Partition heads by visiting their pairs from the most similar down.

    Two free heads open the first group with room for both; a free head joins the group of its partner if there is
    room. Heads left over, the last first, fill what room remains.

    Args:
        similarity: (heads, heads), symmetric.
        sizes: of the groups; they add up to the number of heads.

    Returns:
        Heads of each group, rising.

    Source: ReCalKV (arXiv 2505.24357), reordering of heads.
    Differs: two heads open a group with room for two, not for one, so none has to be moved later.
    """
    heads = len(similarity)
    groups: Groups = [[] for _ in sizes]
    place: dict[int, int] = {}

    def room(group: int) -> int:
        return sizes[group] - len(groups[group])

    def put(head: int, group: int) -> None:
        groups[group].append(head)
        place[head] = group

    pairs = sorted(itertools.combinations(range(heads), 2), key=lambda pair: (-float(similarity[pair]), pair))
    for one, other in pairs:
        if one not in place and other not in place:
            group = next((g for g in range(len(sizes)) if room(g) >= 2), None)
            if group is not None:
                put(one, group)
                put(other, group)
        elif (one in place) != (other in place):
            free, group = (other, place[one]) if one in place else (one, place[other])
            if room(group):
                put(free, group)
    for head in sorted(set(range(heads)) - set(place), reverse=True):
        put(head, next(g for g in range(len(sizes)) if room(g)))
    return [sorted(group) for group in groups]


def lost_energy(gram: Tensor, group: Sequence[int], rows: int, rank: int) -> float:
    """Energy of the outputs of some heads that a latent of a rank loses: the tail of their eigenvalues.

    Args:
        gram: (heads · rows, heads · rows), C.
        group: heads.
        rows: of a head.
        rank: of the group.
    """
    index = torch.cat([torch.arange(head * rows, (head + 1) * rows) for head in group]).to(gram.device)
    values = torch.linalg.eigvalsh(gram[index][:, index])
    return float(values[: max(len(values) - rank, 0)].clamp(min=0).sum())


def least_loss(gram: Tensor, heads: int, starts: Sequence[Groups], ranks: Sequence[int]) -> Groups:
    """Partition of the heads that loses little energy: the best of some starts, improved by exchanging two heads.

    Args:
        gram: (n, n), C = W G Wᵀ, float64.
        heads: number of heads.
        starts: partitions, all with groups of the same sizes in the same order.
        ranks: of the groups.

    Returns:
        A partition that loses no more than any of the starts.

    Source: none; the objective is the error that :func:`~hf_lowbit.numerics.low_rank.truncate` leaves for each group.
    """
    rows = len(gram) // heads
    known: dict[tuple[tuple[int, ...], int], float] = {}

    def loss(group: Sequence[int], rank: int) -> float:
        key = (tuple(sorted(group)), rank)
        if key not in known:
            known[key] = lost_energy(gram, key[0], rows, rank)
        return known[key]

    def total(groups: Groups) -> float:
        return sum(loss(group, rank) for group, rank in zip(groups, ranks, strict=True))

    best = [list(group) for group in min(starts, key=total)]
    for _ in range(_SWEEPS):
        if not _exchange(best, ranks, loss, _promising(gram, heads, best)[: _TRIALS * heads]):
            break
    return [sorted(group) for group in best]


def _promising(gram: Tensor, heads: int, groups: Groups) -> list[tuple[int, int]]:
    """Pairs of heads in different groups, those first whose exchange would bring most alike heads together.

    The guide is the share of one head's output energy that another's rows explain, ``‖C_ij‖² / (‖C_ii‖ ‖C_jj‖)``.
    """
    rows = len(gram) // heads
    norms = gram.reshape(heads, rows, heads, rows).permute(0, 2, 1, 3).square().sum((2, 3))
    own = norms.diagonal().sqrt().clamp(min=1e-300)
    alike = (norms / (own[:, None] * own[None])).tolist()
    group_of = {head: g for g, group in enumerate(groups) for head in group}

    def bond(head: int, group: int, without: int) -> float:
        return sum(alike[head][other] for other in groups[group] if other not in (head, without))

    def gain(one: int, other: int) -> float:
        a, b = group_of[one], group_of[other]
        return bond(one, b, other) + bond(other, a, one) - bond(one, a, other) - bond(other, b, one)

    pairs = [pair for pair in itertools.combinations(range(heads), 2) if group_of[pair[0]] != group_of[pair[1]]]
    return sorted(pairs, key=lambda pair: (-gain(*pair), pair))


def _exchange(
    groups: Groups,
    ranks: Sequence[int],
    loss: Callable[[Sequence[int], int], float],
    pairs: Sequence[tuple[int, int]],
) -> bool:
    """Exchange pairs of heads in place wherever that lowers the loss; return whether any was."""
    changed = False
    for one, other in pairs:
        a = next(g for g, group in enumerate(groups) if one in group)
        b = next(g for g, group in enumerate(groups) if other in group)
        if a == b:
            continue
        new_a = [other if head == one else head for head in groups[a]]
        new_b = [one if head == other else head for head in groups[b]]
        before = loss(groups[a], ranks[a]) + loss(groups[b], ranks[b])
        if loss(new_a, ranks[a]) + loss(new_b, ranks[b]) < before * (1 - 1e-12):
            groups[a], groups[b], changed = new_a, new_b, True
    return changed
