"""Exceptions of the package. Argument errors are plain ``ValueError``/``TypeError``; these name the rest."""

from __future__ import annotations


class HfLowbitError(Exception):
    """Base class of every error that is particular to this package."""


class CheckpointError(HfLowbitError):
    """A stored checkpoint is damaged, incomplete or inconsistent; the message names the tensor and the file."""


class CalibrationError(HfLowbitError, ValueError):
    """Calibration data is empty, too short or produces non-finite activations."""


class UnsupportedModelError(HfLowbitError, ValueError):
    """The structure of a model does not allow what was asked; the message names the modules."""


class TeamError(HfLowbitError, RuntimeError):
    """Another process of a run has failed or is gone; the message says what it said, or how to go on."""


class HubError(HfLowbitError):
    """The Hub refused, cannot be reached or holds other bytes; the message names the repository and the way out."""
