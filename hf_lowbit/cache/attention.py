"""Attention over latents: the forward pass that takes the place of a model's own, and one step of decoding.

An attention module stays the object that it is; its class becomes one derived from its own (so that whoever asks
``isinstance`` is answered as before) whose forward pass stores ``D x`` in the cache and rebuilds what it needs:

* several tokens at once (a prompt, a draft to be checked, training): keys and values are rebuilt and handed to the
  attention function that the user chose, with the mask that transformers made for it;
* one token: :func:`decode`, one op on what the cache stores. Values are summed as latents and expanded once, keys are
  rebuilt by the op, which a kernel does on the way.

Cached keys are rotated when they are read, with the frequencies of that moment. Rotary embeddings that change their
frequencies with the length of a text ("dynamic" ones) therefore turn all keys anew, where a dense cache keeps those of
the moment of writing: beyond the trained length the results differ. Those of Phi 3 ("longrope") do not, since its
``generate`` empties the cache when they change; a cache that was passed in is not used from then on.

Source: ReCalKV (arXiv 2505.24357), Palu (arXiv 2407.21118) for caching keys before rotation.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from hf_lowbit.cache import padded
from hf_lowbit.cache.adoption import claim
from hf_lowbit.cache.layers import LatentLayer
from hf_lowbit.cache.layout import Layout, check_codes
from hf_lowbit.cache.projection import LatentProjection, become, is_latent
from hf_lowbit.kernels import latent_attention
from hf_lowbit.kernels.latent_codec import SINK_TOKENS

# With another implementation than these and "sdpa" a single token, too, goes through the function that was asked for.
_FLASH = ("flash_attention_2", "flash_attention_3", "flash_attention_4")

NO_PAGES = (
    "continuous batching keeps dense keys and values in pages and would leave the cache as large as it was; use "
    'generate() without cache_implementation="paged"'
)


@dataclasses.dataclass(frozen=True)
class Structure:
    """What an attention module consists of besides its two projections; found by :mod:`hf_lowbit.cache.adapters`.

    Attributes:
        name: of the module.
        output: name of the output projection.
        heads: number of query heads.
        kv_heads: number of key heads.
        rotary: module that holds the frequencies of the rotary embeddings, None without them.
        prefix: of the names of its buffers, where it has one set for each kind of layer.
        norm_shift: what the weight of the key norm lacks to the factor that it stands for (1 for Gemma).
        eager: the model's own attention function for the implementation "eager".
    """

    name: str
    output: str
    heads: int
    kv_heads: int
    rotary: Any
    prefix: str
    norm_shift: float
    eager: Callable[..., Any]

    def frequencies(self, device: torch.device) -> tuple[Tensor, float]:
        """Return frequencies and scale of the rotary embeddings as they are now; models for long texts change them."""
        frequencies: Tensor = getattr(self.rotary, f"{self.prefix}inv_freq")
        return frequencies.to(device), float(getattr(self.rotary, f"{self.prefix}attention_scaling"))


class LatentAttention:
    """First base of every converted class; the second is the model's own."""

    latent_structure: Structure
    latent_bits: int
    recent_window: int
    sink_tokens: int

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Any = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend; arguments and results are those of the class that was converted."""
        own: Any = self
        structure = self.latent_structure
        self._check_call(kwargs)
        query = own.q_proj(hidden_states).unflatten(-1, (structure.heads, -1)).transpose(1, 2)
        if hasattr(own, "q_norm"):
            query = own.q_norm(query)
        if structure.rotary is not None and position_embeddings is not None:
            query = latent_attention.rotate(query, *position_embeddings)
        keys, values = own.k_proj(hidden_states, "latent"), own.v_proj(hidden_states, "latent")

        layer = None
        if past_key_values is not None:
            layer = claim(past_key_values, own.layer_idx, self.latent_layout())
            keys, values = past_key_values.update(keys, values, own.layer_idx, position_ids=kwargs.get("position_ids"))
        weights = None
        if layer is not None and self._can_decode(query, layer, attention_mask):
            out = decode(self, query, layer, keys, values, attention_mask).unsqueeze(1)
        else:
            out, weights = self._attend(query, keys, values, layer, position_embeddings, attention_mask, kwargs)
        if layer is not None:
            layer.visible_positions = None  # those of a long prompt take memory, too
        return getattr(own, structure.output)(out.flatten(2)), weights

    def _check_call(self, kwargs: dict[str, Any]) -> None:
        own: Any = self
        if kwargs.get("cache") is not None:
            raise NotImplementedError(f"{self.latent_structure.name}: {NO_PAGES}")
        for name in ("k_proj", "v_proj"):
            projection = getattr(own, name)
            if not isinstance(projection, LatentProjection):
                raise TypeError(
                    f"{self.latent_structure.name}.{name} is a {type(projection).__name__} and gives no latents; "
                    "adapters and other replacements may take q_proj and the output projection, not keys and values"
                )

    def latent_layout(self) -> Layout:
        """Return what a cache keeps for this module; made once, when the weights are there."""
        own: Any = self
        layout: Layout | None = own.__dict__.get("_latent_layout")
        if layout is None:
            layout = Layout(
                name=self.latent_structure.name,
                key_ranks=own.k_proj.spec.ranks,
                value_ranks=own.v_proj.spec.ranks,
                stamp=own.k_proj(None, "stamp") + own.v_proj(None, "stamp"),
                rotary=self.latent_structure.rotary is not None,
                bits=self.latent_bits,
                recent=self.recent_window if self.latent_bits else 0,
                first=self.sink_tokens if self.latent_bits else 0,
            )
            own._latent_layout = layout
        return layout

    def latent_groups(self) -> list[list[int]]:
        """Return the group of each head and the rank of each group, of keys and of values; made once."""
        own: Any = self
        groups: list[list[int]] | None = own.__dict__.get("_latent_groups")
        if groups is None:
            specs = own.k_proj.spec, own.v_proj.spec
            groups = own._latent_groups = [list(part) for spec in specs for part in (spec.group_of_head, spec.ranks)]
        return groups

    def _attend(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        layer: LatentLayer | None,
        position_embeddings: tuple[Tensor, Tensor] | None,
        attention_mask: Any,
        kwargs: dict[str, Any],
    ) -> tuple[Tensor, Tensor | None]:
        """Rebuild keys and values and call the attention function that the user chose."""
        # Not at the top: when this module is loaded, the package registers, for which it needs this module.
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        own: Any = self
        structure = self.latent_structure
        if layer is not None:
            keys, values = layer.latents(keys, values)
        key, value = own.k_proj(keys, "heads"), own.v_proj(values, "heads")
        if hasattr(own, "k_norm"):
            key = own.k_norm(key)
        if structure.rotary is not None and position_embeddings is not None:
            turn = position_embeddings
            if layer is not None and key.shape[2] != query.shape[2]:
                turn = latent_attention.rotation(layer.visible_positions, *structure.frequencies(key.device))
            key = latent_attention.rotate(key, *(part.to(key.dtype) for part in turn))
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(own.config._attn_implementation, structure.eager)
        dropout = getattr(own, "attention_dropout", getattr(own, "dropout", 0.0))
        arguments = {**kwargs, "dropout": dropout if own.training else 0.0, "scaling": own.scaling}
        if self._window() is not None:
            arguments["sliding_window"] = self._window()
        out, weights = attend(own, query, key, value, attention_mask, **arguments)
        return out, weights

    def _window(self) -> int | None:
        own: Any = self
        window: int | None = getattr(own if hasattr(own, "sliding_window") else own.config, "sliding_window", None)
        return window

    def _can_decode(self, query: Tensor, layer: Any, mask: Any) -> bool:
        """Return whether this is one token, seen by :func:`decode` as the implementation asked for would see it."""
        own: Any = self
        if query.shape[2] != 1 or own.training or (query.requires_grad and torch.is_grad_enabled()):
            return False
        if mask is None:  # everything that is stored is seen, which is not so in static memory that is not full
            shown = not layer.is_compileable
        else:
            shown = isinstance(mask, Tensor) and mask.dim() == 4
        implementation = own.config._attn_implementation
        if implementation in _FLASH:  # looks after windows itself, and has masks of its own
            shown = shown and mask is None and (self._window() is None or layer.is_sliding)
        elif implementation != "sdpa":
            shown = False
        # offloaded by accelerate, weights are there only within the module's own call
        return shown and not own.k_proj.weight_up.is_meta

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle and copy by the model's own class, since the derived one has no name that could be imported."""
        own: Any = self
        return _rebuild, (type(own).__mro__[2],), own.__dict__


