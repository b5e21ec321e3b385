"""Layers of the real model with what goes into them, for tests beside known figures."""

from pydoc_data.topics import topics

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_lowbit.calibration import capture
from hf_lowbit.calibration.data import tokenize


def observed(path, names):
    """Return ``{name: (weight, statistics)}`` of linear layers of a decoder, in float32.

    The inputs are 32 windows of 512 tokens from Python's own language manual.

    Args:
        path: folder of the model.
        names: of the layers, after ``model.layers.``.
    """
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    stream = tokenize(list(topics.values()), AutoTokenizer.from_pretrained(path))
    windows = stream[: len(stream) // 512 * 512].view(-1, 512)
    chosen = windows[torch.linspace(0, len(windows) - 1, 32).long()]
    linears = {name: model.get_submodule(f"model.layers.{name}") for name in names}
    with torch.no_grad(), capture.collect_stats(linears) as stats:
        for batch in chosen.split(8):
            model.model(input_ids=batch, use_cache=False)
    return {name: (linears[name].weight.detach(), stats[name]) for name in names}


def block_15(path):
    """Return the same for all layers of block 15, by the last part of their names."""
    parts = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
    parts += ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    found = observed(path, [f"15.{part}" for part in parts])
    return {name.rpartition(".")[2]: pair for name, pair in found.items()}
