"""Packed checkpoints in serving engines: the entry point that vLLM calls, and what it needs.

vLLM calls every entry point of the group ``vllm.general_plugins`` in each of its processes, whatever model it serves.
So this one imports nothing but what it registers, says nothing, and never stops an engine that serves another model.
"""

from __future__ import annotations

import warnings


def register() -> None:
    """Make vLLM know ``quant_method`` "hf_lowbit"; calling it again does nothing."""
    try:
        from hf_lowbit.serving.vllm import register as with_vllm
    except ImportError as error:  # a vLLM of another age: it can serve all other models all the same
        warnings.warn(f"hf_lowbit cannot be used with this version of vLLM: {error}", stacklevel=2)
        return
    with_vllm()
