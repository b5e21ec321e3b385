"""What a cache has done in a trajectory, in numbers, as a table and as a picture of its steps."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich.table import Table

from hf_lowbit.errors import HfLowbitError
from hf_lowbit.methods.quantcache.decisions import mean_bits
from hf_lowbit.report.tables import size_text


@dataclasses.dataclass
class CacheReport:
    """One trajectory of a transformer with QuantCache.

    Attributes:
        mode: what was cached: "stack", "block", "sublayer", "open" (nothing).
        blocks: how many blocks the transformer has.
        rows: one mapping for each step: step, computed (share of the blocks), bits, change (relative, per step),
            divergence (D), interval, pruned (blocks that were bypassed).
        calls: of the transformer, by context.
        block_calls: how often a block was run, and how often it would have been.
        sublayer_calls: the same for attention and feed-forward modules, where those are cached.
        pruned: how often a block was bypassed in a computed step.
        cache_bytes: most bytes held at once to be used again, all contexts together.
        metric_bytes: most bytes held at once to measure with, beside those.
        remarks: why something was not done.
    """

    mode: str
    blocks: int
    rows: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    calls: Counter[str] = dataclasses.field(default_factory=Counter)
    block_calls: tuple[int, int] = (0, 0)
    sublayer_calls: tuple[int, int] = (0, 0)
    pruned: int = 0
    cache_bytes: int = 0
    metric_bytes: int = 0
    remarks: tuple[str, ...] = ()

    def begin(self, context: str) -> None:
        """Count a call of the transformer."""
        self.calls[context] += 1

    def count(self, ran: bool, block: bool) -> None:
        """Count a call of a block, or of a part of one."""
        name = "block_calls" if block else "sublayer_calls"
        run, asked = getattr(self, name)
        setattr(self, name, (run + ran, asked + 1))

    def hold(self, states: Iterable[Any], mode: str) -> None:
        """Count the bytes that the contexts hold."""
        self.mode = mode
        kept = measured = 0
        for state in states:
            used = {tensor.data_ptr() for history in state.histories() for tensor in history.tensors()}
            kept += sum(history.nbytes for history in state.histories())
            others = [tensor for tensor in state.measured.values() if tensor.data_ptr() not in used]
            measured += sum(tensor.numel() * tensor.element_size() for tensor in others)
        self.cache_bytes, self.metric_bytes = max(self.cache_bytes, kept), max(self.metric_bytes, measured)

    @property
    def steps(self) -> int:
        """Steps so far."""
        return len(self.rows)

    @property
    def computed(self) -> int:
        """Steps in which at least one block was computed."""
        return sum(row["computed"] > 0 for row in self.rows)

    @property
    def skipped(self) -> int:
        """Steps that reused the cache alone."""
        return self.steps - self.computed

    @property
    def bits(self) -> float | None:
        """Mean activation bits of the computed steps."""
        return mean_bits(self.rows)

    @property
    def speed_up(self) -> float:
        """Calls of blocks that would have been made over those that were; of their parts, where those are cached."""
        run, asked = self.sublayer_calls if self.mode == "sublayer" else self.block_calls
        return asked / run if run else 1.0

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON types; JSON has no infinity and no NaN, so such changes are None."""
        content = dataclasses.asdict(self)
        content["calls"] = dict(self.calls)
        content["rows"] = [
            {name: None if type(value) is float and not math.isfinite(value) else value for name, value in row.items()}
            for row in self.rows
        ]
        more = ("steps", "computed", "skipped", "bits", "speed_up")
        return {**content, **{name: getattr(self, name) for name in more}}

    def table(self) -> Table:
        """Return the summary as a table for the terminal."""
        run, asked = self.block_calls
        table = Table(title="QuantCache", title_justify="left", show_header=False)
        contexts = ", ".join(f"{name} × {count}" for name, count in self.calls.items())
        lines = {
            "cached": self.mode,
            "steps": f"{self.steps}: {self.computed} computed, {self.skipped} reused; calls: {contexts}",
            "blocks": f"{run} of {asked} calls run, {self.pruned} bypassed",
            "speed-up in calls": f"{self.speed_up:.2f} ×",
            "mean activation bits": "–" if self.bits is None else f"{self.bits:.2f}",
            "cache": f"{size_text(self.cache_bytes)}, and {size_text(self.metric_bytes)} to measure with",
        }
        for name, text in [*lines.items(), *(("remark", remark) for remark in self.remarks)]:
            table.add_row(name, text)
        return table

    def __str__(self) -> str:
        """Return a line."""
        return (
            f"{self.computed} of {self.steps} steps computed, {self.speed_up:.2f} × fewer calls ({self.mode}), "
            f"{self.pruned} blocks bypassed, cache of {size_text(self.cache_bytes)}"
        )

    def save_plot(self, file: str | Path) -> Path:
        """Draw the steps into a PNG file: D with what was decided from it, activation bits, blocks that ran.

        Raises:
            HfLowbitError: matplotlib is not installed.
            ValueError: the name does not end in ".png", or there is no step to draw.
        """
        target = Path(file)
        if target.suffix.lower() != ".png":
            raise ValueError(f"{target.name}: the plot is a PNG file; end its name in .png")
        if not self.rows:
            raise ValueError("there is no trajectory to draw yet; run the pipeline first")
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise HfLowbitError(
                "plots need matplotlib, which is not installed: pip install 'hf-lowbit[plots]'"
            ) from error
        with_bits = [(row["step"], row["bits"]) for row in self.rows if row["bits"] is not None]
        heights = (3, 1.5, 2) if with_bits else (3, 2)
        figure = Figure(figsize=(max(6.0, 0.25 * self.steps), sum(heights)), layout="constrained")
        panels = figure.subplots(len(heights), 1, sharex=True, height_ratios=heights)
        self._draw_divergence(panels[0])
        if with_bits:
            panels[1].bar([step for step, _ in with_bits], [bits for _, bits in with_bits], color="#8172b2")
            panels[1].set_ylabel("activation\nbits")
        self._draw_blocks(panels[-1])
        figure.savefig(target, format="png", dpi=150)
        return target

    def _draw_divergence(self, axes: Any) -> None:
        known = [(row["step"], row["divergence"], row["interval"]) for row in self.rows if row["interval"] is not None]
        axes.plot([step for step, _, _ in known], [value for _, value, _ in known], marker="o", color="#4c72b0")
        for step, value, length in known:
            axes.annotate(str(length), (step, value), textcoords="offset points", xytext=(0, 6), ha="center")
        axes.set_ylabel("D (number: interval)")
        axes.margins(y=0.15)
        axes.set_ylim(bottom=0)
        axes.set_title(str(self).replace(", ", ",\n", 1), fontsize="medium")

    def _draw_blocks(self, axes: Any) -> None:
        steps, bypassed = [row["step"] for row in self.rows], [len(row["pruned"]) for row in self.rows]
        run = [row["computed"] * self.blocks - count for row, count in zip(self.rows, bypassed, strict=True)]
        axes.bar(steps, run, color="#55a868", label="run")
        axes.bar(steps, bypassed, bottom=run, color="#c44e52", label="bypassed")
        axes.set_ylabel("blocks")
        axes.set_xlabel("step")
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize="small")
