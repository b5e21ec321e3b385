"""Which data a run is calibrated on: rules of a recipe share one calibration, and must agree on it."""

from __future__ import annotations

from hf_lowbit.config import CalibratedConfig, LowBitConfig
from hf_lowbit.errors import CalibrationError
from hf_lowbit.image_config import WITH_DATA, ImageConfig
from hf_lowbit.recipe import rules_of


def check_calibration(config: LowBitConfig) -> CalibratedConfig | ImageConfig | None:
    """Return the config that names the calibration data of a run, None if it needs none.

    Raises:
        ValueError: rules of a recipe ask for different data.
        CalibrationError: a rule cannot do without data and names none.
    """
    for _, rule in rules_of(config):
        if isinstance(rule, ImageConfig) and rule.lacks_data:
            raise CalibrationError(rule.lacks_data)
    needy = [rule for _, rule in rules_of(config) if rule.needs != "none" and isinstance(rule, WITH_DATA)]
    if not needy:
        return None
    first = needy[0]
    for other in needy[1:]:
        if other.needs != first.needs:
            raise ValueError(f"all rules of a recipe share one calibration; they need {first.needs} and {other.needs}")
        if isinstance(first, ImageConfig):
            differs = [
                field for field in ("samples", "patch_size", "degradation", "seed") if _differs(first, other, field)
            ]
            differs += [] if other.calibration is first.calibration else ["calibration"]  # images are not compared
        else:
            fields = ("calibration", "samples", "sequence_length", "seed")
            differs = [field for field in fields if _differs(first, other, field)]
        if differs:
            raise ValueError(f"all rules of a recipe share one calibration; {differs[0]} differs between them")
    return first


def _differs(one: LowBitConfig, other: LowBitConfig, field: str) -> bool:
    return bool(getattr(one, field) != getattr(other, field))
