"""End-to-end quality of ARB-LLM on SmolLM2-135M: compress, save, load back, measure perplexity on held-out articles.

    python -m benchmarks.quality.arb                    # dense, rounding and all variants, about an hour on two cores
    python -m benchmarks.quality.arb --only rc-cgb --samples 32 --suffix=-32x512
    python -m benchmarks.report                         # renders the tables of README from the result files

Writes ``benchmarks/results/quality/<variant>.json``. Every variant goes through the files: what is measured is what a
user loads.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import assets
from benchmarks.common import calibration_sequences, heldout_sequences, write_result
from hf_lowbit import ARBConfig, packed_modules
from hf_lowbit.hf.save import save_model
from hf_lowbit.report.evaluate import perplexity

# name of the result -> options of ARBConfig; None is the dense model
VARIANTS: dict[str, dict[str, Any] | None] = {
    "dense": None,
    "rounding": {"variant": "rtn"},
    "billm": {"variant": "billm", "compensation": "reference"},
    "billm-exact": {"variant": "billm"},
    "arb": {"variant": "arb", "column_group_bitmap": False},
    "x": {"variant": "x", "column_group_bitmap": False},
    "x-cgb": {"variant": "x"},
    "rc": {"variant": "rc", "column_group_bitmap": False},
    "rc-cgb": {"variant": "rc"},
    "rc-cgb-reference": {"variant": "rc", "compensation": "reference"},
    "rc-cgb-3-iterations": {"variant": "rc", "iterations": 3},
}


def measure(name: str, calibration: Tensor, heldout: Tensor) -> dict[str, Any]:
    """Return the figures of one variant."""
    dense, options = assets.smollm2(), VARIANTS[name]
    result: dict[str, Any] = {
        "model": dense.name,
        "variant": name,
        "options": options,
        "calibration": list(calibration.shape),
        "heldout": list(heldout.shape),
    }
    if options is None:
        model = AutoModelForCausalLM.from_pretrained(dense)
        result["bytes"] = sum(file.stat().st_size for file in dense.glob("*.safetensors"))
        return {**result, "perplexity": perplexity(model, heldout, 4)}
    tokens = None if options["variant"] == "rtn" else calibration
    began = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(dense, quantization_config=ARBConfig(calibration=tokens, **options))
    result["seconds"] = time.perf_counter() - began
    rows = model.hf_quantizer.report.rows
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model"
        save_model(model, path)
        loaded = AutoModelForCausalLM.from_pretrained(path)
        with torch.no_grad():
            before, after = (m(input_ids=heldout[:1, :32]).logits for m in (model, loaded))
        if not torch.equal(before, after):
            raise RuntimeError("the reloaded model does not give the same logits")
        result["perplexity"] = perplexity(loaded, heldout, 4)
        result["bytes"] = sum(file.stat().st_size for file in path.glob("*.safetensors"))
    packed = packed_modules(loaded).values()
    weights = sum(layer.in_features * layer.out_features for layer in packed)
    result["bits_per_weight"] = 8 * sum(layer.packed.nbytes for layer in packed) / weights
    result["salient_share"] = statistics.mean(layer.spec.salient / layer.in_features for layer in packed)
    result["errors"] = {
        kind: statistics.mean(
            row["output_error"] or row["weight_error"] for row in rows if row["module"].endswith(kind)
        )
        for kind in sorted({row["module"].rpartition(".")[2] for row in rows})
    }
    return result


def main() -> None:
    """Parse arguments, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--heldout", type=int, default=32, help="held-out sequences")
    parser.add_argument("--suffix", default="", help="of the result files' names, for other settings")
    arguments = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(assets.smollm2())
    calibration = calibration_sequences(tokenizer, arguments.samples, arguments.sequence_length)
    heldout = heldout_sequences(tokenizer, arguments.heldout, arguments.sequence_length)
    for name in arguments.only:
        result = measure(name, calibration, heldout)
        write_result(f"quality/{name}{arguments.suffix}", result)
        print(
            name, {key: result.get(key) for key in ("perplexity", "bits_per_weight", "bytes", "seconds")}, flush=True
        )


if __name__ == "__main__":
    main()
