"""Memory of a run that compresses while loading: it must hold one block, whatever the number of blocks.

Two Llama-shaped checkpoints of random weights differ in nothing but the number of blocks, 6 and 24. Each run has a
process of its own; what counts is the highest resident memory above that at the start, when everything is imported
and a tiny model has been compressed. The packed layers that the run makes have to stay, so this part grows with the
number of blocks; it is stated, and the growth without it as well. Of what is resident, pages of files are told apart
from the rest: the kernel can drop them at any time.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from hf_lowbit import ARBConfig, RunOptions, packed_modules
from tests.drills.process import MB, called, check, watched

VOCABULARY = 1000
ALLOWED_GROWTH = 1.3


def save_dense(folder: Path, hidden: int, intermediate: int, blocks: int, shard: str) -> None:
    """Save a model of random weights in bfloat16, in several files."""
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=blocks,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
        vocab_size=VOCABULARY,
        dtype=torch.bfloat16,
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder, max_shard_size=shard)


def quick(calibrated: bool) -> ARBConfig:
    """Return the default method with few steps, which change the time and not the memory."""
    tokens = torch.randint(0, VOCABULARY, (4, 64), generator=torch.Generator().manual_seed(0))
    return ARBConfig(
        calibration=tokens if calibrated else None,
        samples=len(tokens),
        sequence_length=tokens.shape[1],
        iterations=1,
        quantiles=3,
        max_salient_per_block=4,
        run=RunOptions(progress=False, batch_size=2),
    )


def measure(folder: str, warm: str, calibrated: bool) -> dict[str, Any]:
    """Compress while loading, and return the memory that it took in this process."""
    AutoModelForCausalLM.from_pretrained(warm, quantization_config=quick(calibrated))
    with watched() as memory:
        model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=quick(calibrated))
    layers = packed_modules(model).values()
    packed = sum(layer.packed.nbytes for layer in layers)
    dense = sum(2 * layer.out_features * layer.in_features for layer in layers)
    return {**memory, "packed": round(packed / MB, 1), "dense weights": round(dense / MB, 1)}


def growth(kind: str, few: dict[str, Any], many: dict[str, Any], judged: bool) -> list[dict[str, Any]]:
    """Compare the runs over few and over many blocks, with the packed layers and without."""
    bare = [run["total"] - run["packed"] for run in (few, many)]
    ratios = many["total"] / few["total"], bare[1] / bare[0]
    rows = [
        (
            f"{kind}: highest memory with four times the blocks at most {ALLOWED_GROWTH} ×",
            f"{few['total']:.0f} to {many['total']:.0f} MB (pages of files {few['of files']:.0f} to "
            f"{many['of files']:.0f}; dense weights {few['dense weights']:.0f} to {many['dense weights']:.0f})",
        ),
        (
            f"{kind}: the same without the packed layers, which have to stay",
            f"{bare[0]:.0f} to {bare[1]:.0f} MB (packed layers {few['packed']:.0f} to {many['packed']:.0f})",
        ),
    ]
    return [
        check(required, f"{ratio:.2f} ×, {found}", ratio <= ALLOWED_GROWTH if judged else None)
        for (required, found), ratio in zip(rows, ratios, strict=True)
    ]


def drill(small: bool = False) -> dict[str, Any]:
    """Measure calibrated and data-free runs, and compare with the requirement; small ones are not judged."""
    hidden, intermediate, shard, blocks = (128, 256, "200KB", (1, 4)) if small else (1024, 2816, "100MB", (6, 24))
    figures: dict[str, Any] = {
        "checks": [],
        "hidden size": hidden,
        "intermediate size": intermediate,
        "blocks": blocks,
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_dense(folder / "tiny", 64, 128, 1, shard)
        for number in blocks:
            save_dense(folder / str(number), hidden, intermediate, number, shard)
        for kind, calibrated in [("calibrated", True)] if small else [("calibrated", True), ("without data", False)]:
            arguments = {"warm": str(folder / "tiny"), "calibrated": calibrated}
            few, many = (
                called("tests.drills.memory:measure", not small, folder=str(folder / str(number)), **arguments)
                for number in blocks
            )
            figures[kind] = [few, many]
            figures["checks"] += growth(kind, few, many, judged=not small)
    return figures
