"""Cache layers that hold latents, one for each kind that transformers has, and how they come into a cache.

A latent has the shape of a single head, (batch, 1, tokens, width), and no stock layer looks at the meaning of the last
dimension. So each latent layer *is* the stock layer: growing, windows, static memory, selecting and moving are
transformers' own. Two things ride along:

* the **position** of every stored token, int32, kept by a second stock layer of the same kind that is driven in step.
  Keys are cached before rotation, and a slot's number does not tell its position: padding on the left shifts rows,
  masks may have holes, and callers may pass positions of their own.
* with codes (8, 4 or 3 bits), rows of bytes take the place of the latents, see :mod:`hf_lowbit.kernels.latent_codec`;
  the first tokens are, and the latest ones may be, kept in full beside them.

``generate`` makes its own ``DynamicCache`` or ``StaticCache``. A layer of it is replaced by its latent twin when an
attention module first uses it (:mod:`hf_lowbit.cache.adoption`), so no call has to change.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import (
    DynamicLayer,
    DynamicSlidingWindowLayer,
    StaticLayer,
    StaticSlidingWindowLayer,
)

from hf_lowbit.cache import padded
from hf_lowbit.cache.layout import Layout
from hf_lowbit.kernels.latent_codec import decode_rows, encode_rows

_ROOM = 64  # of so many tokens that are held, there is room for one more


class LatentLayer:
    """What latent layers add to the stock layer that is their second base.

    Attributes:
        layout: what is stored.
        visible_positions: (batch, tokens) int32, positions of what the last :meth:`update` returned, until they are
            used; None without rotary embeddings.
        latent_dtype: of the latents that came in; None before the first.
        first_slots: (batch,) slots of the rows' first tokens, where codes are kept of rows that are padded on the
            left; None where all rows begin with the first slot. See :mod:`hf_lowbit.cache.padded`.
    """

    layout: Layout
    visible_positions: Any
    _places: Any
    _recent: tuple[Tensor, Tensor] | None
    _first: tuple[Tensor, Tensor] | None
    latent_dtype: torch.dtype | None
    first_slots: Tensor | None
    _last_slot: int = 0  # the last of them

    def start(self, layout: Layout, places: Any) -> None:
        """Say what will be stored; ``places`` is an empty stock layer of the same kind."""
        self.layout, self._places = layout, places if layout.rotary else None
        self.visible_positions = self._recent = self._first = self.latent_dtype = self.first_slots = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store latents of new tokens.

        Args:
            key_states: (batch, 1, tokens, sum of key ranks).
            value_states: (batch, 1, tokens, sum of value ranks).
            args: ignored, as in the stock layers.
            kwargs: ``position_ids``, (1 or batch, tokens), where positions are kept.

        Returns:
            Latents, or rows of bytes, of all visible tokens, in the form in which they are stored.

        Raises:
            ValueError: they do not fit what the layer holds.
        """
        self._check(key_states, value_states, kwargs.get("position_ids"))
        self.latent_dtype = key_states.dtype
        if self._places is not None:
            positions = kwargs["position_ids"].to(key_states.device, torch.int32).expand(key_states.shape[0], -1)
            column = positions[:, None, :, None]
            self._places.record_past = getattr(self, "record_past", False)
            self.visible_positions = self._places.update(column, column[..., :0])[0][:, 0, :, 0]
        layout = self.layout
        if not layout.bits:
            return self._store(key_states, value_states)
        if layout.first:
            self._find_first(kwargs.get("position_ids"))
            self._remember_first(key_states, value_states)
        if layout.recent:
            self._remember(key_states, value_states)
        return self._store(
            encode_rows(key_states, layout.key_ranks, layout.bits),
            encode_rows(value_states, layout.value_ranks, layout.bits),
        )

    def _store(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        stored: tuple[Tensor, Tensor] = super().update(keys, values)  # type: ignore[misc]
        return stored

    def _check(self, keys: Tensor, values: Tensor, positions: Tensor | None) -> None:
        layout = self.layout
        expected = (1, sum(layout.key_ranks)), (1, sum(layout.value_ranks))
        found = tuple((states.shape[1], states.shape[-1]) for states in (keys, values))
        if found != expected:
            raise ValueError(
                f"{layout.name}: latents of shapes {tuple(keys.shape)} and {tuple(values.shape)} do not fit a cache "
                f"of widths {expected[0][1]} and {expected[1][1]}"
            )
        if self.latent_dtype is not None and keys.dtype != self.latent_dtype:
            raise ValueError(
                f"{layout.name}: the cache holds {self.latent_dtype} latents and was given {keys.dtype}; "
                "a model that changes its dtype needs a new cache"
            )
        held = self.batch
        if held is not None and keys.shape[0] != held:
            raise ValueError(
                f"{layout.name}: the cache holds a batch of {held} and was given one of {keys.shape[0]}; "
                "see batch_repeat_interleave and batch_select_indices of the cache"
            )
        shape = None if positions is None else tuple(positions.shape)
        if layout.rotary and shape not in ((1, keys.shape[2]), (keys.shape[0], keys.shape[2])):
            raise ValueError(
                f"{layout.name}: position_ids must be (1 or {keys.shape[0]}, {keys.shape[2]}) for latents that are "
                f"rotated when they are read, got {shape}"
            )

    def _find_first(self, positions: Tensor | None) -> None:
        """Look where rows begin, when the first tokens come; static layers take the first slots of all rows."""

    def _remember_first(self, keys: Tensor, values: Tensor) -> None:
        """Keep new tokens that are among the first; called before they are stored."""
        own: Any = self
        if self.first_slots is not None:
            self._remember_rows(keys, values, self.first_slots)
            return
        have = 0 if self._first is None else self._first[0].shape[2]
        if own.get_seq_length() == have < self.layout.first:
            fresh = [states[:, :, : self.layout.first - have].clone() for states in (keys, values)]
            if self._first is not None:
                fresh = [torch.cat(pair, dim=2) for pair in zip(self._first, fresh, strict=True)]
            self._first = fresh[0], fresh[1]

    def _remember_rows(self, keys: Tensor, values: Tensor, slots: Tensor) -> None:
        own: Any = self
        length, count = int(own.get_seq_length()), self.layout.first
        if self._first is None:
            sizes = [(keys.shape[0], 1, count, states.shape[-1]) for states in (keys, values)]
            self._first = keys.new_zeros(sizes[0]), values.new_zeros(sizes[1])
        if length < self._last_slot + count:
            fresh = [
                padded.remembered(held, states, slots, length)
                for held, states in zip(self._first, (keys, values), strict=True)
            ]
            self._first = fresh[0], fresh[1]

    def _remember(self, keys: Tensor, values: Tensor) -> None:
        fresh = keys, values
        if self._recent is not None:
            fresh = (torch.cat([self._recent[0], keys], dim=2), torch.cat([self._recent[1], values], dim=2))
        most = self._most_recent()
        self._recent = fresh[0][:, :, -most:].clone(), fresh[1][:, :, -most:].clone()

    def _most_recent(self) -> int:
        return self.layout.recent

    @property
    def batch(self) -> int | None:
        """Batch size of what is stored; None while nothing is."""
        keys = getattr(self, "keys", None)
        return None if keys is None or not keys.numel() else keys.shape[0]

    def recent(self, visible: int) -> tuple[Tensor, Tensor] | None:
        """Return what is kept in full, at most of the ``visible`` latest tokens; None if nothing is."""
        if self._recent is None or not self._recent[0].shape[2]:
            return None
        return self._recent[0][:, :, -visible:], self._recent[1][:, :, -visible:]

    def first(self, older: int) -> tuple[Tensor, Tensor] | None:
        """Return what is kept in full of the first tokens, at most of ``older`` ones; None if nothing is.

        They are those of the first slots; or, always ``layout.first``, those of each row from :attr:`first_slots` on,
        of which some may not have come yet.
        """
        if self._first is None or not older:
            return None
        if self.first_slots is not None:
            return self._first
        return self._first[0][:, :, :older], self._first[1][:, :, :older]

    def latents(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Return what :meth:`update` returned as latents: (batch, 1, tokens, width) each."""
        layout = self.layout
        if not layout.bits or self.latent_dtype is None:
            return keys, values
        keys = decode_rows(keys, layout.key_ranks, layout.bits, self.latent_dtype)
        values = decode_rows(values, layout.value_ranks, layout.bits, self.latent_dtype)
        recent, first = self.recent(keys.shape[2]), self.first(keys.shape[2])
        if first is not None and self.first_slots is not None:
            keys, values = (
                padded.overlaid(latents, full, self.first_slots)
                for latents, full in zip((keys, values), first, strict=True)
            )
        elif first is not None:
            keys = torch.cat([first[0], keys[:, :, first[0].shape[2] :]], dim=2)
            values = torch.cat([first[1], values[:, :, first[1].shape[2] :]], dim=2)
        if recent is not None:
            keys = torch.cat([keys[:, :, : -recent[0].shape[2]], recent[0]], dim=2)
            values = torch.cat([values[:, :, : -recent[1].shape[2]], recent[1]], dim=2)
        return keys, values

    def held(self) -> dict[str, list[Tensor]]:
        """Return every tensor of the layer by what it is: "latents" or "codes", "first", "recent", "positions"."""
        kind = "codes" if self.layout.bits else "latents"
        own: Any = self
        found = {kind: [own.keys, own.values] if own.is_initialized else []}
        found["first"] = [] if self._first is None else list(self._first)
        found["recent"] = [] if self._recent is None else list(self._recent)
        places = self._places
        found["positions"] = [places.keys] if places is not None and places.is_initialized else []
        found["positions"] += [] if self.first_slots is None else [self.first_slots]
        return found

    @property
    def stored_positions(self) -> Tensor:
        """Positions of all that is stored: (batch, tokens) int32."""
        positions: Tensor = self._places.keys[:, 0, :, 0]
        return positions

    def check_crop(self, tokens_to_remove: int) -> None:
        """Raise what ``crop`` would, and change nothing."""
        raise NotImplementedError

    # Kept in step ---------------------------------------------------------------------------------------------------

    def reset(self) -> None:
        """Empty the layer; it may then be filled with another batch or dtype, if it is not static."""
        super().reset()  # type: ignore[misc]
        if self._places is not None:
            self._places.reset()
        self.visible_positions = self._recent = None
        if isinstance(self, DynamicLayer):
            self.latent_dtype = self._first = self.first_slots = None
        elif self._first is not None:
            for states in self._first:
                states.zero_()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Select rows of the batch, with repetition; beam search does."""
        super().reorder_cache(beam_idx)  # type: ignore[misc]
        if self._places is not None:
            self._places.reorder_cache(beam_idx)
        self._select_full(lambda states: states.index_select(0, beam_idx.to(states.device)))

    def _select_full(self, select: Any) -> None:
        """Select rows of the batch of what is kept in full."""
        if self._recent is not None:
            self._recent = select(self._recent[0]), select(self._recent[1])
        if self._first is not None:
            self._first = select(self._first[0]), select(self._first[1])
        if self.first_slots is not None:
            self.first_slots = select(self.first_slots)


class _Growing(LatentLayer):
    """The part that both layers without a fixed length share."""

    def _find_first(self, positions: Tensor | None) -> None:
        own: Any = self
        if positions is not None and not own.get_seq_length() and not torch.compiler.is_compiling():
            self._begin_at(padded.first_slots(positions))

    def _begin_at(self, slots: Tensor | None) -> None:
        self.first_slots, self._last_slot = slots, 0 if slots is None else int(slots.max())

    def fill(self, parts: dict[str, Tensor], length: int, dtype: torch.dtype) -> None:
        """Fill the empty layer with what was saved of another one.

        Args:
            parts: checked before: "keys", "values", and where they are kept "positions", "recent_keys",
                "recent_values", "first_keys", "first_values" and "first_slots".
            length: tokens that the other layer had seen.
            dtype: of its latents.
        """
        own: Any = self
        own.lazy_initialization(parts["keys"], parts["values"])
        own.keys, own.values = parts["keys"], parts["values"]
        filled = [own]
        if self._places is not None:
            column = parts["positions"][:, None, :, None]
            self._places.lazy_initialization(column, column[..., :0])
            self._places.keys, self._places.values = column, column[..., :0]
            filled.append(self._places)
        for layer in filled:
            if hasattr(layer, "cumulative_length"):
                layer.cumulative_length = length
        if "recent_keys" in parts:
            self._recent = parts["recent_keys"], parts["recent_values"]
        if "first_keys" in parts:
            self._first = parts["first_keys"], parts["first_values"]
        if "first_slots" in parts:
            self._begin_at(parts["first_slots"].long())
        self.latent_dtype = dtype

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the latest tokens.

        Args:
            tokens_to_remove: 0 or negative, as for transformers' layers.

        Raises:
            ValueError: positive, or more tokens than there are to remove.
        """
        self.check_crop(tokens_to_remove)
        super().crop(tokens_to_remove)  # type: ignore[misc]
        if self._places is not None:
            self._places.record_past = getattr(self, "record_past", False)
            self._places.crop(tokens_to_remove)
        if tokens_to_remove and self._recent is not None:
            self._recent = self._recent[0][:, :, :tokens_to_remove], self._recent[1][:, :, :tokens_to_remove]
        own: Any = self
        left = int(own.get_seq_length())
        if not left:
            self.first_slots = None
        if self._first is not None and self.first_slots is None:
            self._first = (self._first[0][:, :, :left], self._first[1][:, :, :left]) if left else None

    def check_crop(self, tokens_to_remove: int) -> None:
        """Raise what :meth:`crop` would, and change nothing."""
        own: Any = self
        length = int(own.get_seq_length())
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes a negative number of tokens to remove, got {tokens_to_remove}")
        if -tokens_to_remove > length:
            raise ValueError(f"cannot crop {-tokens_to_remove} tokens from a cache of {length}")

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row of the batch."""
        super().batch_repeat_interleave(repeats)  # type: ignore[misc]
        if self._places is not None:
            self._places.batch_repeat_interleave(repeats)
        self._select_full(lambda states: states.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows of the batch."""
        super().batch_select_indices(indices)  # type: ignore[misc]
        if self._places is not None:
            self._places.batch_select_indices(indices)
        self._select_full(lambda states: states[indices])


class LatentDynamicLayer(_Growing, DynamicLayer):
    """Grows with every token.

    The stock layer copies all that it holds for each new token, which takes as long as attending to it. Here a token
    is written behind the others while there is room; when there is none, all is copied to memory with room for one
    token in 64 (none below that many). The room is counted as held.
    """

    # Who may write behind what is held: not a shallow copy of the layer, which shares its memory.
    _writer: Any = None

    def _store(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        own: Any = self
        if not own.is_initialized or not own.keys.numel() or not _may_append(keys, values, own.keys):
            self._writer = None
            return super()._store(keys, values)
        may_write = self._writer is self
        own.keys, own.values = _appended(own.keys, keys, may_write), _appended(own.values, values, may_write)
        self._writer = self
        return own.keys, own.values

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the latest tokens, see :meth:`_Growing.crop`; whoever still refers to them keeps them."""
        super().crop(tokens_to_remove)
        self._writer = None


def _may_append(keys: Tensor, values: Tensor, held: Tensor) -> bool:
    """Return whether one token comes in that nothing but the layer has to see."""
    if keys.shape[2] != 1 or torch.compiler.is_compiling() or keys.requires_grad or values.requires_grad:
        return False
    return not held.requires_grad and held.is_inference() == torch.is_inference_mode_enabled()


def _appended(held: Tensor, new: Tensor, may_write: bool) -> Tensor:
    """Return tokens (batch, 1, tokens, width) with one more, behind the others in their memory if it has room."""
    batch, _, tokens, width = held.shape
    starts = may_write and width and held.stride()[2:] == (width, 1) and not held.storage_offset()
    room = held.stride(0) // width if starts else 0
    if room <= tokens or held.untyped_storage().nbytes() < batch * room * width * held.element_size():
        memory = held.new_empty(batch, 1, tokens + 1 + tokens // _ROOM, width)
        memory[:, :, :tokens] = held
    else:
        memory = held.as_strided((batch, 1, room, width), (room * width, room * width, width, 1))
    memory[:, :, tokens : tokens + 1] = new
    return memory[:, :, : tokens + 1]


class LatentSlidingLayer(_Growing, DynamicSlidingWindowLayer):
    """Keeps the latest tokens of a sliding window."""

    keys: Any
    values: Any

    def start(self, layout: Layout, places: Any) -> None:
        """Say what will be stored; the first tokens leave the window like all others, and are not kept."""
        super().start(dataclasses.replace(layout, first=0), places)

    def _store(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        stored = super()._store(keys, values)
        if not self.record_past:
            # The stock layer keeps views, and with them the memory of all that they are views of.
            self.keys, self.values = self.keys.clone(), self.values.clone()
            if self._places is not None:
                self._places.keys = self._places.keys.clone()
        return stored

    def _most_recent(self) -> int:
        return min(self.layout.recent, self.sliding_window - 1)

    def check_crop(self, tokens_to_remove: int) -> None:
        """Raise what :meth:`crop` would, and change nothing."""
        super().check_crop(tokens_to_remove)
        removed, stored = -tokens_to_remove, 0 if self.batch is None else self.keys.shape[2]
        remaining = self.cumulative_length - removed
        if removed and min(self.sliding_window - 1, remaining) > stored - removed:
            raise ValueError(
                f"cannot crop {removed} tokens: a window of {self.sliding_window} keeps the last {stored} only; call "
                "activate_past_recording() on the cache before the tokens that may be cropped"
            )


class FixedLayer(LatentLayer):
    """The part that both static layers share."""

    def crop(self, tokens_to_remove: int) -> None:
        """Refuse: the length of a static layer is fixed.

        Raises:
            ValueError: always, unless there is nothing to remove.
        """
        self.check_crop(tokens_to_remove)

    def check_crop(self, tokens_to_remove: int) -> None:
        """Raise what :meth:`crop` would."""
        if tokens_to_remove:
            raise ValueError("a static cache cannot be cropped; use a dynamic one for decoding that takes tokens back")

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Refuse: the memory of a static layer is fixed.

        Raises:
            ValueError: always.
        """
        raise ValueError("a static cache cannot change its batch; use a dynamic one")

    def batch_select_indices(self, indices: Tensor) -> None:
        """Refuse: the memory of a static layer is fixed.

        Raises:
            ValueError: always.
        """
        raise ValueError("a static cache cannot change its batch; use a dynamic one")


class LatentStaticLayer(FixedLayer, StaticLayer):
    """Memory for a fixed number of tokens, so that decoding can be compiled."""

    def _remember_first(self, keys: Tensor, values: Tensor) -> None:
        count = min(self.layout.first, self.max_cache_len)
        if self._first is None:
            sizes = [(keys.shape[0], 1, count, states.shape[-1]) for states in (keys, values)]
            self._first = keys.new_zeros(sizes[0]), values.new_zeros(sizes[1])
        # The number of tokens is a tensor here: which of the new ones belongs to a place is computed, not asked.
        wanted = torch.arange(count, device=keys.device) - self.cumulative_length.to(keys.device)
        new = ((wanted >= 0) & (wanted < keys.shape[2]))[:, None]
        source = wanted.clamp(0, keys.shape[2] - 1)
        for held, states in zip(self._first, (keys, values), strict=True):
            held.copy_(torch.where(new, states.index_select(2, source), held))


class LatentStaticSlidingLayer(FixedLayer, StaticSlidingWindowLayer):
    """The same for the latest tokens of a sliding window."""

    def start(self, layout: Layout, places: Any) -> None:
        """Say what will be stored; the first tokens leave the window like all others, and are not kept."""
        super().start(dataclasses.replace(layout, first=0), places)
