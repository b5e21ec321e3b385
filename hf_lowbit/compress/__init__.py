"""Compression runs: which layers, in which order, from which bytes."""

from hf_lowbit.compress.engine import RunReport, compress_model
from hf_lowbit.compress.source import CheckpointSource

__all__ = ["CheckpointSource", "RunReport", "compress_model"]
