"""Options of CondiQuant. The paper's body and code are not public; a default says so where it had to be chosen."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

from hf_lowbit.config import option, shown
from hf_lowbit.image_config import ImageConfig
from hf_lowbit.numerics.bounds import SEARCHES, SIDES
from hf_lowbit.numerics.conditioning import REGULARIZERS

# Tried by "auto"; at 4 bits the small ones win, at 2 bits the large ones.
STRENGTHS = (0.0, 0.003, 0.01, 0.03, 0.06)
_STRENGTHS_SHOWN = ", ".join(f"{t:g}" for t in STRENGTHS)
AUTO = "auto"
# At few bits the error of a layer alone chooses strengths that are too small for the image: larger ones draw large
# singular values down and should carry on less of the errors of the layers before (benchmarks/README.md has both).
_SLACK, _FEW_BITS = 0.1, 3
BITS = (2, 3, 4, 8)


def _strength_problem(value: Any) -> str | None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if value == AUTO or (number and 0 <= value <= 10):
        return None
    return f"must be 'auto' or a number from 0 to 10, got {shown(value)}"


def _slack_problem(value: Any) -> str | None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    fits = value is None or (number and 0 <= value <= 10)
    return None if fits else f"must be None or a number from 0 to 10, got {shown(value)}"


@dataclasses.dataclass(kw_only=True)
class CondiQuantConfig(ImageConfig):
    """2 to 4-bit weights and activations for image super-resolution (CondiQuant, arXiv 2502.15478).

    ``CondiQuantConfig(weight_bits=2, act_bits=2, calibration="photos/")``. Weights are conditioned (their condition
    number falls, their outputs stay nearly the same), then weights and inputs of every linear layer get one uniform
    grid each, and so do queries, keys, values and soft-max of attention modules of a known kind.

    Without calibration images only grids that need none are possible: ``act_mode`` "dynamic" or "none", and
    ``cond_strength`` 0.

    Grids are searched by what a layer puts out. The paper searches them as 2DQuant does, by what is rounded alone:
    ``bound_search="dobi"``, which ends 0.3 dB lower at 2 bits on a pretrained transformer and 0.2 dB on a small one
    trained here (``benchmarks/README.md``). Where there is no output to compare, inside attention and without images,
    "output" is "dobi" with a few more ranges.

    Attributes:
        cond_strength: t, a number from 0 to 10, or "auto".
    """

    method: ClassVar[str] = "condiquant"

    weight_bits: int = option(4, "bits of a weight", choices=BITS)
    act_bits: int = option(4, "bits of an activation", choices=BITS)
    cond_strength: str | float = option(
        AUTO,
        "strength t of the proximal step, a number from 0 to 10; 0: weights stay as they are; auto: of "
        f"{_STRENGTHS_SHOWN} the one whose quantized outputs are best, for each layer, see cond_slack",
        check=_strength_problem,
    )
    cond_slack: float | None = option(
        None,
        "auto takes the largest strength whose error is at most this share above the least; None: "
        f"{_SLACK:g} if weights and activations have at most {_FEW_BITS} bits, else 0",
        check=_slack_problem,
    )
    cond_steps: int = option(30, "steps of proximal gradient descent (K)", low=1, high=10_000)
    regularizer: str = option(
        "variance", "what the proximal step lowers: spread of singular values, the largest, or κ", choices=REGULARIZERS
    )
    cond_limit: float = option(30.0, "largest κ, for regularizer clip", low=1.0, high=1e12)
    bound_search: str = option(
        "output",
        "how the ends of grids are chosen: output (least error of what a layer puts out), dobi (of what is rounded, "
        "as published), percentile or minmax",
        choices=SEARCHES,
    )
    dobi_candidates: int = option(100, "ranges that dobi and output try", low=2, high=10_000)
    percentile: float = option(0.999, "share of values below the upper end, for percentile", low=0.5, high=1.0)
    search_sides: str = option(
        "auto", "which ends are searched: auto searches the upper one of what is not negative", choices=SIDES
    )
    act_mode: str = option(
        "static",
        "activations: static (ends from calibration), dynamic (of each call), none (weights only)",
        choices=("static", "dynamic", "none"),
    )
    quantize_attention: bool = option(True, "also quantize q, k, v and soft-max of attention modules of known kinds")
    sequential: bool = option(
        False, "calibrate each layer on what the quantized ones before it produce, not on the dense model's inputs"
    )
    refine: str = option("none", "dqc: learn the ends of all grids from the dense model", choices=("none", "dqc"))
    refine_steps: int = option(4000, "steps of dqc", low=1, high=10**6)
    refine_lr: float = option(0.01, "learning rate of dqc, as a share of each grid's range", low=1e-6, high=1.0)
    refine_batch: int = option(8, "patches per step of dqc", low=1, high=1024)
    feature_weight: float = option(0.01, "weight of the features' term in the loss of dqc", low=0.0, high=1000.0)

    @property
    def strengths(self) -> tuple[float, ...]:
        """Values of t that are tried on each layer."""
        if self.regularizer == "clip":  # it has none, so there is nothing to choose
            return (0.0,)
        return STRENGTHS if self.cond_strength == AUTO else (float(self.cond_strength),)

    @property
    def slack(self) -> float:
        """How much more error than the least, as a share of it, a larger strength may bring."""
        if self.cond_slack is not None:
            return float(self.cond_slack)
        return _SLACK if max(self.weight_bits, self.act_bits) <= _FEW_BITS else 0.0

    @property
    def conditions(self) -> bool:
        """Whether weights may be changed before they are rounded."""
        return self.regularizer == "clip" or self.strengths != (0.0,)

    @property
    def rows_kept(self) -> int:
        """Inputs of every layer that are kept, on which grids are searched and outputs compared."""
        return 4096

    @property
    def keeps_dense(self) -> bool:
        """Whether the dense model is kept until the end of the run."""
        return self.refine == "dqc"

    @property
    def lacks_data(self) -> str | None:
        """Return why a run without calibration images is impossible, None if it is not."""
        if self.calibration is not None:
            return None
        wanted = []
        if self.act_mode == "static":
            wanted.append("act_mode='static' (use 'dynamic' or 'none')")
        if self.conditions:
            clips = "regularizer='clip' (use 'variance' and cond_strength=0)"
            wanted.append(clips if self.regularizer == "clip" else f"cond_strength={self.cond_strength!r} (use 0)")
        if self.refine != "none":
            wanted.append(f"refine={self.refine!r} (use 'none')")
        if not wanted:
            return None
        return (
            "CondiQuantConfig needs calibration images for "
            + ", ".join(wanted)
            + "; pass calibration=images here, or "
            "to hf_lowbit.quantize(model, config)"
        )
