"""Error of single layers on SmolLM2-135M, all variants on the same inputs (those of the dense model).

    python -m benchmarks.quality.layers                 # blocks 0, 15, 29, about ten minutes on two cores
    python -m benchmarks.quality.layers --blocks 15 --samples 32

Writes ``benchmarks/results/quality_layers/block<i>.json``: for each linear and variant the squared relative errors of
weights and outputs, ``‖W-Q‖²/‖W‖²`` and ``Tr(R S Rᵀ)/Tr(W S Wᵀ)``.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch import nn
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

import assets
from benchmarks.common import calibration_sequences, write_result
from hf_lowbit import ARBConfig
from hf_lowbit.calibration import capture
from hf_lowbit.compress.outcome import relative_errors
from hf_lowbit.methods.arb.algorithm import quantize

# name in the table -> options
VARIANTS: dict[str, dict[str, Any]] = {
    "rounding": {"variant": "rtn"},
    "billm": {"variant": "billm", "compensation": "reference"},
    "billm, exact": {"variant": "billm"},
    "arb": {"variant": "arb", "column_group_bitmap": False},
    "x": {"variant": "x", "column_group_bitmap": False},
    "x + cgb": {"variant": "x"},
    "rc": {"variant": "rc", "column_group_bitmap": False},
    "rc + cgb": {"variant": "rc"},
    "rc + cgb, reference": {"variant": "rc", "compensation": "reference"},
    "rc + cgb, none": {"variant": "rc", "compensation": "none"},
}


def measure(block: int, samples: int, length: int) -> dict[str, Any]:
    """Return the errors of every variant for every linear of one block."""
    folder = assets.smollm2()
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokens = calibration_sequences(AutoTokenizer.from_pretrained(folder), samples, length)
    name, module = list(capture.find_stacks(model)[0].items())[block]
    linears = {f"{name}.{child}": m for child, m in module.named_modules() if isinstance(m, nn.Linear)}
    with torch.no_grad(), capture.collect_stats(linears) as stats:
        for batch in tokens.split(8):
            model.model(input_ids=batch, use_cache=False)
    rows: dict[str, Any] = {}
    jobs = [(layer, variant) for layer in linears for variant in VARIANTS]
    for layer, variant in tqdm(jobs, desc=f"block {block}", unit="fit"):
        weight = linears[layer].weight.detach().float()
        packed = quantize(weight, stats[layer].second_moment(), ARBConfig(**VARIANTS[variant]), layer)
        errors = relative_errors(weight, packed.unpack(), stats[layer])
        kind = layer.rpartition(".")[2]
        rows.setdefault(kind, {})[variant] = {
            **errors,
            "bits_per_weight": packed.bits_per_weight,
            "salient_share": packed.spec.salient / packed.spec.in_features,
        }
    return {"model": folder.name, "block": block, "samples": samples, "sequence_length": length, "linears": rows}


def main() -> None:
    """Parse arguments, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, nargs="+", default=[0, 15, 29])
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--sequence-length", type=int, default=512)
    arguments = parser.parse_args()
    for block in arguments.blocks:
        result = measure(block, arguments.samples, arguments.sequence_length)
        write_result(f"quality_layers/block{block}", result)
        for kind, variants in result["linears"].items():
            cells = [f"{name} {row['weight_error']:.3f}/{row['output_error']:.4f}" for name, row in variants.items()]
            print(kind, *cells, sep="  ")


if __name__ == "__main__":
    main()
