"""Options of ARB-LLM; defaults are the paper's where it states them."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from hf_lowbit.config import CalibratedConfig, option
from hf_lowbit.formats.binary import SCALE_DTYPES

VARIANTS = ("rc", "x", "arb", "billm", "rtn")


@dataclasses.dataclass(kw_only=True)
class ARBConfig(CalibratedConfig):
    """1-bit weights by alternating refined binarization (ARB-LLM, arXiv 2410.03129).

    ``ARBConfig()`` is ARB-LLM_RC, the paper's best. Two variants are baselines: ``billm`` (its predecessor, in the
    style of arXiv 2402.04291) and ``rtn`` (plain rounding, ``sign(w) · mean|w|`` per row and block, nothing else).
    With ``calibration=None`` no data is used: saliency is the weights' magnitude and nothing is compensated.
    """

    method: ClassVar[str] = "arb"

    variant: str = option(
        "rc", "rc: row and column scales; x: fitted to inputs; arb; billm, rtn: baselines", choices=VARIANTS
    )
    block_size: int = option(128, "columns that share a row scale (k)", low=32, high=4096, multiple_of=32)
    iterations: int = option(15, "alternating refinements (T); 3 is nearly as good", low=0, high=1000)
    x_iterations: int = option(15, "further refinements against the output error, variant x", low=0, high=1000)
    column_group_bitmap: bool = option(True, "let the group bitmap serve salient columns too (CGB); ignored by billm")
    group_splits: int = option(
        1, "splits of the plain columns: 1 gives 2 groups, 3 gives the paper's 4", low=1, high=3
    )
    salient_metric: str = option(
        "hessian", "what makes a weight salient; magnitude without data", choices=("hessian", "magnitude")
    )
    max_salient_per_block: int = option(50, "upper limit of salient columns in a block (exclusive)", low=2, high=4096)
    quantiles: int = option(81, "thresholds tried when splitting a block, between 10 and 90 %", low=2, high=1001)
    damping: float = option(0.01, "share of the mean diagonal added to the second moment", low=1e-8, high=1.0)
    compensation: str = option(
        "exact",
        "how a block's error is carried to later columns: exact solve, reference (as published), none",
        choices=("exact", "reference", "none"),
    )
    scale_dtype: str = option("float16", "dtype of stored scales and shifts", choices=tuple(SCALE_DTYPES))

    def problems(self) -> list[str]:
        """Return what is wrong with the values, empty if nothing is."""
        found = super().problems()
        if not found and self.calibration is None and self.variant == "x":
            found.append(
                "variant 'x' fits scales to inputs and needs calibration data; use 'rc' or 'arb' without data"
            )
        return found

    @property
    def salient_groups(self) -> int:
        """Groups of the salient columns: 2 with the column-group bitmap, else 1."""
        return 2 if self.column_group_bitmap and self.variant != "billm" else 1
