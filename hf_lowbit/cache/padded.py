"""The first tokens of rows that are padded on the left: they lie at another slot in each row.

The first tokens are kept in full beside their codes, since much attention goes to them. In a batch of prompts of
different lengths the first slots of the shorter rows hold padding; what is kept for such a row begins with its own
first token, so that it is answered as it would be alone. If a prompt comes in pieces, the first piece decides: a row
of which that holds padding only keeps codes of most of its first tokens, or of all.
"""

from __future__ import annotations

import torch
from torch import Tensor


def first_slots(positions: Tensor) -> Tensor | None:
    """Return the slot of the first token of each row, None if it is the first slot in all of them.

    Args:
        positions: (batch, tokens), integer, of a cache's first tokens: 0 for a row's first token, then 1; padding has
            0 or 1, whichever the version of transformers gives it.

    Returns:
        (batch,), int64.
    """
    zero = positions == 0
    begins = zero & torch.nn.functional.pad(positions[:, 1:] == 1, (0, 1))
    tokens = positions.shape[1]
    last_zero = tokens - 1 - zero.flip(1).int().argmax(1)  # a row of a single token, behind padding
    slots = torch.where(begins.any(1), begins.int().argmax(1), torch.where(zero.any(1), last_zero, 0))
    return slots.long() if bool(slots.any()) else None


def is_first(slots: Tensor, count: int, tokens: int) -> Tensor:
    """Return which of ``tokens`` slots hold one of the ``count`` first tokens of their row: (batch, tokens)."""
    away = torch.arange(tokens, device=slots.device) - slots[:, None]
    return (away >= 0) & (away < count)


def remembered(held: Tensor, states: Tensor, slots: Tensor, length: int) -> Tensor:
    """Return the first tokens of each row with those among new tokens put in.

    Args:
        held: (batch, 1, count, width), what is kept so far.
        states: (batch, 1, tokens, width), new.
        slots: (batch,), of each row's first token.
        length: tokens that came before the new ones.
    """
    place = slots[:, None] + torch.arange(held.shape[2], device=slots.device) - length  # among the new tokens
    new = (place >= 0) & (place < states.shape[2])
    index = place.clamp(0, states.shape[2] - 1)[:, None, :, None].expand(-1, -1, -1, states.shape[3])
    return torch.where(new[:, None, :, None], states.gather(2, index), held)


def overlaid(latents: Tensor, full: Tensor, slots: Tensor) -> Tensor:
    """Return latents (batch, 1, tokens, width) with each row's first tokens as they are kept in full."""
    tokens, count = latents.shape[2], full.shape[2]
    place = (torch.arange(tokens, device=slots.device) - slots[:, None]).clamp(0, count - 1)
    index = place[:, None, :, None].expand(-1, -1, -1, full.shape[3])
    return torch.where(is_first(slots, count, tokens)[:, None, :, None], full.gather(2, index), latents)


def shown(mask: Tensor | None, keep: Tensor) -> Tensor:
    """Return a mask of scores that also hides what ``keep`` (batch, tokens) leaves out.

    Args:
        mask: (1 or batch, 1 or heads, tokens), boolean or added to the scores; None shows everything.
        keep: (batch, tokens), boolean.
    """
    keep = keep[:, None]
    if mask is None:
        return keep
    return mask & keep if mask.dtype == torch.bool else mask.masked_fill(~keep, -torch.inf)
