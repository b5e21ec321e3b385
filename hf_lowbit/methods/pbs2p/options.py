"""Options of PBS²P. The paper's body and code are not public; a default says so where it had to be chosen."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar

from hf_lowbit.config import CalibratedConfig, option, planned_for, planned_problems
from hf_lowbit.formats.binary import SCALE_DTYPES

IMPORTANCE = ("one_minus_cos", "arccos", "inverse_cos", "cos", "uniform")


@dataclasses.dataclass(kw_only=True)
class PBS2PConfig(CalibratedConfig):
    """Sparse 1-bit weights: N of every M are kept, pruned step by step and binarized (PBS²P, arXiv 2502.01705).

    ``PBS2PConfig(n=4, m=8)`` keeps four weights of every eight in a row. N is the mean over the model: decoder blocks
    get N of their own, more where they change their input more. With ``calibration=None`` no data is used: every block
    gets N, the score is the weights' magnitude, and nothing is compensated.

    Of columns that m does not divide, the last q < m keep ceil(n · q / m); ``block_size`` must be a multiple of m, so
    that no other group is cut.

    Attributes:
        layers: N of each decoder block by name. Filled by the run; given beforehand, these N are used as they are.
    """

    method: ClassVar[str] = "pbs2p"

    layers: Mapping[str, int] | None = None
    n: int = option(4, "weights kept of every m, on average over the decoder blocks", low=1, high=16)
    m: int = option(8, "length of a group of neighbouring weights of a row", low=1, high=16)
    importance: str = option(
        "one_minus_cos",
        "how a block's importance follows from the cosine of its input and output; uniform, and any run without data: "
        "the same N everywhere",
        choices=IMPORTANCE,
    )
    n_low: int = option(0, "least N of a block; 0 means n - 1, but at least 1", low=0, high=16)
    n_high: int = option(0, "largest N of a block; 0 means n + 2, but at most m", low=0, high=16)
    score: str = option(
        "hessian",
        "which weights of a group are kept: w²/d² with d of the inverse second moment, |w|·sqrt(x²), or |w|; the last "
        "without data",
        choices=("hessian", "wanda", "magnitude"),
    )
    groups: str = option(
        "cgb",
        "groups with scales of their own: cgb 4, billm 3, none 1 (fewest bits, poor quality)",
        choices=("cgb", "billm", "none"),
    )
    fit: str = option(
        "spbo",
        "spbo: refit to the outputs after every pruning step; baselines that prune first: arb, then alternating "
        "refinement, plain, then one-shot binarization",
        choices=("spbo", "arb", "plain"),
    )
    solver: str = option(
        "joint", "scales and shifts of a row: all at once, or one after the other", choices=("joint", "alternating")
    )
    solver_iterations: int = option(15, "rounds of the alternating solver", low=1, high=1000)
    refresh_signs: bool = option(True, "choose signs anew after each step where that lowers the error")
    stepwise: bool = option(True, "prune one weight of each group at a time; false: all at once")
    block_size: int = option(
        128, "columns that share a row scale (k); a multiple of m", low=32, high=4096, multiple_of=32
    )
    iterations: int = option(15, "alternating refinements of the dense start (T)", low=0, high=1000)
    max_salient_per_block: int = option(50, "upper limit of salient columns in a block (exclusive)", low=2, high=4096)
    quantiles: int = option(81, "thresholds tried when splitting a block, between 10 and 90 %", low=2, high=1001)
    damping: float = option(0.01, "share of the mean diagonal added to the second moment", low=1e-8, high=1.0)
    compensation: str = option(
        "exact",
        "how a block's error is carried to later columns: exact solve, reference (as in ARB-LLM's code), none",
        choices=("exact", "reference", "none"),
    )
    scale_dtype: str = option("float16", "dtype of stored scales and shifts", choices=tuple(SCALE_DTYPES))

    def problems(self) -> list[str]:
        """Return what is wrong with the values, empty if nothing is."""
        found = super().problems()
        if self.layers is not None and not isinstance(self.layers, Mapping):
            return found + planned_problems(self.layers, "N", bool, "")
        if found:
            return found
        if self.n > self.m:
            found.append(f"n must not exceed m: {self.n}:{self.m} would keep more weights than there are")
        if self.block_size % self.m:
            nearest = math.lcm(32, self.m)
            nearest *= max(1, round(128 / nearest))
            found.append(f"block_size must be a multiple of m = {self.m}, got {self.block_size}; use {nearest}")
        for name, value, other in (("n_low", self.n_low, self.n), ("n_high", self.n_high, self.n)):
            if value and (value > other if name == "n_low" else not other <= value <= self.m):
                limits = f"from 1 to n = {self.n}" if name == "n_low" else f"from n = {self.n} to m = {self.m}"
                found.append(f"{name} must be {limits} (or 0), or the mean cannot be n; got {value}")
        fits = range(1, self.m + 1)
        found += planned_problems(
            self.layers, "N", lambda n: type(n) is int and n in fits, f"an integer from 1 to m = {self.m}"
        )
        return found

    def _values(self) -> dict[str, Any]:
        values = super()._values()
        if self.layers is not None:
            values["layers"] = dict(self.layers)
        return values

    @property
    def limits(self) -> tuple[int, int]:
        """Least and largest N of a decoder block."""
        return self.n_low or max(1, self.n - 1), self.n_high or min(self.m, self.n + 2)

    def n_of(self, module: str) -> int:
        """Return N of a module.

        Raises:
            ValueError: ``layers`` is given and holds no block around the module.
        """
        return self.n if self.layers is None else int(planned_for(self.layers, "N", module))
