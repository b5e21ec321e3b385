"""Clips of one coloured shape that moves over a dark ground, made as they are needed, and prompts that name them."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

FRAMES, CHANNELS, SIZE = 8, 3, 16
GROUND = -0.8
COLOURS = {"red": (1, -1, -1), "green": (-1, 1, -1), "blue": (-1, -1, 1), "yellow": (1, 1, -1)}
SHAPES = ("square", "disc", "plus")
DIRECTIONS = {"right": (1, 0), "left": (-1, 0), "down": (0, 1), "up": (0, -1)}
WORDS = (*COLOURS, *SHAPES, *DIRECTIONS)
EMBEDDING = 32
_TABLE_SEED = 1234


def _table() -> Tensor:
    """Return the frozen embeddings of all words, (12, 32); the last one stands for no prompt."""
    return torch.randn(len(WORDS) + 1, EMBEDDING, generator=torch.Generator().manual_seed(_TABLE_SEED))


def embed(words: Tensor) -> Tensor:
    """Return prompt embeddings, (batch, 3, 32), of indices into :data:`WORDS`, (batch, 3); -1 is no word."""
    return _table()[words]


def indices(prompts: Iterable[Sequence[str]]) -> Tensor:
    """Return prompts as indices into :data:`WORDS`, (batch, 3).

    Raises:
        ValueError: a prompt is not a colour, a shape and a direction.
    """
    found = []
    for prompt in prompts:
        kinds = (COLOURS, SHAPES, DIRECTIONS)
        if len(prompt) != len(kinds) or not all(word in kind for word, kind in zip(prompt, kinds, strict=True)):
            raise ValueError(
                f"prompt is {prompt!r}; it must be a colour, a shape and a direction of {', '.join(WORDS)}"
            )
        found.append([WORDS.index(word) for word in prompt])
    if not found:
        raise ValueError("there is no prompt")
    return torch.tensor(found)


def draw_words(count: int, generator: torch.Generator) -> Tensor:
    """Draw prompts: (count, 3) indices of a colour, a shape and a direction."""
    columns, start = [], 0
    for kind in (COLOURS, SHAPES, DIRECTIONS):
        columns.append(start + torch.randint(len(kind), (count,), generator=generator))
        start += len(kind)
    return torch.stack(columns, 1)


def render(words: Tensor, start: Tensor) -> Tensor:
    """Return the clips of prompts.

    Args:
        words: (batch, 3) indices into :data:`WORDS`.
        start: (batch, 2) place of the shape's middle in the first frame, x and y in pixels.

    Returns:
        (batch, 3, 8, 16, 16) in [-1, 1]: channels, frames, rows, columns. What leaves on one side enters on the other.
    """
    colour = 0.9 * torch.tensor([*COLOURS.values()], dtype=torch.float32)[words[:, 0]]
    shape = words[:, 1] - len(COLOURS)
    step = torch.tensor([*DIRECTIONS.values()], dtype=torch.float32)[words[:, 2] - len(COLOURS) - len(SHAPES)]
    middle = start[:, None] + step[:, None] * torch.arange(FRAMES)[:, None]  # (batch, frames, 2)
    pixels = torch.arange(SIZE, dtype=torch.float32)
    half = SIZE / 2
    across = ((pixels - middle[..., :1] + half) % SIZE - half).abs()[:, :, None, :]
    along = ((pixels - middle[..., 1:] + half) % SIZE - half).abs()[:, :, :, None]
    square = _edge(3.0 - torch.maximum(across, along))
    disc = _edge(3.4 - torch.hypot(across, along))
    plus = torch.maximum(
        _edge(4.0 - across) * _edge(1.4 - along),
        _edge(1.4 - across) * _edge(4.0 - along),
    )
    found = torch.stack([square, disc, plus], 1)
    cover = found[torch.arange(len(words)), shape][:, None]  # (batch, 1, frames, rows, columns)
    return GROUND + cover * (colour[:, :, None, None, None] - GROUND)


def _edge(distance: Tensor) -> Tensor:
    """Return how much of a pixel is covered that lies so far inside of an edge."""
    return distance.clamp(0, 1)


def clips(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw prompts and their clips: (count, 3) words and (count, 3, 8, 16, 16)."""
    words = draw_words(count, generator)
    return words, render(words, SIZE * torch.rand(count, 2, generator=generator))
