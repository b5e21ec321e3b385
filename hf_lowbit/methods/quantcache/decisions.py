"""What QuantCache decides step by step: which blocks run, with how many activation bits, which are bypassed.

Numbers only. Whoever drives a trajectory calls :meth:`Trajectory.begin` for every call of the transformer, asks the
decision what each block does, and hands what was measured to :meth:`Trajectory.measured` when the call is over; the
hooks in ``hf`` do that, and so do the tests, with sequences made by hand.

Calls of one step for several contexts (conditional and unconditional) share one decision, made at the first of them;
the first context ever seen leads: what is measured is measured in its calls.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from hf_lowbit.methods.quantcache.algorithm import bits_after_skip, bits_by_redundancy, divergence, interval
from hf_lowbit.methods.quantcache.options import QuantCacheConfig, Rules

# How much lower the threshold of pruning is while little has changed; Section "redundancy" names no value.
_RAISED = 0.01


class Clock:
    """When the blocks that share it are computed: Eq. (6) with warm-up, tail and a limit of cached steps in a row.

    Attributes:
        last: the last computed step.
        next: the step that is to be computed next.
        rate: relative change per step when it was last measured.
        value: D, with motion and offset.
        length: the interval that was decided on.
    """

    def __init__(self, options: QuantCacheConfig, rules: Rules) -> None:
        self._options, self._rules = options, rules
        self.last: int | None = None
        self.next = 0
        self.rate: float | None = None
        self.value: float | None = None
        self.length: int | None = None
        self._computed = self._cached_in_a_row = 0
        self._motion: float | None = None

    def wants(self, step: int) -> bool:
        """Return whether a step is computed."""
        steps = self._rules.steps
        return (
            self._computed < self._options.warmup
            or (steps is not None and step >= steps - self._options.tail)
            or step >= self.next
            or self._cached_in_a_row >= self._rules.most_cached
        )

    def computed(self, step: int) -> None:
        """Note that a step is computed; without a measurement the next one is, too."""
        self._computed, self._cached_in_a_row = self._computed + 1, 0
        self.next = step + 1

    def cached(self) -> None:
        """Note that a step is not computed."""
        self._cached_in_a_row += 1

    def measured(self, step: int, change: float | None, motion: float | None) -> None:
        """Take what was measured at a computed step and decide on the next one.

        Args:
            step: the step.
            change: relative change since the last computed step, None if there was nothing to compare with.
            motion: of the features now, None if it is not measured.
        """
        if change is not None and self.last is not None and step > self.last:
            distance, steps = step - self.last, self._rules.steps
            progress = 0.5 if steps is None else step / steps
            self.rate = divergence(change, distance)
            value = divergence(change, distance, self._options.motion, motion, self._motion, progress)
            self.value = max(0.0, value - self._options.delta_offset) if value == value else value
            self.length = interval(self.value, self._rules.intervals, self._rules.deltas)
            self.next = step + self.length
        self.last = step
        self._motion = motion


class Pruner:
    """Which blocks are bypassed in a computed step: Eqs. (9) to (11).

    The first and the last block and the measured one always run; of two neighbours at most one is bypassed, the more
    redundant one first; and a block that was bypassed runs in the next computed step, which renews its similarity.
    """

    def __init__(self, options: QuantCacheConfig, blocks: int, measured: int) -> None:
        self._options = options
        self._blocks, self._measured = blocks, measured
        self._similarity: dict[int, float] = {}
        self._pruned: frozenset[int] = frozenset()
        self.change = 0.0

    def may(self, block: int) -> bool:
        """Return whether a block may ever be bypassed."""
        return self._options.prune_high is not None and 0 < block < self._blocks - 1 and block != self._measured

    def choose(self, step: int) -> frozenset[int]:
        """Return the blocks that a computed step bypasses."""
        options = self._options
        previous, self._pruned = self._pruned, frozenset()
        if options.prune_high is None:
            return self._pruned
        if options.v_high is not None and self.change > options.v_high:
            self.change = 0.0  # as the switch of bits does: what has built up is answered by one whole step
            return self._pruned
        high = options.prune_high - (_RAISED if options.v_low is not None and self.change < options.v_low else 0.0)
        chosen: set[int] = set()
        for block in sorted(self._similarity, key=lambda block: (-self._similarity[block], block)):
            free = self.may(block) and block not in previous and not {block - 1, block + 1} & chosen
            if free and self._redundant(block, step, high):
                chosen.add(block)
        self._pruned = frozenset(chosen)
        return self._pruned

    def _redundant(self, block: int, step: int, high: float) -> bool:
        """Return the value of Eq. (10); between the thresholds it is drawn, the same in every run and context."""
        options, value = self._options, self._similarity[block]
        if value > high:
            return True
        if options.prune_low is None or not value >= options.prune_low:
            return False
        generator = torch.Generator().manual_seed((options.seed + 1_000_003 * step + 7_919 * block) % 2**63)
        return bool(torch.rand((), generator=generator) < options.p_base)

    def measured(self, similarities: Mapping[int, float], change: float | None) -> None:
        """Take the similarities of the blocks that ran, and how much the measured block has changed."""
        self._similarity.update(similarities)
        if change is not None:
            self.change += change


@dataclasses.dataclass(frozen=True)
class Decision:
    """What a call of the transformer does.

    Attributes:
        runs: for each block whether it is computed; pruned ones are, as far as this goes.
        bits: activation bits.
        pruned: blocks that are bypassed all the same.
        leads: whether what happens in this call is measured.
    """

    runs: tuple[bool, ...]
    bits: int
    pruned: frozenset[int]
    leads: bool

    @property
    def computes(self) -> bool:
        """Whether any block is computed."""
        return any(self.runs)


class Trajectory:
    """All decisions of one trajectory, and a row of what was decided and measured for each of its steps.

    Attributes:
        rows: one mapping per step: step, computed (share of the blocks), bits, change (per step), divergence,
            interval, pruned (blocks).
        measured_block: where D is measured.
    """

    def __init__(self, options: QuantCacheConfig, steps: int | None, blocks: int) -> None:
        """Begin a trajectory.

        Args:
            options: the config.
            steps: how many there are as far as the pipeline says.
            blocks: how many blocks the transformer has, at least 1.

        Raises:
            ValueError: the number of steps is needed and not known.
        """
        self.options, self.blocks = options, blocks
        self.rules = options.rules(steps)
        self.measured_block = int((blocks - 1) * options.metric_block)
        clocks = blocks if options.schedule == "per_block" else 1
        self.clocks = [Clock(options, self.rules) for _ in range(clocks)]
        self.pruner = Pruner(options, blocks, self.measured_block)
        self.step = -1
        self.leader: str | None = None
        self._decision: Decision | None = None
        self.rows: list[dict[str, Any]] = []

    @property
    def clock(self) -> Clock:
        """The clock of the measured block."""
        return self.clocks[self.measured_block if len(self.clocks) > 1 else 0]

    def begin(self, context: str, step: int, has_cache: bool = True) -> Decision:
        """Return what a call does.

        Args:
            context: its name.
            step: which step it belongs to; the first call of a step decides.
            has_cache: whether this context holds something to reuse; without, the call computes everything.
        """
        self.leader = context if self.leader is None else self.leader
        leads = context == self.leader
        if step != self.step or self._decision is None:
            self.step = step
            self._decision = self._decide(step, has_cache)
        if not has_cache and not all(self._decision.runs):
            return dataclasses.replace(self._decision, runs=(True,) * self.blocks, pruned=frozenset(), leads=leads)
        return dataclasses.replace(self._decision, leads=leads)

    def without_cache(self, leads: bool) -> Decision:
        """Return the decision of a call that finds that its cache does not fit: everything is computed.

        Args:
            leads: whether it is a call of the leading context; then the step counts as computed.
        """
        if self._decision is None:
            raise RuntimeError("no step has begun")
        found = dataclasses.replace(self._decision, runs=(True,) * self.blocks, pruned=frozenset(), leads=leads)
        if leads:
            self._decision = found
            self.rows[-1].update(computed=1.0, bits=found.bits, pruned=[])
            for clock in self.clocks:
                clock.computed(self.step)
        return found

    def _decide(self, step: int, has_cache: bool) -> Decision:
        wants = [not has_cache or clock.wants(step) for clock in self.clocks]
        runs = tuple(wants) if len(wants) > 1 else (wants[0],) * self.blocks
        bits, pruned = self._bits(), frozenset[int]()
        if any(runs):
            pruned = self.pruner.choose(step)
            pruned = frozenset(block for block in pruned if runs[block])
        for clock, computes in zip(self.clocks, wants, strict=True):
            clock.computed(step) if computes else clock.cached()
        share = sum(runs) / self.blocks
        self.rows.append(
            {
                "step": step,
                "computed": share,
                "bits": bits if share else None,
                "change": None,
                "divergence": None,
                "interval": None,
                "pruned": sorted(pruned),
            }
        )
        return Decision(runs, bits, pruned, True)

    def _bits(self) -> int:
        """Return activation bits; under "delta_gbs" DVD-Quant's own rule puts its bits in their place."""
        options, clock = self.options, self.clock
        if options.bit_policy == "redundancy":
            return bits_by_redundancy(clock.rate, clock.length or 1, options.bits, options.thetas)
        if options.bit_policy == "post_skip":
            return bits_after_skip(clock.length, self.rules.intervals, options.bits)
        return options.bits[0]

    def measured(
        self,
        blocks: Mapping[int, tuple[float | None, float | None]],
        similarities: Mapping[int, float] | None = None,
    ) -> None:
        """Take what the leading call of a computed step has measured.

        Args:
            blocks: for each block that is measured and ran: relative change of its residual since it last ran, None
                the first time, and motion of the residual, None if it is not measured.
            similarities: cosine of input and output of blocks that ran.
        """
        for block, (change, motion) in blocks.items():
            clock = self.clocks[block if len(self.clocks) > 1 else 0]
            clock.measured(self.step, change, motion)
        own = blocks.get(self.measured_block)
        if own is not None and own[0] is not None:
            clock = self.clock
            self.rows[-1].update(change=clock.rate, divergence=clock.value, interval=clock.length)
        self.pruner.measured(similarities or {}, None if own is None else own[0])


def mean_bits(rows: Sequence[Mapping[str, Any]]) -> float | None:
    """Return the mean activation bits of the computed steps, None if none was computed."""
    found = [row["bits"] for row in rows if row["bits"] is not None]
    return sum(found) / len(found) if found else None
