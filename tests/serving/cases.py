"""Packed models for an engine to serve: what they are, how they are written, what transformers makes of them."""

import os
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import assets
import hf_lowbit
from hf_lowbit import AdaSVDConfig, ARBConfig, DVDQuantConfig, LowBitRecipe, PBS2PConfig
from tests.tiny import tiny_model, tokens

# Engines have attention kernels for heads of 32 columns and more.
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1}
BINARY = ARBConfig(variant="rc", calibration=None)
# weights alone; minmax is the plain baseline of the search for grids, which takes longer and stores the same tensors
INTEGER = DVDQuantConfig(weight_init="minmax", rotation="none", balance="none", delta=None, a_bits=16)
ROTATED = DVDQuantConfig(weight_init="minmax", delta=None, a_bits=16)
ROUNDED = DVDQuantConfig(preset="w4a8", weight_init="minmax")
LOW_RANK = AdaSVDConfig(ratio=0.9, calibration=None)
SPARSE = PBS2PConfig(calibration=None)
MIXED = LowBitRecipe(
    {
        "*.q_proj": BINARY,
        "*.o_proj": ROTATED,
        "*.gate_proj": INTEGER,
        "*.up_proj": SPARSE,
        "*.down_proj": LOW_RANK,
        "*.k_proj": AdaSVDConfig(ratio=0.9, calibration=None, factors="int8"),
    },
    skip=["*.v_proj", "layers.1"],  # one part of a joined layer dense, and a whole block
)
# all formats, in a second
QUICK = LowBitRecipe(
    {
        "*.q_proj": ARBConfig(calibration=None, iterations=1),
        "*.o_proj": ROTATED,
        "*.gate_proj": INTEGER,
        "*.down_proj": LOW_RANK,
    },
    skip=["*.k_proj", "*.v_proj", "*.up_proj"],
)
METHODS = {
    "arb": BINARY,
    "pbs2p": SPARSE,
    "adasvd": LOW_RANK,
    "adasvd-int8": AdaSVDConfig(ratio=0.9, calibration=None, factors="int8"),
    "adasvd-arb": AdaSVDConfig(ratio=0.9, calibration=None, factors=BINARY),
    "integer": INTEGER,
    "integer-rotated": ROTATED,
    "integer-w4a8": ROUNDED,
    "mixed": MIXED,
}
# Structures that engines join, rename or store in other ways than transformers.
ARCHITECTURES = {
    "llama-bias": HEADS,
    "qwen2": HEADS,
    "qwen3": {"head_dim": 32},
    "gemma3": {"head_dim": 32, "query_pre_attn_scalar": 32},
    "mistral": HEADS,
    "gpt2": {"num_attention_heads": 2},
    "opt": {"num_attention_heads": 2},
    "phi": {"num_attention_heads": 2},
    "gpt_neox": {"num_attention_heads": 2},
}


def save(folder: Path, config: Any, architecture: str = "llama-tied", shards: str = "5GB", **changes: Any) -> Path:
    """Write a packed tiny model; ``changes`` are of its structure."""
    model = tiny_model(architecture, **{**HEADS, **changes} if architecture.startswith("llama") else changes)
    model.generation_config.eos_token_id = None
    hf_lowbit.quantize(model, config)
    model.save_pretrained(folder, max_shard_size=shards)
    return folder


def save_real(folder: Path, config: Any) -> Path:
    """Write SmolLM2-135M, packed, with its tokenizer."""
    model = AutoModelForCausalLM.from_pretrained(assets.smollm2(), quantization_config=config)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(assets.smollm2()).save_pretrained(folder)
    return folder


def continued(folder: Path, text: str, count: int) -> str:
    """Return the text that transformers writes after ``text``, in float32."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    (found,) = generated(folder, [tokenizer(text)["input_ids"]], count)
    return str(tokenizer.decode(found))


def settings() -> dict[str, str]:
    """Return the environment of a process with vLLM: one process and one thread, no network."""
    own = {
        "OMP_NUM_THREADS": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # bound to a core, it waits for whatever else runs there
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    # this environment's packages are not that one's
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | own


def prompts() -> list[list[int]]:
    """Return token ids of different lengths."""
    rows = tokens(4, 24).tolist()
    return [row[: 5 + 6 * number] for number, row in enumerate(rows)]


def generated(folder: Path, given: list[list[int]], count: int, dtype: torch.dtype = torch.float32) -> list[list[int]]:
    """Return the tokens that transformers generates greedily, one prompt at a time."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    found = []
    for prompt in given:
        with torch.no_grad():
            out = model.generate(
                torch.tensor([prompt]), do_sample=False, max_new_tokens=count, eos_token_id=None, pad_token_id=0
            )
        found.append(out[0, len(prompt) :].tolist())
    return found