def _rebuild(base: Any) -> Any:
    derived: Any = latent_class(base)
    return derived.__new__(derived)


@functools.cache
def latent_class(base: Any) -> Any:
    """Return the class with latent attention that is derived from a model's attention class."""
    return type(f"Latent{base.__name__}", (LatentAttention, base), {"__module__": base.__module__})


def convert_attention(
    attention: Any,
    structure: Structure,
    *,
    latent_bits: int | None = None,
    recent_window: int = 0,
    sink_tokens: int = SINK_TOKENS,
) -> None:
    """Make an attention module work on latents, in place; works on ``meta``.

    Args:
        attention: with packed layers of format ``latent`` as ``k_proj`` and ``v_proj``.
        structure: as found by :func:`hf_lowbit.cache.adapters.structure_of`.
        latent_bits: 8, 4 or 3: how caches that have no options of their own keep latents; None as they are.
        recent_window: how many of the latest tokens they keep in full beside their codes.
        sink_tokens: how many of the first tokens they keep in full beside their codes.

    Raises:
        ValueError: a projection is not of that format, its heads are not those of the module, or an option is out of
            range.
    """
    check_codes(latent_bits, recent_window, sink_tokens)
    for name in ("k_proj", "v_proj"):
        projection = getattr(attention, name)
        if not is_latent(projection):
            raise ValueError(f"{structure.name}.{name} is no packed layer of format 'latent'")
        spec = projection.spec
        if (spec.num_heads, spec.head_dim) != (structure.kv_heads, attention.head_dim):
            raise ValueError(
                f"{structure.name}.{name} has {spec.num_heads} heads of {spec.head_dim}, the model "
                f"{structure.kv_heads} of {attention.head_dim}"
            )
        LatentProjection.of(projection)
    if not isinstance(attention, LatentAttention):
        stock: Any = type(attention)
        become(attention, latent_class(stock))
    attention.latent_structure = structure
    attention.latent_bits = latent_bits or 0
    attention.recent_window, attention.sink_tokens = recent_window, sink_tokens
    for made in ("_latent_layout", "_latent_groups"):
        attention.__dict__.pop(made, None)


