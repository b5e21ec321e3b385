"""Compression runs: which layers, in which order, from which bytes."""

from hf_lowbit.compress.engine import Run, compress_model
from hf_lowbit.compress.intake import Intake
from hf_lowbit.compress.outcome import RunReport
from hf_lowbit.compress.source import CheckpointSource

__all__ = ["CheckpointSource", "Intake", "Run", "RunReport", "compress_model"]
