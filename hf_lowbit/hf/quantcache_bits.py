"""Who chooses the bits of activations while QuantCache is on a transformer: one of two, never both.

Where delta-GBS of DVD-Quant is enabled, QuantCache takes its place and gives it back in the end. Its own policy
"delta_gbs" is delta-GBS again, with QuantCache's ``bits`` and ``bit_delta``: it knows by itself which calls a cache
has left out.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from hf_lowbit.layers import PackedLinear, packed_modules, set_act_bits
from hf_lowbit.methods.quantcache.options import QuantCacheConfig

_KEPT = ("delta", "low", "high", "warmup", "layers")


class BitOwner:
    """Sets the bits of a transformer's packed layers that round activations; does nothing where there are none."""

    def __init__(self, transformer: nn.Module, config: QuantCacheConfig) -> None:
        self._transformer, self._config = transformer, config
        self._former: dict[str, Any] | None = None
        self._own: Any = None  # the hook of delta-GBS that was put on here

    def layers(self) -> list[PackedLinear]:
        """Return the layers. Looked up anew, since a transformer may be quantized while a cache is on it."""
        layers = packed_modules(self._transformer).values()
        return [layer for layer in layers if layer.format_type.rounds_activations(layer.spec)]

    def take(self) -> None:
        """Become the one who chooses; again does nothing."""
        if not self.layers():
            return
        from hf_lowbit.hf import delta_gbs

        hook = self._delta_gbs()
        if hook is not None and hook is not self._own:
            self._former = {name: getattr(hook, name) for name in _KEPT}
            delta_gbs.disable_delta_gbs(self._transformer)
            hook = None
        if self._config.bit_policy == "delta_gbs" and hook is None:
            many, _, few = self._config.bits
            delta_gbs.enable_delta_gbs(self._transformer, delta=self._config.bit_delta, low=few, high=many)
            self._own = self._delta_gbs()

    def _delta_gbs(self) -> Any:
        from hf_lowbit.hf import delta_gbs

        return getattr(getattr(self._transformer, delta_gbs.NAME, None), "hook", None)

    def choose(self, bits: int) -> int | None:
        """Set the bits of a step that is computed, and return those that the layers have then; None without layers."""
        layers = self.layers()
        if not layers:
            return None
        # delta-GBS decides before a call; one that was put on in the middle of a call comes too late for it
        if self._config.bit_policy != "delta_gbs" or layers[0].act_bits is None:
            set_act_bits(self._transformer, bits)
        return layers[0].act_bits

    def give_back(self) -> None:
        """Leave things as they were: bits as stored, or chosen by delta-GBS."""
        if not self.layers():
            return
        from hf_lowbit.hf import delta_gbs

        hook = self._delta_gbs()
        if hook is not None and hook is not self._own:
            return  # somebody has put it on since
        delta_gbs.disable_delta_gbs(self._transformer)
        set_act_bits(self._transformer, None)
        if self._former is not None:
            delta_gbs.enable_delta_gbs(self._transformer, **self._former)
