"""adaCR: a ratio for each decoder block, from what the block does to its input, within one budget.

======  ============  ===============================================================================
paper   here          meaning
======  ============  ===============================================================================
I_n     importance    of a decoder block, from the mean cosine of its input and output; mean 1
trr     ratio         share of all parameters kept
mrr     low           least share kept of a block
CR      ratios        share kept of each block
======  ============  ===============================================================================

Source: AdaSVD (arXiv 2502.01403), Eq. 18-21.
Differs: the paper's text says cosine, its figures show the opposite order; ``1 - cos`` is the default. Its map has no
upper end and need not meet the budget: ratios are cut at 1, and what that leaves over goes to the other blocks. Ranks
are whole numbers, so the budget is then filled up, rank by rank, as far as it goes.
"""

from __future__ import annotations

from collections.abc import Sequence

from hf_lowbit.methods.adasvd.options import rank_of, stays_dense

Shapes = Sequence[tuple[int, int]]


def ratios_within_budget(
    importance: Sequence[float], sizes: Sequence[int], ratio: float, low: float, high: float = 1.0
) -> list[float]:
    """Ratio of every block: more for important ones, ``ratio`` on average over all parameters.

    Args:
        importance: one number per block, mean 1.
        sizes: parameters of each block, > 0.
        ratio: budget, above 0 and at most 1.
        low: least ratio, at most ``ratio``.
        high: largest ratio, at least ``ratio``.

    Returns:
        Ratios from ``low`` to ``high`` with ``Σ size · ratio`` equal to the budget up to rounding.
    """
    ratios = [min(max(low + value * (ratio - low), low), high) for value in importance]
    budget = ratio * sum(sizes)
    for _ in range(len(sizes) + 1):  # each round ends, or cuts one more block
        spare = budget - sum(size * share for size, share in zip(sizes, ratios, strict=True))
        if abs(spare) <= 1e-12 * budget:
            break
        free = [i for i in range(len(sizes)) if ratios[i] < high or spare < 0]
        above = sum(sizes[i] * (ratios[i] - low) for i in free)
        total = sum(sizes[i] for i in free)
        for i in free:
            more = spare * (ratios[i] - low) / above if above > 0 else spare / total
            ratios[i] = min(max(ratios[i] + more, low), high)
    return ratios


def kept(shapes: Shapes, ratio: float, multiple: int) -> int:
    """Parameters that the layers of a block keep; all of a layer that stays dense."""
    return sum(
        shape[0] * shape[1] if stays_dense(shape, ratio, multiple) else rank_of(shape, ratio, multiple) * sum(shape)
        for shape in shapes
    )


def filled(
    ratios: Sequence[float], blocks: Sequence[Shapes], budget: float, multiple: int, high: float = 1.0
) -> list[float]:
    """Raise ratios until no layer of any block can have a higher rank within the budget.

    Args:
        ratios: of every block; their ranks, rounded down, leave something of the budget.
        blocks: shapes of the layers of each block.
        budget: parameters in all.
        multiple: of which ranks are multiples.
        high: no ratio is raised above it, nor to 1.

    Returns:
        Ratios at which layers reach those ranks. The block that is nearest to its next rank is raised first; one that
        would not fit stays as it is. What remains is less than one rank of the layers that share a step.
    """
    found = list(ratios)
    left = budget - sum(kept(shapes, share, multiple) for shapes, share in zip(blocks, found, strict=True))
    open_blocks = set(range(len(found)))
    while open_blocks:
        steps = {i: _next_ratio(blocks[i], found[i], multiple) for i in open_blocks}
        i = min(open_blocks, key=lambda i: (steps[i] - found[i], i))
        cost = kept(blocks[i], steps[i], multiple) - kept(blocks[i], found[i], multiple)
        if steps[i] >= 1.0 or steps[i] > high or cost > left:
            open_blocks.remove(i)
            continue
        found[i], left = steps[i], left - cost
    return found


def _next_ratio(shapes: Shapes, ratio: float, multiple: int) -> float:
    """Least ratio at which a layer of a block has a higher rank than at ``ratio``; above 1 if there is none."""
    steps = [
        (rank_of((rows, columns), ratio, multiple) // multiple + 1) * multiple * (rows + columns) / (rows * columns)
        for rows, columns in shapes
        if not stays_dense((rows, columns), ratio, multiple)
    ]
    return min(steps, default=2.0)


def highest_factored(blocks: Sequence[Shapes], multiple: int) -> float:
    """Return a ratio up to which every layer of every block saves something as factors; 0 if one never does."""
    highest = 1.0
    for rows, columns in {shape for shapes in blocks for shape in shapes}:
        most = (rows * columns - 1) // (rows + columns) // multiple * multiple
        highest = min(highest, most * (rows + columns) / (rows * columns))
    return highest
