"""Configs of methods that are calibrated on images."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hf_lowbit.config import (
    CalibratedConfig,
    CalibrationRecord,
    LowBitConfig,
    calibration_record,
    option,
    record_problems,
    shown,
)

KINDS = ("image file", "image folder", "images")


@dataclasses.dataclass(kw_only=True)
class ImageConfig(LowBitConfig):
    """Adds where calibration images come from.

    Attributes:
        calibration: a folder of images or a file, a list of files, PIL images, arrays or tensors, a batch of them, a
            dataset with a column "image", or None for a run without data. Images are not compared and not saved: what
            is saved is a record of how many pixels were used, and their hash.
    """

    calibration: Any = dataclasses.field(default=None, repr=False, compare=False)
    samples: int = option(32, "calibration patches", low=1, high=2**20)
    patch_size: int = option(64, "side of a patch as the model receives it, in pixels", low=4, high=2**14)
    degradation: str = option(
        "bicubic",
        "bicubic: images are of full resolution and shrunk by the model's scale first; none: they are its inputs",
        choices=("bicubic", "none"),
    )
    seed: int = option(0, "seed of the calibration sample", low=0, high=2**63 - 1)

    def __post_init__(self) -> None:
        if isinstance(self.calibration, Path):
            self.calibration = str(self.calibration)
        super().__post_init__()

    @property
    def needs(self) -> str:
        """Data that a run with these options needs: "none" or "images"."""
        return "none" if self.calibration is None else "images"

    @property
    def rows_kept(self) -> int:
        """Inputs of every layer, in rows, that a run keeps as a sample beside their second moment; 0 for none."""
        return 0

    @property
    def keeps_dense(self) -> bool:
        """Whether the dense model is kept until the end of the run."""
        return False

    @property
    def sequential(self) -> bool:
        """Whether each layer is calibrated on what the compressed ones before it produce."""
        return False

    @property
    def lacks_data(self) -> str | None:
        """Return why a run without calibration images is impossible, None if it is not."""
        return None

    def problems(self) -> list[str]:
        """Return what is wrong with the values, empty if nothing is."""
        found, data = super().problems(), self.calibration
        if isinstance(data, CalibrationRecord):
            found += record_problems(data, KINDS)
        elif isinstance(data, (bool, int, float, Mapping)) or data == "":
            found.append(f"calibration must be a folder, a file, images or a dataset, got {shown(data)}")
        return found

    def _values(self) -> dict[str, Any]:
        values, data = super()._values(), self.calibration
        if data is not None and not isinstance(data, CalibrationRecord):
            data = CalibrationRecord(kind=images_kind(data))
        values["calibration"] = None if data is None else dataclasses.asdict(data)
        return values

    @classmethod
    def _from_values(cls, values: dict[str, Any]) -> Any:
        data = values.get("calibration")
        if isinstance(data, Mapping):
            values = {**values, "calibration": calibration_record(data, cls.__name__)}
        elif data is not None:  # it would be somebody else's path
            raise ValueError(f"{cls.__name__}: a stored calibration is a record, got {shown(data)}")
        return cls(**values)


# Configs that name data; what a run needs of it, ``needs`` says.
WITH_DATA = (CalibratedConfig, ImageConfig)


def images_kind(data: Any) -> str:
    """Return in a word what ``data`` is: one of :data:`KINDS`."""
    if isinstance(data, str):
        return "image folder" if Path(data).is_dir() else "image file"
    return "images"
