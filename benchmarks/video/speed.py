"""Time of a denoising step on the CPU: dense, packed by DVD-Quant, and packed by other packages, in turn.

    python -m benchmarks.video.speed      # three minutes on one core, then python -m benchmarks.report

Two transformers: the trained one of ``assets.video`` (six clips of 128 tokens, 128 columns: what a call costs
beside its products), and one block in the sizes of Wan 2.1 1.3B on 512 tokens with random weights (what a product
costs). All versions quantize the same layers, those of the blocks. Peers that are installed take part: ``pip install
torchao optimum-quanto``. torchao's weights of four bits have no kernel of their own for x86 processors; its int4 here
are weights of four bits, kept as int8, with activations of eight.

The floor is the time in which the step's operations, attention included, would run at the fastest rate that torch
itself reaches on this machine: ``torch._int_mm`` on a product of the larger transformer, measured in the same run.

One thread, and the time that it has had a core: others on the machine take turns, and only disturb caches and memory.

Writes ``benchmarks/results/video_speed.json``.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import statistics
import time
from collections.abc import Callable, Collection
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from assets import video
from benchmarks.common import write_result
from hf_lowbit import DVDQuantConfig, RunOptions, packed_modules, quantize, set_act_bits

REPEATS = 7
# Weights of the searched grid would take minutes to make and the same time to multiply.
PACKED = DVDQuantConfig(preset="w4a4", weight_init="minmax", run=RunOptions(progress=False))
Step = Callable[[], Tensor]


def wan_block() -> tuple[Any, dict[str, Tensor]]:
    """Return one block in the sizes of Wan 2.1 1.3B with random weights, and inputs of 512 tokens."""
    from diffusers import WanTransformer3DModel

    torch.manual_seed(0)
    model = WanTransformer3DModel(num_attention_heads=12, attention_head_dim=128, ffn_dim=8960, num_layers=1)
    latents, words = torch.randn(1, 16, 2, 32, 32), torch.randn(1, 64, 4096)
    return model.eval(), {"hidden_states": latents, "timestep": torch.tensor([500]), "encoder_hidden_states": words}


def trained() -> tuple[Any, dict[str, Tensor]]:
    """Return the trained transformer, and inputs of six clips."""
    words = video.indices(video.PROMPTS)
    inputs = {"hidden_states": video.noise(), "timestep": torch.full((6,), 500.0)}
    return video.load(), {**inputs, "encoder_hidden_states": video.embed(words)}


CASES = {"trained, 6 clips of 128 tokens": trained, "block of Wan 1.3B, 512 tokens": wan_block}


def versions(dense: Any, inputs: dict[str, Tensor]) -> dict[str, Step]:
    """Return the calls to be timed; all but the first work in bfloat16."""

    def call(model: Any, dtype: torch.dtype) -> Step:
        given = {name: tensor.to(dtype) for name, tensor in inputs.items()}
        return lambda: model(**given, return_dict=False)[0]

    half = copy.deepcopy(dense).bfloat16()
    packed = copy.deepcopy(half)
    quantize(packed, PACKED)
    names = set(packed_modules(packed))

    def ours(bits: int) -> Step:
        run = call(packed, torch.bfloat16)

        def step() -> Tensor:
            set_act_bits(packed, bits)
            return run()

        return step

    found = {"dense float32": call(dense, torch.float32), "dense bfloat16": call(half, torch.bfloat16)}
    found |= {"DVD-Quant W4A4": ours(4), "DVD-Quant W4A8": ours(8)}
    return found | {name: call(model, torch.bfloat16) for name, model in peers(half, names).items()}


def peers(half: Any, names: Collection[str]) -> dict[str, Any]:
    """Return copies of a model whose layers of these names are quantized by the packages that are installed."""
    found = {}
    with contextlib.suppress(ImportError):
        from torchao.quantization import (
            Int8DynamicActivationInt8WeightConfig,
            Int8DynamicActivationIntxWeightConfig,
            Int8WeightOnlyConfig,
            PerGroup,
            quantize_,
        )

        groups = PerGroup(PACKED.group_size)
        four = Int8DynamicActivationIntxWeightConfig(weight_dtype=torch.int4, weight_granularity=groups)
        for name, config in {
            "torchao int8": Int8WeightOnlyConfig(),
            "torchao int8, activations int8": Int8DynamicActivationInt8WeightConfig(),
            "torchao int4, activations int8": four,
        }.items():
            found[name] = copy.deepcopy(half)
            quantize_(found[name], config, lambda module, path: isinstance(module, nn.Linear) and path in names)
    with contextlib.suppress(ImportError):
        from optimum.quanto import freeze, qint4
        from optimum.quanto import quantize as quanto

        found["optimum-quanto int4"] = copy.deepcopy(half)
        quanto(found["optimum-quanto int4"], weights=qint4, include=sorted(names))
        freeze(found["optimum-quanto int4"])
    return found


def milliseconds(steps: dict[str, Step], repeats: int) -> dict[str, list[float]]:
    """Return by name the 20th, 50th and 80th percentile of the time of a call, all called in turn."""
    spent: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(repeats + 1):
        for name, step in steps.items():
            began = time.process_time()
            step()
            if turn:  # the first call prepares
                spent[name].append(1000 * (time.process_time() - began))
    return {
        name: [statistics.quantiles(times, n=5)[0], statistics.median(times), statistics.quantiles(times, n=5)[3]]
        for name, times in spent.items()
    }


def peak_rate() -> float:
    """Return operations per second of a large product of int8, the best of several."""
    left = torch.randint(-8, 8, (512, 1536), dtype=torch.int8)
    right = torch.randint(-8, 8, (1536, 8960), dtype=torch.int8)
    best = 0.0
    for _ in range(10):
        began = time.process_time()
        torch._int_mm(left, right)
        best = max(best, 2 * 512 * 1536 * 8960 / (time.process_time() - began))
    return best


def measure(repeats: int) -> dict[str, Any]:
    """Return times and the floor of each case."""
    cases = {}
    rate = peak_rate()
    for name, make in CASES.items():
        model, inputs = make()
        with FlopCounterMode(display=False) as counter:
            model(**inputs)
        spent = milliseconds(versions(model, inputs), repeats)
        rate = max(rate, peak_rate())
        cases[name] = {"milliseconds": spent, "operations": counter.get_total_flops()}
    installed = {}
    for package in ("torchao", "optimum-quanto", "diffusers"):
        with contextlib.suppress(ImportError):
            installed[package] = version(package)
    return {"cases": cases, "operations_per_second": rate, "repeats": repeats, "peers": installed}


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=REPEATS, help="calls of each version that count")
    repeats = parser.parse_args().repeats
    if repeats < 2:
        parser.error(f"--repeats must be at least 2, for percentiles, got {repeats}")
    torch.set_num_threads(1)
    with torch.no_grad():
        write_result("video_speed", measure(repeats))


if __name__ == "__main__":
    main()