# One token ---------------------------------------------------------------------------------------------------------


def decode(attention: Any, query: Tensor, layer: LatentLayer, keys: Tensor, values: Tensor, mask: Any) -> Tensor:
    """Attend from one new token per row to what a cache layer stores.

    Args:
        attention: the converted module.
        query: (batch, heads, 1, head_dim), normed and rotated.
        layer: that ``keys`` and ``values`` come from.
        keys: (batch, 1, tokens, width), as the layer stores them: latents or rows of bytes.
        values: likewise.
        mask: (1 or batch, 1 or heads, 1, tokens or more), boolean or added to the scores; None shows everything.

    Returns:
        (batch, heads, head_dim), dtype of ``query``.
    """
    tokens = keys.shape[2]
    visible = None if mask is None else mask[:, :, 0, :tokens]
    stored, bits = (keys, values), layer.layout.bits
    recent = layer.recent(tokens) if bits else None
    stop = tokens if recent is None else tokens - recent[0].shape[2]
    first = layer.first(stop) if bits else None

    def of(begin: int, end: int) -> Tensor | None:
        return None if visible is None else visible[:, :, begin:end]

    if first is not None and layer.first_slots is not None:
        parts = _padded_parts(attention, query, layer, first, (keys[:, :, :stop], values[:, :, :stop]), of(0, stop))
        start = stop
    else:
        start = 0 if first is None else first[0].shape[2]
        if start == 0 and stop == tokens:
            return _step(attention, query, layer, stored, bits, slice(None), visible)[0]
        parts = [] if first is None else [_step(attention, query, layer, first, 0, slice(0, start), of(0, start))]
    if start < stop:
        stored = keys[:, :, start:stop], values[:, :, start:stop]
        parts.append(_step(attention, query, layer, stored, bits, slice(start, stop), of(start, stop)))
    if recent is not None:
        parts.append(_step(attention, query, layer, recent, 0, slice(stop, None), of(stop, tokens)))
    return latent_attention.merge(parts)


