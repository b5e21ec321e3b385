"""What a compression run leaves behind: a report of every layer, and the config that is saved with the model."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hf_lowbit.calibration.stats import LinearStats, PairedStats
from hf_lowbit.config import CalibrationRecord, LowBitConfig
from hf_lowbit.image_config import WITH_DATA
from hf_lowbit.recipe import LowBitRecipe, with_each


@dataclasses.dataclass
class RunReport:
    """What a run did.

    Attributes:
        rows: one per layer, as written to ``RunOptions.report``.
        dense: reason for every linear-like layer left dense.
        seconds: duration of the run.
        plan: what was chosen under a budget, see :mod:`hf_lowbit.budget`; empty without one.
    """

    rows: list[dict[str, Any]]
    dense: dict[str, str]
    seconds: float
    plan: tuple[Mapping[str, Any], ...] = ()

    def summary(self) -> str:
        """Return one line: what was packed, what was left dense and why, bits per weight."""
        weights = sum(row["weights"] for row in self.rows)
        stored = sum(row["bytes"] for row in self.rows)
        reasons: dict[str, int] = {}
        for reason in self.dense.values():
            reasons[reason] = reasons.get(reason, 0) + 1
        left = ", ".join(f"{count} × {reason}" for reason, count in reasons.items()) or "none"
        idle = sum(row.get("calibration_tokens") == 0 for row in self.rows)
        line = (
            f"packed {len(self.rows)} layers at {8 * stored / weights:.3f} bits per weight in {self.seconds:.0f} s; "
            f"left dense: {left}"
        )
        reached = "layers of experts that no calibration token reached, from their weights alone"
        return f"{line}; {idle} {reached}" if idle else line


def relative_errors(
    weight: Tensor, approximation: Tensor, stats: LinearStats | PairedStats | None
) -> dict[str, float | None]:
    """Squared relative errors of a layer.

    Args:
        weight: (n, m), the original.
        approximation: (n, m).
        stats: of the layer's inputs, or None.

    Returns:
        ``weight_error`` ‖W-Q‖²/‖W‖² and ``output_error`` Tr(R S Rᵀ)/Tr(W S Wᵀ) with R = W - Q; the latter None without
        statistics. After compensation the former may rise; the latter is the one to watch. 0 for a zero denominator.
    """
    weight = weight.float()
    residual = weight - approximation

    def ratio(moment: Tensor | None) -> float:
        parts = [
            float(((m if moment is None else m @ moment) * m).sum(dtype=torch.float64)) for m in (residual, weight)
        ]
        return parts[0] / parts[1] if parts[1] else 0.0

    return {"weight_error": ratio(None), "output_error": None if stats is None else ratio(stats.second_moment())}


def finished_config(
    config: LowBitConfig, table: dict[str, Any], dense: dict[str, str], record: CalibrationRecord | None
) -> LowBitConfig:
    """Return the config as it is saved: with the tables of the run, and with a record instead of the data."""

    def recorded(rule: Any) -> Any:
        known = isinstance(rule, WITH_DATA) and rule.needs != "none"
        return dataclasses.replace(rule, calibration=record) if known else rule

    if isinstance(config, LowBitRecipe):
        return dataclasses.replace(config, rules=with_each(config, recorded), modules=table, left_dense=dense)
    return dataclasses.replace(recorded(config), modules=table, left_dense=dense)
