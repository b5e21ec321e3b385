"""What a cache layer of latents stores, and for which attention module."""

from __future__ import annotations

import dataclasses

from hf_lowbit.kernels.latent_codec import WORDS


@dataclasses.dataclass(frozen=True)
class Layout:
    """What a layer stores for a token, and for which attention module.

    Attributes:
        name: of the attention module, for messages.
        key_ranks: width of the keys' latent, group by group.
        value_ranks: of the values'.
        stamp: of the two projections; a layer serves no other ones.
        rotary: whether positions are kept.
        bits: of a code, 8, 4 or 3; 0 keeps latents as they are.
        recent: how many of the latest tokens are kept in full beside their codes.
        first: how many of the first tokens are, which most of the attention of later ones goes to (its "sinks").
    """

    name: str
    key_ranks: tuple[int, ...]
    value_ranks: tuple[int, ...]
    stamp: str
    rotary: bool
    bits: int = 0
    recent: int = 0
    first: int = 0


def check_codes(bits: int | None, recent: int, first: int) -> None:
    """Check options of latents in codes.

    Raises:
        ValueError: they are out of range, or a window is asked for where all tokens are kept in full anyway.
    """
    if bits is not None and (type(bits) is not int or bits not in WORDS):
        raise ValueError(f"latent_bits must be None or one of {', '.join(map(str, sorted(WORDS)))}, got {bits!r}")
    if type(recent) is not int or recent < 0:
        raise ValueError(f"recent_window must be an integer from 0, got {recent!r}")
    if type(first) is not int or first < 0:
        raise ValueError(f"sink_tokens must be an integer from 0, got {first!r}")
    if recent and bits is None:
        raise ValueError(f"recent_window={recent} needs latent_bits: without codes every token is kept in full")
