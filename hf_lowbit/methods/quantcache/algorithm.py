"""QuantCache's formulas, from tensors and numbers to numbers (arXiv 2503.06545).

| symbol | name here |
|---|---|
| p_t, p_t' | ``new``, ``old``: the residual of the measured block at this step and at the last computed one |
| k | ``distance``: steps between them |
| D | ``divergence`` |
| m | ``motion`` |
| tau, delta_1, delta_2 | an interval, ``deltas`` |
| theta_1, theta_2 | ``thetas`` |
| S | ``similarity`` |

The paper's values are not public and its code neither; the nearest public relative is AdaCache, whose constants are
used where a formula of the paper comes from it. Every sum over a large tensor is made piece by piece, so that none of
these functions needs memory of the size of its inputs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

# Rows of a piece hold about this many elements: a few megabytes, whatever the video.
_PIECE = 1 << 20
# AdaCache's constants: motion is (m / 0.385)^8, its change counts tenfold, both in the middle of a trajectory only.
_MOTION_SCALE, _MOTION_POWER, _GRADIENT_WEIGHT = 0.385, 8, 10.0
_MOTION_WINDOW = (0.1, 0.9)
_INT8_MAX = 127


def _pieces(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yield tensors of one shape (..., width) in pieces of rows, in float32."""
    rows = [tensor.reshape(-1, tensor.shape[-1]) for tensor in tensors]
    step = max(1, _PIECE // max(1, rows[0].shape[1]))
    for start in range(0, rows[0].shape[0], step):
        yield tuple(row[start : start + step].float() for row in rows)


def _sum(parts: list[Tensor], like: Tensor) -> Tensor:
    return torch.stack(parts).double().sum(0) if parts else torch.zeros((), dtype=torch.float64, device=like.device)


def relative_change(new: Tensor, old: Tensor) -> Tensor:
    """Return ``|new - old|_1 / |old|_1`` as a float64 scalar tensor, infinite where ``old`` is zero.

    Args:
        new: any shape, floating.
        old: the same shape.

    Returns:
        (), float64, on the device of the inputs; nothing waits for the device. NaN stays NaN.

    Source: Eq. (5), first factor.  Differs: relative, as in AdaCache; the printed norm grows with the size of the
    tensor, so that no threshold would fit two videos. Division by the distance is left to :func:`divergence`.
    """
    parts = [torch.stack([(a - b).abs().sum(), b.abs().sum()]) for a, b in _pieces(new, old)]
    if not parts:
        return torch.zeros((), dtype=torch.float64, device=new.device)
    change, size = _sum(parts, new)
    return torch.where(size == 0, torch.full_like(size, math.inf), change / size)


def motion(features: Tensor, num_frames: int) -> Tensor:
    """Return how much features differ from frame to frame, from 0 (still) to 1.

    Args:
        features: (batch, num_frames * tokens per frame, width), tokens in the order of frames.
        num_frames: frames after patching, at least 2, dividing the tokens.

    Returns:
        (), float64: ``|p[1:] - p[:-1]|_1 / (|p[1:]|_1 + |p[:-1]|_1)``, 0 for zeros.

    Raises:
        ValueError: the tokens are no multiple of the frames.

    Source: Section "hierarchical latent caching", inter-frame gradient; the formula is AdaCache's (stride 1).
    """
    batch, tokens, width = features.shape
    if num_frames < 2 or tokens % num_frames:
        raise ValueError(f"{tokens} tokens are not those of {num_frames} frames")
    frames = features.reshape(batch, num_frames, -1, width)
    parts = []
    for i in range(1, num_frames):
        for a, b in _pieces(frames[:, i], frames[:, i - 1]):
            parts.append(torch.stack([(a - b).abs().sum(), a.abs().sum() + b.abs().sum()]))
    change, size = _sum(parts, features)
    return torch.where(size == 0, torch.zeros_like(size), change / size)


def divergence(
    change: float,
    distance: int,
    mode: str = "none",
    now: float | None = None,
    before: float | None = None,
    progress: float = 0.5,
) -> float:
    """Return D, how fast the features of the measured block change per step.

    Args:
        change: :func:`relative_change` since the last computed step.
        distance: steps since then, at least 1.
        mode: "none", "adacache" or "paper".
        now: :func:`motion` of the new features; None counts as mode "none".
        before: motion at the last computed step, None if it was not measured.
        progress: share of the trajectory that is done, for "adacache".

    Returns:
        At least 0, or infinite, or NaN if ``change`` is.

    Source: Eq. (5).  Differs: "none" leaves out the factor of motion, which makes D zero for any steady motion,
    however wrong the cache is; "adacache" adds motion and its change, with AdaCache's constants; "paper" is the
    product as printed, with the relative norm.
    """
    rate = change / distance
    if mode == "none" or now is None:
        return rate
    if mode == "paper":
        return rate * (abs(now - before) / distance if before is not None else 1.0)

    def scaled(value: float) -> float:
        inside = _MOTION_WINDOW[0] <= progress <= _MOTION_WINDOW[1]
        return (value / _MOTION_SCALE) ** _MOTION_POWER if inside else 1.0

    gradient = (scaled(now) - scaled(before)) / distance if before is not None else 0.0
    return rate * (scaled(now) + abs(_GRADIENT_WEIGHT * gradient))


def interval(value: float, intervals: Sequence[int], deltas: Sequence[float]) -> int:
    """Return the distance to the next computed step.

    Args:
        value: D. NaN counts as large: nothing is reused of what is broken.
        intervals: (longest, middle, shortest).
        deltas: (delta_1, delta_2), rising.

    Source: Eq. (6).
    """
    longest, middle, shortest = intervals
    if value < deltas[0]:
        return longest
    return middle if value < deltas[1] else shortest


def default_intervals(steps: int) -> tuple[int, int, int]:
    """Return (longest, middle, shortest) for a trajectory: 12, 8 and 4 of 100 steps, at least 1.

    Source: none; three levels of AdaCache's table of 100 steps, in proportion.
    """
    longest, middle, shortest = (max(1, round(share * steps)) for share in (0.12, 0.08, 0.04))
    return longest, middle, shortest


def default_deltas(steps: int) -> tuple[float, float]:
    """Return (delta_1, delta_2) for a trajectory: 0.05 and 0.09 for 100 steps; fewer steps are further apart."""
    return 5 / steps, 9 / steps


def bits_by_redundancy(change: float | None, length: int, bits: Sequence[int], thetas: Sequence[float]) -> int:
    """Return activation bits for a computed step: few where hardly anything is expected to have changed.

    Args:
        change: the last D without motion (relative change per step), None before there is one.
        length: the interval it led to.
        bits: (many, middle, few).
        thetas: (theta_1, theta_2), rising.

    Source: Eq. (8).  Differs: its D_t is read as a similarity, ``1 - min(1, change * length)``, as the prose around it
    does; with the divergence of Eq. (5) the rule would give fast changes the fewest bits.
    """
    many, middle, few = bits
    if change is None or not change * length >= 0:  # NaN, or an infinite change over no steps
        return many
    similarity = 1 - min(1.0, change * length)
    if similarity < thetas[0]:
        return many
    return middle if similarity < thetas[1] else few


def bits_after_skip(length: int | None, intervals: Sequence[int], bits: Sequence[int]) -> int:
    """Return activation bits for a computed step from the interval that the last one decided on: long, many bits.

    Args:
        length: that interval, None before there is one.
        intervals: (longest, middle, shortest).
        bits: (many, middle, few).

    Source: the remark after Eq. (8), with its second "fewer bits" read as "more": what a long skip ends in is reused
    longest. It opposes Eq. (8); both are offered.
    """
    many, middle, few = bits
    if length is None or length >= intervals[0]:
        return many
    return middle if length >= intervals[1] else few


def similarity(before: Tensor, after: Tensor) -> Tensor:
    """Return the mean cosine of a block's input and output over the tokens.

    Args:
        before: (..., width), floating.
        after: the same shape.

    Returns:
        (), float64. Tokens that are zero on one side count as 0; no tokens at all give 0.

    Source: Eq. (9), read for the residual stream: there the features of layers l and l + 1 are the input and output of
    a block.
    """
    parts = [torch.nn.functional.cosine_similarity(a, b, dim=-1, eps=1e-12).sum() for a, b in _pieces(before, after)]
    return _sum(parts, before) / max(1, before[..., 0].numel())


def to_int8(values: Tensor) -> tuple[Tensor, Tensor]:
    """Return a copy of eight bits with a scale per token.

    Args:
        values: (..., width), floating, finite.

    Returns:
        (..., width) int8 and (..., 1) float32; the error is at most half a scale, 0.4 % of the token's maximum.
    """
    scale = values.abs().amax(-1, keepdim=True).float() / _INT8_MAX
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    return (values / scale).round_().clamp_(-_INT8_MAX, _INT8_MAX).to(torch.int8), scale


def from_int8(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Return what :func:`to_int8` has kept, in ``dtype``."""
    return (codes * scale).to(dtype)


def extrapolation_weights(places: Sequence[float], at: float) -> list[float]:
    """Return the weights of the values at ``places`` in the polynomial through them, at another place.

    Args:
        places: distinct; one gives the value itself, two a line, three a parabola.
        at: where the polynomial is wanted.

    Source: none; Lagrange's form. The paper reuses the last value, which is one place.
    """
    return [
        math.prod((at - other) / (place - other) for j, other in enumerate(places) if j != i)
        for i, place in enumerate(places)
    ]


def cache_bytes(shapes: Sequence[Sequence[int]], itemsize: int, copies: int = 1, int8: bool = False) -> int:
    """Return the bytes that the cache of one context holds.

    Args:
        shapes: of each cached residual: for the whole stack that of the hidden states (and that of the second stream
            of joint attention), by block those of every block.
        itemsize: bytes of an element of the activations.
        copies: how many computed steps are kept: 1, or one more per order of extrapolation.
        int8: whether they are kept in eight bits, with a float32 scale per token.

    Source: ``tokens * width * 2`` bytes for the whole stack in 16 bits.
    """
    each = 0
    for shape in shapes:
        elements = math.prod(shape)
        each += elements + 4 * (elements // shape[-1]) if int8 else elements * itemsize
    return copies * each
