"""Options of QuantCache."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

from hf_lowbit.config import LowBitConfig, option, shown
from hf_lowbit.methods.quantcache.algorithm import default_deltas, default_intervals

MOTIONS = ("none", "adacache", "paper")
SCHEDULES = ("global", "per_block")
GRANULARITIES = ("auto", "stack", "block", "sublayer")
POLICIES = ("redundancy", "post_skip", "fixed", "delta_gbs")
PRUNE_MODES = ("cached", "identity")
CACHE_DTYPES = (None, "int8")
_BITS = range(2, 9)


def _is_number(value: Any) -> bool:
    return type(value) in (int, float)


def _number(low: float, high: float | None = None) -> Callable[[Any], str | None]:
    """Return a rule for numbers between limits, or None."""
    want = f"None or from {low} to {high}" if high is not None else f"None or at least {low}"

    def problem(value: Any) -> str | None:
        fits = value is None or (_is_number(value) and low <= value and (high is None or value <= high))
        return None if fits else f"must be {want}, got {shown(value)}"

    return problem


def _count(low: int) -> Callable[[Any], str | None]:
    def problem(value: Any) -> str | None:
        fits = value is None or (type(value) is int and value >= low)
        return None if fits else f"must be None or an integer of at least {low}, got {shown(value)}"

    return problem


def _intervals(value: Any) -> str | None:
    if value is None:
        return None
    whole = isinstance(value, tuple) and len(value) == 3 and all(type(item) is int for item in value)
    if whole and value[0] >= value[1] >= value[2] >= 1:
        return None
    return f"must be three integers (longest, middle, shortest), falling, at least 1, got {shown(value)}"


def _rising(high: float | None = None, optional: bool = False) -> Callable[[Any], str | None]:
    def problem(value: Any) -> str | None:
        pair = isinstance(value, tuple) and len(value) == 2 and all(map(_is_number, value))
        if (value is None and optional) or (pair and 0 <= value[0] <= value[1] and (high is None or value[1] <= high)):
            return None
        limit = "" if high is None else f" and at most {high:g}"
        return f"must be two numbers, at least 0{limit}, the first not above the second, got {shown(value)}"

    return problem


def _bits(value: Any) -> str | None:
    whole = isinstance(value, tuple) and len(value) == 3 and all(type(b) is int and b in _BITS for b in value)
    if whole and value[0] >= value[1] >= value[2]:
        return None
    return f"must be three integers (many, middle, few) from 2 to 8, falling, got {shown(value)}"


@dataclasses.dataclass(frozen=True)
class Rules:
    """Options with what depends on the number of steps filled in.

    Attributes:
        steps: of the trajectory; None if it is not known, then the last steps are not told from others.
        intervals: (longest, middle, shortest).
        deltas: thresholds of D.
        most_cached: most steps in a row that reuse the cache.
    """

    steps: int | None
    intervals: tuple[int, int, int]
    deltas: tuple[float, float]
    most_cached: int


@dataclasses.dataclass(kw_only=True)
class QuantCacheConfig(LowBitConfig):
    """QuantCache: skip steps, choose activation bits and bypass blocks of a diffusion transformer while it samples.

    Pass it to ``transformer.enable_cache``; it works on quantized transformers and on others, where the bits have no
    meaning. Defaults that are None follow from the number of steps.

    Source: arXiv 2503.06545. No threshold, interval or bit level of the paper is public; AdaCache's are taken where
    the formula is AdaCache's, the others were chosen here, and each of them is an option.
    """

    method: ClassVar[str] = "quantcache"

    num_inference_steps: int | None = option(
        None, "steps of a trajectory; None asks the pipeline, of which only some tell", check=_count(1)
    )
    intervals: tuple[int, int, int] | None = option(
        None,
        "(longest, middle, shortest) distance of computed steps; None is 12, 8 and 4 % of the steps",
        check=_intervals,
    )
    deltas: tuple[float, float] | None = option(
        None,
        "below the first D (change per step) the distance is longest, below the second middle",
        check=_rising(optional=True),
    )
    delta_offset: float = option(0.0, "is taken off D: the floor that quantization noise gives it", low=0.0)
    metric_block: float = option(0.5, "where in the stack D is measured, from 0 (first block) to 1", low=0.0, high=1.0)
    schedule: str = option("global", "one schedule for all blocks, or each block its own", choices=SCHEDULES)
    granularity: str = option(
        "auto",
        "what is cached: what the whole stack adds, each block, or each attention and feed-forward",
        choices=GRANULARITIES,
    )
    motion: str = option("none", "how motion between frames enters D", choices=MOTIONS)
    num_frames: int | None = option(None, "frames of the latent after patching, for motion", check=_count(2))
    extrapolation: int = option(
        1,
        "1 or 2 continues a line or parabola through the last residuals, 0 reuses the last (paper)",
        choices=(0, 1, 2),
    )
    warmup: int = option(2, "steps that are computed first", low=1)
    tail: int = option(1, "steps that are computed last", low=0)
    max_consecutive_cached: int | None = option(
        None, "most steps in a row without computing; None is the longest interval less one", check=_count(0)
    )
    bit_policy: str = option("redundancy", "how activation bits are chosen for a computed step", choices=POLICIES)
    bits: tuple[int, int, int] = option((8, 6, 4), "activation bits: many, middle, few", check=_bits)
    thetas: tuple[float, float] = option(
        (0.6, 0.8), "similarities from which there are middle and few bits", check=_rising(1.0)
    )
    bit_delta: float = option(0.09, "change of the output that calls for many bits, for delta_gbs", low=0.0)
    prune_high: float | None = option(
        None, "similarity of input and output above which a block is bypassed; None for never", check=_number(-1, 1)
    )
    prune_low: float | None = option(
        None, "similarity from which a block is bypassed with probability p_base", check=_number(-1, 1)
    )
    p_base: float = option(0.0, "that probability", low=0.0, high=1.0)
    prune_mode: str = option("cached", "a bypassed block adds what it added last, or nothing", choices=PRUNE_MODES)
    v_low: float | None = option(None, "change so far below which prune_high is 0.01 lower", check=_number(0))
    v_high: float | None = option(None, "change so far above which nothing is bypassed for a step", check=_number(0))
    seed: int = option(0, "of the draws with p_base", low=0, high=2**63 - 1)
    cache_dtype: str | None = option(None, "what the cache is kept in; None as computed", choices=CACHE_DTYPES)

    def __post_init__(self) -> None:
        for name in ("intervals", "deltas", "bits", "thetas"):
            if isinstance(getattr(self, name), list):
                setattr(self, name, tuple(getattr(self, name)))
        super().__post_init__()

    def problems(self) -> list[str]:
        """Return what is wrong with the values, empty if nothing is."""
        found = super().problems()
        if found:
            return found
        if self.skip or self.modules is not None or self.left_dense is not None:
            found.append("skip, modules and left_dense belong to methods that compress weights")
        if self.prune_low is not None and (self.prune_high is None or self.prune_low > self.prune_high):
            found.append(f"prune_low must not be above prune_high, got {self.prune_low} and {self.prune_high}")
        if self.p_base and self.prune_low is None:
            found.append("p_base has no effect without prune_low")
        if self.v_low is not None and self.v_high is not None and self.v_low > self.v_high:
            found.append(f"v_low must not be above v_high, got {self.v_low} and {self.v_high}")
        if (self.v_low is not None or self.v_high is not None) and self.prune_high is None:
            found.append("v_low and v_high have no effect without prune_high")
        if self.schedule == "per_block" and self.granularity not in ("auto", "block"):
            found.append(f"schedule 'per_block' caches each block; granularity {self.granularity!r} does not")
        return found

    def rules(self, steps: int | None) -> Rules:
        """Return the rules of a trajectory.

        Args:
            steps: what the pipeline said, None if nothing; it wins over ``num_inference_steps``.

        Raises:
            ValueError: the number of steps is needed and not known.
        """
        known = steps if steps is not None else self.num_inference_steps
        if known is None and (self.intervals is None or self.deltas is None or self.tail):
            raise ValueError(
                "QuantCache needs the number of steps, which this pipeline does not tell: "
                "QuantCacheConfig(num_inference_steps=...), the same as in the call of the pipeline"
            )
        intervals = self.intervals or default_intervals(known or 1)
        most = intervals[0] - 1 if self.max_consecutive_cached is None else self.max_consecutive_cached
        return Rules(known, intervals, self.deltas or default_deltas(known or 1), most)

    def _values(self) -> dict[str, Any]:
        values = super()._values()
        del values["skip"]
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
