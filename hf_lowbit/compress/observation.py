"""What the layers of a block receive: in the model compressed so far, in the dense one, or in both.

Which of these a method wants, its config says (``LowBitConfig.streams``, ``in_order``, ``stack_into``).
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from hf_lowbit.calibration import capture
from hf_lowbit.calibration.stats import LinearStats, PairedStats
from hf_lowbit.compress.projections import is_for_attention
from hf_lowbit.experts import fused_name
from hf_lowbit.layers import features

if TYPE_CHECKING:
    from hf_lowbit.compress.engine import Run

logger = logging.getLogger(__name__)
Calls = list[capture.BlockCall]


@dataclasses.dataclass(frozen=True)
class Reference:
    """What layers of a block receive in the dense model: statistics, and the inputs themselves where asked for."""

    stats: Mapping[str, LinearStats] = dataclasses.field(default_factory=dict)
    inputs: dict[str, list[Tensor]] = dataclasses.field(default_factory=dict)


def of_dense_block(
    run: Run, block: nn.Module, names: list[str], states: dict[str, list[Tensor]], calls: Calls
) -> Reference:
    """Run a block with its dense weights on what the dense blocks before it produce, and move those states on.

    Args:
        run: whose methods ask.
        block: with its dense weights.
        names: of its layers that are compressed.
        states: by stream, hidden states of each batch before the block; those of "dense" are replaced by its outputs.
        calls: other arguments of the block for each batch.

    Returns:
        By name the statistics of layers that ask for them, and the inputs of those that will compare them.
    """
    if "dense" not in states:
        return Reference()
    layers = {name: run.model.get_submodule(name) for name in _asking(run, names, "dense")}
    kept = {name: run.model.get_submodule(name) for name in _asking(run, names, "cross")}
    sizes = [len(hidden) for hidden in states["dense"]]
    with capture.collect_stats(layers, sizes) as stats, capture.collect_inputs(kept) as inputs:
        outputs = capture.run_block(block, states["dense"], calls)
        states["dense"] = [capture.hidden_of(output) for output in outputs]
    run.team.add_up(stats)
    return Reference(stats, inputs)


def stages(run: Run, block: nn.Module, names: list[str], hidden: list[Tensor], calls: Calls) -> list[list[str]]:
    """Return the layers of a block that are compressed together, in order: all, unless a method asks for stages."""
    if not any(run.targets.methods[name].in_order for name in names):
        return [names]
    layers = {name: run.model.get_submodule(name) for name in names if not fused_name(name)}
    experts = [name for name in names if fused_name(name)]  # they run in turn, two products each
    found = capture.stages(block, hidden[0], calls[0], layers) if layers else []
    return [*found, experts] if experts else found


def of_block(
    run: Run,
    block: nn.Module,
    names: list[str],
    hidden: list[Tensor],
    calls: Calls,
    reference: Reference,
    last: nn.Module | None,
) -> dict[str, LinearStats | PairedStats]:
    """Run a block on what the compressed blocks before it produce, and return what its layers receive.

    Args:
        run: whose methods ask.
        block: with its layers as they are now.
        names: of the layers that are looked at.
        hidden: hidden states of each batch before the block.
        calls: its other arguments.
        reference: what the layers received in the dense model.
        last: layer at whose call the block may stop, None for none.
    """
    layers = {name: run.model.get_submodule(name) for name in _asking(run, names, "compressed")}
    experts = {name: layer for name, layer in layers.items() if fused_name(name)}
    others = {name: layer for name, layer in layers.items() if name not in experts}
    crossed = {name: layers[name] for name in names if name in reference.inputs}
    averaged = {name: layer for name, layer in others.items() if run.targets.methods[name].stack_into}
    buckets = max((run.targets.methods[name].stack_into for name in averaged), default=1)
    sizes = [len(states) for states in hidden]
    samples = int(run.team.total(torch.tensor(sum(sizes))))
    with (
        capture.collect_stats(others, sizes) as stats,
        capture.collect_stats(experts) as of_experts,
        capture.collect_cross(crossed, reference.inputs) as cross,
        capture.collect_stacked(averaged, samples, buckets, _numbers(run, sizes), run.team.total) as stacked,
    ):
        if layers:
            capture.run_until(block, hidden, calls, last)

    def nothing(name: str) -> Tensor:
        return torch.zeros((features(layers[name])[1],) * 2, dtype=torch.float64)

    # a layer that no token reached gets empty statistics, which raise, naming it, when a method asks for them
    found: dict[str, LinearStats] = {
        name: stats.get(name) or of_experts.get(name) or LinearStats(name, features(layer)[1])
        for name, layer in layers.items()
    }
    run.team.add_up(found)
    idle = [name for name in experts if not found[name].tokens]
    run.idle |= set(idle)
    if idle and run.team.leads:
        logger.warning(
            "%d experts received no calibration token and are compressed from their weights alone (%s)",
            len(idle),
            ", ".join(idle[:10]) + (", ..." if len(idle) > 10 else ""),
        )
    ready: dict[str, LinearStats | PairedStats] = {name: one for name, one in found.items() if name not in idle}
    for name in names:
        known = name in reference.stats or name in reference.inputs or name in averaged
        if known or is_for_attention(run.targets.methods[name]):
            # what no token reached in this process may have been reached in another
            product = run.team.total(cross.get(name, nothing(name))) if name in crossed else None
            ready[name] = PairedStats(reference.stats.get(name), found.get(name), product, stacked.get(name))
    return ready


def _numbers(run: Run, sizes: list[int]) -> Tensor:
    """Return the numbers, among all calibration sequences, of those in the batches of this process."""
    first = [(run.team.rank + i * run.team.size) * run.options.batch_size for i in range(len(sizes))]
    own = [torch.arange(start, start + size) for start, size in zip(first, sizes, strict=True)]
    return torch.cat([torch.arange(0), *own])  # nothing is run where only inputs in the dense model are asked for


def _asking(run: Run, names: list[str], stream: str) -> list[str]:
    """Return the layers whose method asks for a stream of inputs; experts see other tokens in another model."""
    methods = run.targets.methods
    asking = [name for name in names if methods[name].needs != "none" and stream in methods[name].streams]
    return [name for name in asking if stream == "compressed" or not fused_name(name)]
