"""What a cache of latents holds, from the module table of a compressed model: ranks by layer, bytes per token."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from rich.table import Table

from hf_lowbit.kernels.latent_codec import row_bytes
from hf_lowbit.recipe import rules_of
from hf_lowbit.report.inspect import Inspection, PackedModule

_BAR = 24  # characters of a projection that is kept whole
PARTS = {"k_proj": "keys", "v_proj": "values"}


@dataclasses.dataclass(frozen=True)
class CacheLayer:
    """One attention of a model whose cache holds latents.

    Attributes:
        name: of the attention module.
        ranks: of the groups, for keys and for values; None where they are dense.
        width: numbers per token that keys, or values, of the dense model are.
    """

    name: str
    ranks: Mapping[str, tuple[int, ...]]
    width: int

    def bytes(self, bits: int) -> int:
        """Bytes of one token's latents: 16-bit numbers, or codes with their scales and zero points."""
        if bits == 16:
            return 2 * sum(map(sum, self.ranks.values()))
        return sum(row_bytes(ranks, bits) for ranks in self.ranks.values())


def cache_layers(inspection: Inspection) -> list[CacheLayer]:
    """Return the attentions whose keys and values are packed as latents, in the order of the model."""
    found: dict[str, dict[str, PackedModule]] = {}
    for module in inspection.modules:
        owner, _, leaf = module.name.rpartition(".")
        if module.format == "latent" and leaf in PARTS:
            found.setdefault(owner, {})[leaf] = module
    return [
        CacheLayer(
            name,
            {PARTS[leaf]: tuple(module.spec["ranks"]) for leaf, module in sorted(parts.items())},
            next(iter(parts.values())).spec["out_features"],
        )
        for name, parts in found.items()
        if len(parts) == len(PARTS)
    ]


def latent_bits(inspection: Inspection) -> int:
    """Return how many bits a cached number has by default."""
    return next((rule.latent_bits for _, rule in rules_of(inspection.config) if hasattr(rule, "latent_bits")), 16)


def cache_json(inspection: Inspection) -> dict[str, Any] | None:
    """Return what the cache holds as JSON types; None for a model whose cache holds keys and values."""
    layers, bits = cache_layers(inspection), latent_bits(inspection)
    if not layers:
        return None
    return {
        "latent_bits": bits,
        "bytes_per_token": sum(layer.bytes(bits) for layer in layers),
        "dense_bytes_per_token": sum(4 * layer.width for layer in layers),
        "layers": {layer.name: {part: list(ranks) for part, ranks in layer.ranks.items()} for layer in layers},
    }


def cache_table(inspection: Inspection) -> Table | None:
    """Return a table with a bar for the rank of every key and value projection; None without latents."""
    content = cache_json(inspection)
    if content is None:
        return None
    held, dense, bits = content["bytes_per_token"], content["dense_bytes_per_token"], content["latent_bits"]
    table = Table(
        title="cache: ranks by layer",
        title_justify="left",
        caption=f"{held:,} bytes per token with latents of {bits} bits, {dense / held:.2f} × fewer than the {dense:,} "
        "of keys and values of 16 bits (these layers, positions aside)",
        caption_justify="left",
    )
    table.add_column("attention", overflow="fold")
    for part in PARTS.values():
        table.add_column(part, justify="right", no_wrap=True)
        table.add_column("", no_wrap=True)
    for layer in cache_layers(inspection):
        cells = []
        for part in PARTS.values():
            ranks = layer.ranks[part]
            alike = len(ranks) > 1 and len(set(ranks)) == 1
            text = f"{len(ranks)} × {ranks[0]}" if alike else " + ".join(map(str, ranks))
            cells += [f"{text} of {layer.width}", "█" * max(1, round(_BAR * sum(ranks) / layer.width))]
        table.add_row(layer.name, *cells)
    return table