def _padded_parts(
    attention: Any,
    query: Tensor,
    layer: LatentLayer,
    first: tuple[Tensor, Tensor],
    coded: tuple[Tensor, Tensor],
    mask: Tensor | None,
) -> list[tuple[Tensor, Tensor]]:
    """Call the op on each row's own first tokens, and on the codes of all slots with those left out."""
    slots: Any = layer.first_slots
    count, tokens = first[0].shape[2], coded[0].shape[2]
    place = slots[:, None] + torch.arange(count, device=slots.device)  # (batch, count)
    there, place = place < tokens, place.clamp(max=tokens - 1)
    own = mask
    if mask is not None:
        wide = mask.expand(len(slots), -1, -1)
        own = wide.gather(2, place[:, None].expand(-1, wide.shape[1], -1))
    rest = padded.shown(mask, ~padded.is_first(slots, count, tokens))
    return [
        _step(attention, query, layer, first, 0, place, padded.shown(own, there)),
        _step(attention, query, layer, coded, layer.layout.bits, slice(0, tokens), rest),
    ]


def _step(
    attention: Any,
    query: Tensor,
    layer: LatentLayer,
    stored: tuple[Tensor, Tensor],
    bits: int,
    place: slice | Tensor,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Call the op on one stretch of a cache.

    Args:
        attention: the converted module.
        query: as for :func:`decode`.
        layer: that holds it.
        stored: keys and values.
        bits: of its codes; 0 for latents in full.
        place: where it lies among the visible tokens; or the slot of each of its tokens, (batch, tokens).
        mask: of the stretch, (1 or batch, 1 or heads, its tokens), or None.
    """
    structure: Structure = attention.latent_structure
    projections = attention.k_proj, attention.v_proj
    norm, eps = None, 0.0
    if hasattr(attention, "k_norm"):
        weight = attention.k_norm.weight
        norm, eps = (
            weight.float() + structure.norm_shift if structure.norm_shift else weight,
            norm_eps(attention.k_norm),
        )
    positions, frequencies, rope_scale = None, None, 1.0
    if structure.rotary is not None and layer.visible_positions is not None:
        held = layer.visible_positions
        positions = held[:, place] if isinstance(place, slice) else held.gather(1, place)
        frequencies, rope_scale = structure.frequencies(query.device)
    return latent_attention.latent_decode(
        query[:, :, 0],
        stored[0][:, 0],
        stored[1][:, 0],
        *(projection.weight_up for projection in projections),
        *(projection.bias for projection in projections),
        norm,
        positions,
        frequencies,
        mask,
        *attention.latent_groups(),
        attention.scaling,
        rope_scale,
        eps,
        bits,
    )


def norm_eps(norm: nn.Module) -> float:
    """Return the number that keeps a norm from dividing by zero; models call it by two names."""
    eps = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    return float(eps)  # type: ignore[arg-type]
