"""Options of BiDRN; defaults follow the ancestors' code where the paper is silent."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

from hf_lowbit.config import LowBitConfig, option, shown
from hf_lowbit.formats.binary_conv import ACTS, SHIFTS

STES = ("poly", "clip", "tanh")
POSITIONS = ("after_act", "before_act")
BLOCK_RESIDUALS = ("fp", "binary", "none")


@dataclasses.dataclass(frozen=True)
class UnitOptions:
    """How one binary convolution is made; see :class:`hf_lowbit.methods.bidrn.modules.BinaryConv2d`.

    Attributes:
        ste: gradient of the activations' sign, one of :data:`STES`.
        shift: of the input, one of :data:`SHIFTS`.
        act: one of :data:`ACTS`.
        lcr: whether the full-precision input is added to the output (local convolution residual).
        residual_position: where, one of :data:`POSITIONS`.
    """

    ste: str = "poly"
    shift: str = "bias"
    act: str = "rprelu"
    lcr: bool = True
    residual_position: str = "after_act"

    def __post_init__(self) -> None:
        for name, known in (("ste", STES), ("shift", SHIFTS), ("act", ACTS), ("residual_position", POSITIONS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")
        if type(self.lcr) is not bool:
            raise ValueError(f"lcr must be true or false, got {self.lcr!r}")

    @property
    def residual(self) -> str:
        """The spec's entry: position of the residual, "none" without one."""
        return self.residual_position if self.lcr else "none"


# The plain binary network that BiDRN is measured against: signs and scales, no residual around a convolution.
PLAIN = UnitOptions(ste="clip", shift="none", act="none", lcr=False)


@dataclasses.dataclass(kw_only=True)
class BiDRNConfig(LowBitConfig):
    """1-bit weights and activations in convolutions, with two full-precision residuals (BiDRN, arXiv 2311.14323).

    The method is one of training. A float checkpoint is accepted with ``for_training=True`` only, and is then no
    usable model: train it, and pack it with :func:`hf_lowbit.pack_convs`. A packed checkpoint loads like any other.
    """

    method: ClassVar[str] = "bidrn"

    ste: str = option(
        "poly", "gradient of the sign: quadratic (2 - 2|x|), clip, or tanh with a learned slope", choices=STES
    )
    shift: str = option(
        "bias", "per input channel before the sign: none, an addend, or factor and addend", choices=SHIFTS
    )
    act: str = option("rprelu", "activation of a unit; ReLU would make the next sign constant", choices=ACTS)
    lcr: bool = option(True, "add the full-precision input of each convolution to its output")
    residual_position: str = option("after_act", "where that is added", choices=POSITIONS)
    block_residual: str = option(
        "fp", "projections around blocks: left in full precision, or binary", choices=BLOCK_RESIDUALS[:2]
    )
    min_channels: int = option(8, "convolutions that read fewer channels stay as they are", low=1, high=4096)
    side_dtype: str = option("float32", "dtype of stored scales, shifts and slopes", choices=("float32", "float16"))
    for_training: bool = option(False, "accept a float checkpoint, as a start for training")
    save_latents: bool = option(False, "let save_pretrained write the training form with its real-valued weights")
    # names of the convolutions that are binary, of a model in training form; a packed one has `modules` instead
    latents: Any = dataclasses.field(default=(), repr=False)

    def __post_init__(self) -> None:
        if isinstance(self.latents, list):
            self.latents = tuple(self.latents)
        super().__post_init__()

    def problems(self) -> list[str]:
        """Return what is wrong with the values, empty if nothing is."""
        found = super().problems()
        names = self.latents
        if not isinstance(names, Sequence) or isinstance(names, str):
            found.append(f"latents must be a list of module names, got {shown(names)}")
        elif not all(
            isinstance(n, str) and n and len(n) <= 1000 and n.isprintable() and all(n.split(".")) for n in names
        ):
            found.append("latents must be names of modules")
        elif self.latents and self.modules:
            found.append("latents and modules must not be given together: a model is in training form or packed")
        return found

    @property
    def needs(self) -> str:
        """Data that a run with these options needs."""
        return "training"

    @property
    def unit(self) -> UnitOptions:
        """Options of one convolution."""
        return UnitOptions(self.ste, self.shift, self.act, self.lcr, self.residual_position)

    def _values(self) -> dict[str, Any]:
        values = super()._values()
        if self.latents:
            values["latents"] = list(self.latents)
        return values
