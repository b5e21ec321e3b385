"""Options of AdaSVD; defaults are the paper's where it states them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar

from hf_lowbit import registry
from hf_lowbit.config import CalibratedConfig, LowBitConfig, option, planned_for, planned_problems, shown
from hf_lowbit.formats.low_rank import FACTOR_DTYPES, INNER

IMPORTANCE = ("one_minus_cos", "arccos", "cos", "uniform")
# Bits of integer factors, by the name of the choice.
INTEGER = {"int8": 8, "int4": 4}


@dataclasses.dataclass(kw_only=True)
class AdaSVDConfig(CalibratedConfig):
    """Low-rank weights, truncated to keep the layers' outputs, with a ratio for each block (AdaSVD, arXiv 2502.01403).

    ``AdaSVDConfig(ratio=0.6)`` keeps 60 % of the parameters of the compressed layers (the paper calls that a
    compression of 40 %): W (n, m) becomes U (n, r) times V (r, m). Decoder blocks that change their input more keep
    more, under one budget; a layer that would keep all it has stays dense. With ``calibration=None`` no data is used:
    plain singular value decomposition at the same ratio everywhere.

    Factors may be integers, or held by another method: ``AdaSVDConfig(ratio=0.6, factors="int4")``, or, for one bit,
    ``AdaSVDConfig(ratio=0.6, factors=ARBConfig())``. Ratios still count numbers, whatever the bits of each.

    A calibrated run with ``dense_target`` above 0 also runs the dense model, and holds what the layers of one block
    receive in it: for each calibration token about three times the hidden and once the intermediate size.

    Attributes:
        layers: ratio of each decoder block by name. Filled by the run; given beforehand, these are used as they are.
        factor_config: of the method that holds the factors, for ``factors="method"``; given as ``factors`` it is put
            here. It takes over the calibration of this config: each factor is fitted to what it receives in the run.
    """

    method: ClassVar[str] = "adasvd"

    calibration: Any = dataclasses.field(default="wikitext2", repr=False)
    samples: int = option(256, "calibration sequences", low=1)
    layers: Mapping[str, float] | None = None
    factor_config: LowBitConfig | None = None
    ratio: float = option(0.8, "share of the parameters kept (trr), from 0.001 to 1", low=1e-3, high=1.0)
    min_ratio: float = option(
        0.0, "least ratio of a block (mrr); 0 means ratio - 0.1, at least 0.05", low=0.0, high=1.0
    )
    importance: str = option(
        "one_minus_cos",
        "how a block's importance follows from the cosine of its input and output; uniform, and any run without data: "
        "the same ratio everywhere",
        choices=IMPORTANCE,
    )
    init: str = option(
        "whitened",
        "where factors start: whitened, the best for the inputs, or svd, the plain decomposition of the weight",
        choices=("whitened", "svd"),
    )
    iterations: int = option(1, "refits of U and of V after truncation (adaComp, τ)", low=0, high=1000)
    buckets: int = option(
        0,
        "averages of samples that the refits see, as the paper's stack of batch; 0: all samples as they are",
        low=0,
        high=2**24,
    )
    sequential: bool = option(
        True, "compress the layers of a block in the order in which they run, each on what those before it produce"
    )
    dense_target: float = option(
        0.5,
        "what factors aim at, on inputs that compression has changed: from the weight's own outputs (0) to those of "
        "the dense model (1)",
        low=0.0,
        high=1.0,
    )
    rank_multiple: int = option(
        1, "ranks are rounded down to a multiple of it; 16 suits tensor cores", low=1, high=256
    )
    damping: float = option(
        0.01, "share of the mean diagonal added to the second moment of fewer tokens than columns", low=0.0, high=1.0
    )
    factor_dtype: str = option(
        "auto", "dtype of the stored factors; auto: that of the dense weight", choices=("auto", *FACTOR_DTYPES)
    )
    factors: str = option(
        "float",
        "how factors are held: plain numbers, integers with scales, or as factor_config says (method)",
        choices=("float", *INTEGER, "method"),
    )
    factor_group: int = option(
        64, "columns of an integer factor that share a scale; 0: all of a row", low=0, high=2**24
    )

    def __post_init__(self) -> None:
        given: Any = self.factors
        if isinstance(given, LowBitConfig):
            self.factors, self.factor_config = "method", given
        if isinstance(self.factor_config, CalibratedConfig):
            shared = {name: getattr(self, name) for name in ("calibration", "samples", "sequence_length", "seed")}
            self.factor_config = dataclasses.replace(self.factor_config, **shared)
        super().__post_init__()

    def problems(self) -> list[str]:
        """Return what is wrong with the values, empty if nothing is."""
        found = super().problems()
        found += planned_problems(
            self.layers,
            "a ratio",
            lambda share: type(share) in (int, float) and 0 < share <= 1,
            "a number above 0 and at most 1",
        )
        found += self._factor_problems()
        if not found and self.min_ratio > self.ratio:
            found.append(f"min_ratio must not exceed ratio = {self.ratio}, got {self.min_ratio}")
        return found

    def _factor_problems(self) -> list[str]:
        inner = self.factor_config
        if (self.factors == "method") != (inner is not None):
            return ['factor_config is needed for factors="method", and only then']
        if inner is None:
            return []
        held = {held.name for held in INNER.values()}
        if not isinstance(inner, LowBitConfig) or inner.method not in registry.methods():
            return [f"factor_config must be the config of a method, got {type(inner).__name__}"]
        method = registry.get(inner.method)
        if method.unit != "linear" or method.format not in held:
            return [f"factor_config: {method.name} makes {method.format}, factors may be {', '.join(sorted(held))}"]
        if inner.skip or inner.modules is not None or inner.left_dense is not None:
            return ["factor_config: put skip on the config itself"]
        return []

    def _values(self) -> dict[str, Any]:
        values = super()._values()
        if self.layers is not None:
            values["layers"] = dict(self.layers)
        if self.factor_config is not None:
            values["factor_config"] = self.factor_config.to_dict()
        return values

    @classmethod
    def _from_values(cls, values: dict[str, Any]) -> Any:
        inner = values.get("factor_config")
        if inner is not None:
            # before it is read: a config inside a config could go on for ever
            if not isinstance(inner, Mapping) or inner.get("method") in (cls.method, "recipe"):
                raise ValueError(
                    f"{cls.__name__}: factor_config must be the config of another method, got {shown(inner)}"
                )
            values = {**values, "factor_config": LowBitConfig.from_dict(inner)}
        return super()._from_values(values)

    @property
    def streams(self) -> frozenset[str]:
        """Whose inputs are asked for, see :attr:`LowBitConfig.streams`."""
        return frozenset({"compressed", "cross"} if self.dense_target else {"compressed"})

    @property
    def in_order(self) -> bool:
        """Whether layers of a block are compressed in the order in which they run."""
        return self.sequential

    @property
    def stack_into(self) -> int:
        """Number of averages of the calibration samples that are asked for."""
        return min(self.buckets, self.samples)

    @property
    def floor(self) -> float:
        """Least ratio of a block."""
        return self.min_ratio or min(self.ratio, max(0.05, self.ratio - 0.1))

    def ratio_of(self, module: str) -> float:
        """Return the ratio of a module.

        Raises:
            ValueError: ``layers`` is given and holds no block around the module.
        """
        return self.ratio if self.layers is None else float(planned_for(self.layers, "a ratio", module))


def rank_of(shape: tuple[int, int], ratio: float, multiple: int = 1) -> int:
    """Rank at which factors hold a share of a weight's parameters, ``⌊ratio · n m / (n + m)⌋``, but at least 1.

    Args:
        shape: (n, m).
        ratio: share kept.
        multiple: of which the rank is one, rounded down, unless that would leave none.

    Source: AdaSVD (arXiv 2502.01403), Eq. 21; the published code of SVD-LLM.
    """
    rows, columns = shape
    rank = max(1, math.floor(ratio * rows * columns / (rows + columns) + 1e-9))  # a ratio may be made from a rank
    return rank // multiple * multiple or rank


def stays_dense(shape: tuple[int, int], ratio: float, multiple: int = 1) -> bool:
    """Return whether a layer keeps its weight: its ratio is 1, or factors of its rank would be no smaller."""
    return ratio >= 1 or rank_of(shape, ratio, multiple) * sum(shape) >= shape[0] * shape[1]
