"""Options of ReCalKV. Where the paper's choice did not win on the models measured here, the default is what did."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar

from hf_lowbit.config import CalibratedConfig, option, planned_for, planned_problems, shown
from hf_lowbit.formats.low_rank import FACTOR_DTYPES
from hf_lowbit.kernels.latent_codec import SINK_TOKENS
from hf_lowbit.registry import Projection

_LARGEST_WHOLE = 4  # heads that share one group of keys by default
_RECALL = 0.25  # by default, where gradients are taken


def _recall_problem(value: Any) -> str | None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    fits = value is None or (number and 0 <= value <= 0.9)
    return None if fits else f"must be None or from 0.0 to 0.9, got {shown(value)}"


@dataclasses.dataclass(kw_only=True)
class ReCalKVConfig(CalibratedConfig):
    """A key-value cache of latents: low-rank key and value projections (ReCalKV, arXiv 2505.24357).

    ``ReCalKVConfig(ratio=0.5)`` keeps half of the numbers that the cache holds per token. Each key or value projection
    W becomes a down-projection, whose output is cached, and an up-projection, applied when a token attends. Factors
    and ranks, which share one budget, lose as little as possible of what the model's loss depends on. That takes one
    backward pass over a few sequences, made block by block. In the last quarter of each, passages from before it
    return: a small model then found again what stood far back in a long text, and without it (``recall=0.0``) hardly
    did, at the same perplexity (``python -m benchmarks.kv.quality``). With ``calibration=None`` no data is used: plain
    singular value decomposition with the same rank everywhere.

    ``ReCalKVConfig.paper(...)`` has the published choices, ``ReCalKVConfig(...)`` those that were best in
    ``benchmarks/quality/recalkv.py``.

    Attributes:
        layers: rank of each key and value projection by name. Filled by the run; given beforehand, these are used as
            they are.
    """

    method: ClassVar[str] = "recalkv"

    calibration: Any = dataclasses.field(default="wikitext2", repr=False)
    samples: int = option(256, "calibration sequences", low=1)
    layers: Mapping[str, int] | None = None
    ratio: float = option(0.5, "share of the cache's width kept, from 0.001 to 1", low=1e-3, high=1.0)
    key_group_size: int = option(
        0, "key heads that share a latent (s); 0: all of them up to 4 heads, groups of 4 for more", low=0, high=4096
    )
    value_group_size: int = option(0, "value heads that share a latent; 0: all of them", low=0, high=4096)
    ragged_groups: bool = option(False, "let the last group be smaller where the size does not divide the heads")
    grouping: str = option(
        "energy",
        "which key heads share a latent: energy, those that lose least together; cka, the most similar ones (HSR); "
        "contiguous, in their order",
        choices=("energy", "cka", "contiguous"),
    )
    whiten: bool = option(True, "fit the outputs on the calibration inputs, not the weights")
    weighting: str = option(
        "loss",
        "what counts as an error: loss, an output's as far as the gradient of the model's loss says that it matters; "
        "loss_by_head, the same for each head apart, for projections whose full matrix would be too large; none, all "
        "outputs' alike, as in the paper",
        choices=("loss", "loss_by_head", "none"),
    )
    gradient_damping: float = option(
        0.05, "share of their mean added to the weights of the errors", low=1e-6, high=1e6
    )
    rank_allocation: str = option(
        "energy",
        "rank of each projection: energy, one threshold over all on what a further rank gains, as a share of the "
        "projection's own energy if weighting=none; fisher_uniform, in proportion to the weights' gradients; uniform, "
        "the same everywhere, which is also what a run without data does",
        choices=("energy", "fisher_uniform", "uniform"),
    )
    rank_multiple: int = option(
        0, "each group's rank is a multiple of it; 0: 32, or 8 for groups of fewer than 256 rows", low=0, high=256
    )
    min_rank: int = option(0, "least rank of a group; 0: rank_multiple", low=0, high=2**16)
    gradient_samples: int = option(16, "calibration sequences that gradients are taken of", low=1)
    gradient_length: int = option(512, "tokens of each of them, at most sequence_length", low=2)
    recall: float | None = option(
        None,
        "share of each of them, at its end, from 0 to 0.9, in which passages from before return: errors count that "
        f"would keep the model from finding again what stands far back; 0: text as it is; None: {_RECALL}",
        check=_recall_problem,
    )
    ocmf: str = option(
        "off",
        "what projections are calibrated on: off, inputs of the dense model; sequential, those that the compressed "
        "blocks before it produce; cross, the dense model's outputs from the compressed blocks' inputs",
        choices=("off", "sequential", "cross"),
    )
    ocmf_for: str = option("values", "which projections ocmf is for", choices=("values", "both"))
    damping: float = option(
        1e-6,
        "for ocmf=cross: how much energy inputs need, as a share of the mean, for a weight to be changed along them",
        low=0.0,
        high=1.0,
    )
    latent_bits: int = option(16, "bits of a cached number; 16: as the model computes", choices=(16, 8, 4, 3))
    rotation: bool = option(
        True, "scale and mix latents of fewer than 16 bits so that rounding loses least, at no cost later"
    )
    recent_window: int = option(
        0, "newest tokens whose latents are kept as computed when latent_bits is below 16", low=0, high=2**16
    )
    sink_tokens: int = option(
        SINK_TOKENS,
        "first tokens, which most attention goes to, whose latents are kept as computed when latent_bits is below 16",
        low=0,
        high=2**16,
    )
    factor_dtype: str = option(
        "auto", "dtype of the stored factors; auto: that of the dense weight", choices=("auto", *FACTOR_DTYPES)
    )

    @classmethod
    def paper(cls, **options: Any) -> ReCalKVConfig:
        """Return a config with the choices of the paper.

        Key heads by similarity, values calibrated in sequence, ranks by gradients of plain text, all outputs alike.
        """
        chosen = {"grouping": "cka", "ocmf": "sequential", "rank_allocation": "fisher_uniform", "weighting": "none"}
        return cls(**{**chosen, "recall": 0.0, **options})

    def problems(self) -> list[str]:
        """Return what is wrong with the values, empty if nothing is."""
        found = super().problems()
        found += planned_problems(
            self.layers, "a rank", lambda rank: type(rank) is int and rank >= 1, "an integer of at least 1"
        )
        if self.recent_window and self.latent_bits == 16:
            found.append("recent_window needs latent_bits below 16: otherwise every token is kept as computed")
        measured = self.rank_allocation == "fisher_uniform" or self.weighting != "none"
        if self.recall and (self.calibration is None or not measured):
            found.append(
                "recall is for gradients, and none are taken: that needs calibration data, and weighting other than "
                "none or rank_allocation=fisher_uniform"
            )
        return found

    def _values(self) -> dict[str, Any]:
        values = super()._values()
        if self.layers is not None:
            values["layers"] = dict(self.layers)
        return values

    @property
    def streams(self) -> frozenset[str]:
        """Whose inputs are asked for, see :attr:`LowBitConfig.streams`."""
        found = {"compressed"} if self.ocmf == "sequential" and self.ocmf_for == "both" else {"dense"}
        if self.ocmf != "off":
            found.add("compressed")
        if self.ocmf == "cross":
            found.add("cross")
        if self.weighting != "none":
            found.add("gradients")
        return frozenset(found)

    @property
    def returning(self) -> float:
        """Share of the sequences of gradients in which passages return: ``recall``, or its default."""
        return _RECALL if self.recall is None else self.recall

    def fit_of(self, part: str) -> str:
        """Return how a projection is calibrated: "off", "sequential" or "cross"."""
        return self.ocmf if part == "value" or self.ocmf_for == "both" else "off"

    # Sizes of a projection -------------------------------------------------------------------------------------------

    def group_sizes(self, projection: Projection) -> list[int]:
        """Return how many heads each group of a projection has.

        Raises:
            ValueError: the group size does not divide the heads, and groups may not be ragged.
        """
        heads = projection.heads
        if projection.part == "key":
            size = self.key_group_size or (heads if heads <= _LARGEST_WHOLE else _LARGEST_WHOLE)
            name, chosen = "key_group_size", self.key_group_size > 0
        else:
            size, name, chosen = self.value_group_size or heads, "value_group_size", True
        if not chosen:  # the nearest size that divides; what a user asks for is never changed
            size = next(divisor for divisor in range(min(size, heads), 0, -1) if heads % divisor == 0)
        if size > heads or (heads % size and not self.ragged_groups):
            fitting = ", ".join(str(s) for s in range(1, heads + 1) if heads % s == 0)
            raise ValueError(
                f"{projection.name}: {name}={size} does not divide its {heads} heads; use one of {fitting}, "
                "or ragged_groups=True"
            )
        return [min(size, heads - start) for start in range(0, heads, size)]

    def step_of(self, projection: Projection) -> int:
        """Return of what number a group's rank is a multiple."""
        largest = max(self.group_sizes(projection)) * projection.rows
        return self.rank_multiple or (32 if largest >= 256 else 8)

    def limits(self, projection: Projection) -> tuple[int, int, int]:
        """Return least rank, highest rank and step of the rank of a projection: those of all its groups together."""
        sizes = self.group_sizes(projection)
        step = self.step_of(projection)
        most = sum(self.most_of_groups(projection))
        least = sum(min(self.min_rank or step, high) for high in self.most_of_groups(projection))
        return least, most, step * len(sizes)

    def most_of_groups(self, projection: Projection) -> list[int]:
        """Return the highest rank of each group."""
        return [min(size * projection.rows, projection.shape[1]) for size in self.group_sizes(projection)]

    def uniform_rank(self, projection: Projection) -> int:
        """Return the rank of a projection where all have the same ratio, rounded down.

        Raises:
            ValueError: the ratio leaves less than the least rank.
        """
        least, most, step = self.limits(projection)
        whole = projection.shape[0]
        wanted = math.floor(self.ratio * whole + 1e-9)
        rank = most if wanted >= most else wanted // step * step
        if rank < least:
            raise ValueError(
                f"{projection.name}: ratio {self.ratio:g} leaves rank {wanted} of {whole}, below the least, {least}; "
                f"use a ratio of at least {math.ceil(1000 * least / whole) / 1000:g}, or a smaller rank_multiple"
            )
        return rank

    def rank_of(self, projection: Projection) -> int:
        """Return the rank of a projection.

        Raises:
            ValueError: ``layers`` lacks it, or its rank is out of range.
        """
        if self.layers is None:
            return self.uniform_rank(projection)
        rank = int(planned_for(self.layers, "a rank", projection.name))
        groups, most = len(self.group_sizes(projection)), sum(self.most_of_groups(projection))
        if not groups <= rank <= most:
            raise ValueError(f"{projection.name}: layers gives it rank {rank}; it must be from {groups} to {most}")
        return rank
