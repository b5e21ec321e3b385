"""CondiQuant on the small Swin2SR: PSNR on held-out photographs at 4, 3 and 2 bits, beside plainer grids.

    python -m benchmarks.quality.condiquant [--runs w2-dobi ...] [--model FOLDER]

Every variant goes through its files. Held out: the middle 128 × 128 pixels of five photographs, of which nothing is
trained or calibrated on. Calibration: 32 patches of 32 × 32 pixels as the model receives them.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageToImage

from assets import super_resolution
from benchmarks.common import write_result
from hf_lowbit import CondiQuantConfig
from hf_lowbit.hf.save import save_model
from hf_lowbit.report.inspect import inspect
from hf_lowbit.report.super_resolution import score

PLAIN = {"cond_strength": 0}
DOBI = {"bound_search": "dobi"}
VARIANTS: dict[str, dict[str, Any]] = {
    "minmax": {**PLAIN, "bound_search": "minmax"},
    "percentile": {**PLAIN, "bound_search": "percentile"},
    "dobi": {**PLAIN, **DOBI},
    "output": PLAIN,
    "condiquant-dobi": DOBI,
    "condiquant": {},
    "condiquant-least": {"cond_slack": 0.0},
    "condiquant-dobi-0.003": {**DOBI, "cond_strength": 0.003},
    "condiquant-dobi-0.01": {**DOBI, "cond_strength": 0.01},
    "condiquant-dobi-0.03": {**DOBI, "cond_strength": 0.03},
    "condiquant-dobi-0.06": {**DOBI, "cond_strength": 0.06},
    "condiquant-percentile": {"bound_search": "percentile"},
    "dobi-dqc": {**PLAIN, **DOBI, "refine": "dqc", "refine_steps": 100},
    "condiquant-dqc": {"refine": "dqc", "refine_steps": 100},
}
BITS = (4, 3, 2)


def config(bits: int, **changes: Any) -> CondiQuantConfig:
    """Return the config of a variant, calibrated on the photographs that the model was trained on."""
    photos = str(super_resolution.photos("train"))
    return CondiQuantConfig(weight_bits=bits, act_bits=bits, calibration=photos, patch_size=32, **changes)


def measure(model: Path, bits: int, changes: dict[str, Any]) -> dict[str, Any]:
    """Return the figures of one variant."""
    began = time.perf_counter()
    packed = AutoModelForImageToImage.from_pretrained(model, quantization_config=config(bits, **changes))
    seconds = time.perf_counter() - began
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model"
        save_model(packed, path)
        loaded = AutoModelForImageToImage.from_pretrained(path).eval()
        inspection = inspect(path)
        size = sum(file.stat().st_size for file in path.iterdir())
    traces = [row["trace"][0] for row in packed.hf_quantizer.report.rows if row["trace"]]
    found: dict[str, Any] = {
        "bits": bits,
        "options": changes,
        "seconds": seconds,
        "bytes": size,
        "inspected_bytes": inspection.total_bytes,
        "bits_per_weight": inspection.bits_per_weight,
        **score(loaded, super_resolution.held_out(), super_resolution.SCALE),
    }
    if traces:
        for name in ("condition_before", "condition_after", "output_change", "total_error", "strength"):
            found[name] = statistics.mean(trace[name] for trace in traces)
    return found


def without_body(path: Path) -> dict[str, float]:
    """Return the figures of the dense model when what its transformer blocks add is left out."""
    model = AutoModelForImageToImage.from_pretrained(path).eval()
    with torch.no_grad():
        for parameter in model.swin2sr.conv_after_body.parameters():
            parameter.zero_()
    return score(model, super_resolution.held_out(), super_resolution.SCALE)


def main() -> None:
    """Measure what is asked for."""
    names = [f"w{bits}-{variant}" for bits in BITS for variant in VARIANTS]
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--runs", nargs="+", choices=["dense", *names], default=["dense", *names], metavar="RUN")
    arguments.add_argument("--model", type=Path, help="folder of another Swin2SR; nothing is written then")
    given = arguments.parse_args()
    path = given.model or super_resolution.swin2sr()
    for name in given.runs:
        if name == "dense":
            model = AutoModelForImageToImage.from_pretrained(path).eval()
            result = {
                "dense": score(model, super_resolution.held_out(), super_resolution.SCALE),
                "bicubic": score(None, super_resolution.held_out(), super_resolution.SCALE),
                "without_body": without_body(path),
                "bytes": sum(file.stat().st_size for file in path.iterdir()),
                "parameters": sum(parameter.numel() for parameter in model.parameters()),
            }
        else:
            bits, _, variant = name.partition("-")
            result = measure(path, int(bits[1:]), VARIANTS[variant])
        print(name, {key: round(value, 4) for key, value in result.items() if isinstance(value, (int, float))})
        if given.model is None:
            write_result(f"quality_condiquant/{name}", {"run": name, **result})


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
