"""CondiQuant on DAT-light, a pretrained super-resolution transformer: linear layers at 4, 3 and 2 bits.

    python -m benchmarks.quality.condiquant_dat [--runs w2-dobi ...]

Measured on the same photographs as ``benchmarks.quality.condiquant``, calibrated on 12 patches of 64 × 64 pixels as
the model receives them. The model is of no library, so it is quantized in memory, and what happens inside attention
stays in full precision.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import time
from typing import Any

import torch

from assets import super_resolution
from assets.dat import dat_light
from benchmarks.common import write_result
from benchmarks.quality.condiquant import BITS, VARIANTS
from hf_lowbit import CondiQuantConfig, RunOptions
from hf_lowbit.compress import compress_model
from hf_lowbit.report.super_resolution import score

NAMES = ("minmax", "percentile", "dobi", "output", "condiquant-dobi", "condiquant-least", "condiquant")


def measure(bits: int, changes: dict[str, Any]) -> dict[str, Any]:
    """Return the figures of one variant."""
    model = dat_light()
    config = CondiQuantConfig(
        weight_bits=bits, act_bits=bits, calibration=str(super_resolution.photos("train")), samples=12, patch_size=64,
        quantize_attention=False, skip=("pos",), run=RunOptions(progress=False, batch_size=4), **changes,
    )  # fmt: skip
    began = time.perf_counter()
    with torch.no_grad():
        _, report = compress_model(model, config)
    found = {"bits": bits, "options": changes, "seconds": time.perf_counter() - began}
    traces = [row["trace"][0] for row in report.rows if row["trace"]]
    for name in ("condition_before", "condition_after", "output_change", "total_error") if traces else ():
        found[name] = statistics.mean(trace[name] for trace in traces)
    return {**found, **score(model, super_resolution.held_out(), super_resolution.SCALE)}


def main() -> None:
    """Measure what is asked for."""
    names = ["dense", *(f"w{bits}-{variant}" for bits in BITS for variant in NAMES)]
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--runs", nargs="+", choices=names, default=names, metavar="RUN")
    for name in arguments.parse_args().runs:
        if name == "dense":
            held_out, scale = super_resolution.held_out(), super_resolution.SCALE
            result = {"dense": score(dat_light(), held_out, scale), "bicubic": score(None, held_out, scale)}
        else:
            bits, _, variant = name.partition("-")
            result = measure(int(bits[1:]), VARIANTS[variant])
        print(name, {key: round(value, 4) for key, value in result.items() if isinstance(value, (int, float))})
        write_result(f"quality_condiquant_dat/{name}", {"run": name, **result})


if __name__ == "__main__":
    torch.set_num_threads(1)
    logging.basicConfig(level=logging.WARNING)
    main()
