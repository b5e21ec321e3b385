"""Options of DVD-Quant; defaults are the paper's where it states them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from hf_lowbit.config import CalibratedConfig, option, shown
from hf_lowbit.formats.integer import SCALE_DTYPES
from hf_lowbit.numerics.rotation import BLOCKS

_LARGEST_GROUP = 2**14


def _columns(value: Any) -> str | None:
    if type(value) is int and 16 <= value <= _LARGEST_GROUP and value % 16 == 0:
        return None
    return f"must be a multiple of 16 up to {_LARGEST_GROUP}, got {shown(value)}"


def _columns_or_row(value: Any) -> str | None:
    wrong = None if type(value) is int and value == -1 else _columns(value)
    return wrong and wrong.replace("must be", "must be -1 (rows) or", 1)


def _delta(value: Any) -> str | None:
    if value is None or (type(value) in (int, float) and 0 <= value <= 1e6):
        return None
    return f"must be None or a number from 0 to 1e6, got {shown(value)}"


def _seed(value: Any) -> str | None:
    if value is None or (type(value) is int and 0 <= value < 2**63):
        return None
    return f"must be None or an integer from 0 to {2**63 - 1}, got {shown(value)}"


def _bits(value: Any) -> str | None:
    if type(value) is int and (2 <= value <= 8 or value == 16):
        return None
    return f"must be from 2 to 8, or 16 (activations stay as they are), got {shown(value)}"


@dataclasses.dataclass(kw_only=True)
class DVDQuantConfig(CalibratedConfig):
    """INT4 weights and rounded activations for diffusion transformers, without data (DVD-Quant, arXiv 2505.18663).

    ``DVDQuantConfig()`` stores weights of 4 bits and rounds activations to 8, or in diffusion steps that change little
    to 4 bits (``delta``); ``DVDQuantConfig(preset="w4a4")`` always to 4. Presets set other defaults and can be
    combined with options: ``paper`` is what the paper states, ``default`` adds a scale for each 32 columns, rotation
    in blocks of 128 and the balance of columns that stand out, ``w4a8`` and ``w4a4`` are ``default`` with one width
    of activations.

    In a diffusion transformer the attention and feed-forward layers of the repeated blocks are rounded on both sides,
    their modulation in weights only, and all else stays dense. In any other model all layers that are compressed are
    rounded on both sides, with the stored width: nothing there has diffusion steps.

    ``DVDQuantConfig(preset="weights")`` rounds weights alone and balances no columns: without data, balanced and
    rotated, a language model loses most of what it knows (SmolLM2 in ``python -m benchmarks.equal_bytes rows``). The
    other presets balance in any model; for one of language, ``balance="none"`` is the safer choice.

    In language models ``calibration`` lets columns make up for each other's rounding on the inputs that a layer gets
    (GPTQ, arXiv 2210.17323, in the rotated basis), which the paper's method, being without data, does not.
    """

    method: ClassVar[str] = "dvd_quant"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "default": {},
        "paper": {"group_size": -1, "rotation": "full", "balance": "none", "delta": 0.09, "refine": "full"},
        "w4a8": {"delta": None, "a_bits": 8},
        "w4a4": {"delta": None, "a_bits": 4},
        "weights": {"delta": None, "a_bits": 16, "balance": "none"},
    }

    calibration: Any = dataclasses.field(default=None, repr=False)
    w_bits: int = option(4, "bits of a weight", choices=(2, 3, 4, 8))
    group_size: int = option(
        32, "columns that share a weight scale, a multiple of 16; -1: one scale for each row", check=_columns_or_row
    )
    weight_init: str = option(
        "bgr",
        "grids of weights: bgr (or pbq, its former name) searches and refines; minmax, absmax: plain baselines",
        choices=("bgr", "pbq", "minmax", "absmax"),
    )
    refine: str = option(
        "best_start",
        "what bgr refines: full, every start; best_start, the best of a row, several times quicker",
        choices=("best_start", "full"),
    )
    n_bounds: int = option(20, "parts of a row's range, by which its ends move inwards (n)", low=1, high=1000)
    max_shrink: float = option(0.45, "share of the range by which either end moves at most", low=0.0, high=0.49)
    iters: int = option(20, "refinements of a start at most", low=0, high=1000)
    tol: float = option(1e-4, "share of the error that a refinement must take away to go on", low=0.0, high=1.0)
    rotation: str = option(
        "block",
        "Hadamard rotation of inputs: in blocks, of all columns (full), none",
        choices=("block", "full", "none"),
    )
    rotation_block: int = option(128, "columns of a block, or the next smaller that divides the layer", choices=BLOCKS)
    rotation_signs_seed: int | None = option(
        None, "seed of random signs before the rotation; None: a plain Hadamard matrix", check=_seed
    )
    balance: str = option(
        "weight_columns",
        "even out columns that stand out by the weights' own largest values, before the rotation; none: do not",
        choices=("weight_columns", "none"),
    )
    beta: float = option(1.0, "strength of the balance (β)", low=0.0, high=1.0)
    balance_beyond: float = option(
        4.0,
        "how many times larger or smaller than in the median column weights must be; 1: all columns",
        low=1.0,
        high=1e6,
    )
    act_scale: str = option(
        "token_group",
        "which activations share a scale; channel is the printed form, which no integer product can follow",
        choices=("token_group", "token", "channel", "channel_token"),
    )
    act_group_size: int = option(64, "columns of an activation group, a multiple of 16", check=_columns)
    delta: float | None = option(
        0.09,
        "change of the output, added up since the last step with many bits, at which a step gets many again (δ); "
        "None: a_bits in all steps",
        check=_delta,
    )
    warmup_steps: int = option(2, "first steps that get many bits in any case", low=1, high=10_000)
    a_bits: int = option(4, "bits of activations without delta: 2 to 8, or 16 for not rounded", check=_bits)
    a_bits_low: int = option(4, "bits of activations in a step that changes little", low=2, high=8)
    a_bits_high: int = option(8, "bits of activations in other steps", low=2, high=8)
    modulation: str = option(
        "weight_only",
        "modulation layers in blocks: weight_only, skip (dense), full (activations, too)",
        choices=("weight_only", "skip", "full"),
    )
    layers: str = option(
        "blocks", "compress layers of repeated blocks, or all that skip leaves", choices=("blocks", "all")
    )
    scale_dtype: str = option("float16", "dtype of stored scales", choices=tuple(SCALE_DTYPES))
    damping: float = option(
        0.01, "share of the mean diagonal added to the second moment, with calibration", low=1e-8, high=1.0
    )

    def problems(self) -> list[str]:
        """Return what is wrong with the values, empty if nothing is."""
        found = super().problems()
        if not found and self.a_bits_low > self.a_bits_high:
            found.append(f"a_bits_low must not exceed a_bits_high = {self.a_bits_high}, got {self.a_bits_low}")
        if not found and self.calibration is not None and self.weight_init not in ("bgr", "pbq"):
            found.append(f"weight_init={self.weight_init!r} is a baseline without data; leave calibration out")
        return found

    @property
    def columns_per_scale(self) -> int:
        """Columns that share a weight scale, 0 for a whole row."""
        return max(self.group_size, 0)

    @property
    def stored_act_bits(self) -> int:
        """Bits that activations have in a call for which nobody chooses: with a schedule the many."""
        return self.a_bits if self.delta is None else self.a_bits_high
