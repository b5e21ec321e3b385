"""One end-to-end measurement, for every method: compress, save, load back, perplexity on held-out articles.

What is measured is what a user loads: every variant goes through the files.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import assets
from benchmarks.common import calibration_sequences, heldout_sequences, write_result
from hf_lowbit import LowBitConfig, packed_modules
from hf_lowbit.hf.save import save_model
from hf_lowbit.report.evaluate import perplexity


def measure(config: LowBitConfig | None, calibration: Tensor, heldout: Tensor) -> dict[str, Any]:
    """Return the figures of one config, or of the dense model."""
    dense = assets.smollm2()
    result: dict[str, Any] = {
        "model": dense.name,
        "calibration": list(calibration.shape),
        "heldout": list(heldout.shape),
    }
    if config is None:
        model = AutoModelForCausalLM.from_pretrained(dense)
        result["bytes"] = sum(file.stat().st_size for file in dense.glob("*.safetensors"))
        return {**result, "perplexity": perplexity(model, heldout, 4)}
    began = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(dense, quantization_config=config)
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
    result["salient_share"] = statistics.mean(
        getattr(layer.spec, "salient", 0) / layer.in_features for layer in packed
    )
    result["seconds_per_layer"] = statistics.mean(row["seconds"] for row in rows)
    result["errors"] = {
        kind: statistics.mean(
            row["output_error"] or row["weight_error"] for row in rows if row["module"].endswith(kind)
        )
        for kind in sorted({row["module"].rpartition(".")[2] for row in rows})
    }
    layers = getattr(loaded.config.quantization_config, "layers", None)
    return result if layers is None else {**result, "layers": dict(layers)}


def parser(description: str | None, variants: Mapping[str, Any]) -> argparse.ArgumentParser:
    """Return the arguments that all end-to-end measurements share."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--only", nargs="+", choices=list(variants), default=list(variants))
    made.add_argument("--samples", type=int, default=128)
    made.add_argument("--sequence-length", type=int, default=512)
    made.add_argument("--heldout", type=int, default=32, help="held-out sequences")
    made.add_argument("--suffix", default="", help="of the result files' names, for other settings")
    return made


def sequences(arguments: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """Return calibration and held-out token ids."""
    tokenizer = AutoTokenizer.from_pretrained(assets.smollm2())
    calibration = calibration_sequences(tokenizer, arguments.samples, arguments.sequence_length)
    return calibration, heldout_sequences(tokenizer, arguments.heldout, arguments.sequence_length)


def write(name: str, options: Any, result: dict[str, Any], suffix: str) -> None:
    """Write one result file and say what is in it."""
    write_result(f"quality/{name}{suffix}", {"variant": name, "options": options, **result})
    print(name, {key: result.get(key) for key in ("perplexity", "bits_per_weight", "bytes", "seconds")}, flush=True)
