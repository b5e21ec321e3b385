"""Quality of PBS²P beside ARB-LLM: single matrices, layers of SmolLM2-135M, perplexity.

    python -m benchmarks.quality.pbs2p --part synthetic layers     # about five minutes on one core
    python -m benchmarks.quality.pbs2p --part quick                # perplexity, all layers fitted to the dense model
    python -m benchmarks.quality.pbs2p --part end-to-end           # through the files, as benchmarks.quality.arb
    python -m benchmarks.report                                    # renders the tables from the result files

``quick`` is cheap and unlike a real run: second moments come from the dense model, text is Python's language manual
for calibration and measuring alike, searches are coarse. It is what the known figures were taken with.

Writes ``benchmarks/results/quality_pbs2p/*.json`` and ``benchmarks/results/quality/pbs2p-*.json``.
"""

from __future__ import annotations

import copy
import dataclasses
import time
from collections.abc import Callable, Iterable
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

import assets
from benchmarks.common import read_results, write_result
from benchmarks.quality.run import measure, parser, sequences, write
from hf_lowbit import ARBConfig, LowBitConfig, PBS2PConfig, registry
from hf_lowbit.calibration import capture
from hf_lowbit.calibration.data import tokenize
from hf_lowbit.calibration.stats import LinearStats
from hf_lowbit.compress.outcome import relative_errors
from hf_lowbit.report.evaluate import perplexity

# name of the result -> options of PBS2PConfig
VARIANTS: dict[str, dict[str, Any]] = {
    "pbs2p-4of8": {"n": 4},
    "pbs2p-6of8": {"n": 6},
    "pbs2p-5of8": {"n": 5},
    "pbs2p-4of8-one-group": {"n": 4, "groups": "none"},
    "pbs2p-6of8-uniform": {"n": 6, "importance": "uniform"},
    "pbs2p-4of8-uniform": {"n": 4, "importance": "uniform"},
    "pbs2p-5of8-uniform": {"n": 5, "importance": "uniform"},
    "pbs2p-8of8": {"n": 8},
}
# how a pruned matrix is fitted -> options
FITS: dict[str, dict[str, Any]] = {
    "prune, then binarize": {"fit": "plain"},
    "prune, then ARB": {"fit": "arb"},
    "SPBO, signs fixed": {"refresh_signs": False},
    "SPBO": {},
    "SPBO, one shot": {"stepwise": False},
}
QUICK: dict[str, LowBitConfig] = {
    "ARB-LLM_RC": ARBConfig(quantiles=9, iterations=5),
    "ARB-LLM_X": ARBConfig(variant="x", quantiles=9),
    "PBS²P 6:8, uniform": PBS2PConfig(n=6, quantiles=9, importance="uniform"),
    "PBS²P 4:8, uniform": PBS2PConfig(n=4, quantiles=9, importance="uniform"),
    "PBS²P 4:8": PBS2PConfig(n=4, quantiles=9),
    "PBS²P 4:8, one group": PBS2PConfig(n=4, quantiles=9, importance="uniform", groups="none"),
    "ARB-LLM_RC, blocks of 64": ARBConfig(quantiles=9, iterations=5, block_size=64),
    "PBS²P 8:8": PBS2PConfig(n=8, quantiles=9),
    "PBS²P 5:8, uniform": PBS2PConfig(n=5, quantiles=9, importance="uniform"),
    "PBS²P 6:8": PBS2PConfig(n=6, quantiles=9),
}


def synthetic_layer() -> tuple[Tensor, Tensor]:
    """Return a heavy-tailed 768 × 768 weight and the second moment of correlated inputs, float32."""
    rng = np.random.Generator(np.random.PCG64(0))
    weight = 0.02 * rng.standard_t(4, (768, 768)) * np.exp(0.5 * rng.normal(size=768))[None]
    inputs = rng.normal(size=(4096, 768)) @ (np.eye(768) + 0.02 * rng.normal(size=(768, 768)))
    spread = np.exp(0.4 * rng.normal(size=768))
    spread[rng.choice(768, 8, replace=False)] *= 5
    inputs = inputs * spread + 0.3 * spread * rng.normal(size=768)
    return torch.tensor(weight).float(), torch.tensor(inputs.T @ inputs / 4096).float()


def fit_errors(weight: Tensor, moment: Tensor, config: LowBitConfig) -> dict[str, Any]:
    """Return errors, size and duration of one fit."""
    stats = LinearStats("layer", weight.shape[1])
    stats.total, stats.tokens, stats.sequences = moment.double(), 1, 2  # second_moment() is then ``moment``
    began = time.perf_counter()
    unit = registry.LinearUnit("layer", weight)
    packed = registry.get(config.method).compress(unit, stats, config)
    seconds = time.perf_counter() - began
    errors = relative_errors(weight, packed.unpack(), stats)
    return {**errors, "bits_per_weight": packed.bits_per_weight, "seconds": seconds}


def table_of_fits(weight: Tensor, moment: Tensor, **options: Any) -> dict[str, Any]:
    """Return the errors of every fit, by groups and N of 8."""
    return {
        f"{groups}, {fit}": {
            f"{n}:8": fit_errors(weight, moment, PBS2PConfig(n=n, groups=groups, **changes, **options))
            for n in (8, 6, 5, 4)
        }
        for groups in ("none", "cgb")
        for fit, changes in FITS.items()
    }


def synthetic() -> dict[str, Any]:
    """Return the errors of every fit on the synthetic layer, with and without compensation."""
    weight, moment = synthetic_layer()
    kinds = {"exact": {}, "none": {"compensation": "none"}}
    return {kind: table_of_fits(weight, moment, **options) for kind, options in kinds.items()}


def manual(samples: int) -> tuple[Tensor, Tensor]:
    """Return (samples, 512) and (8, 512) token ids of Python's language manual, to calibrate on and to measure on."""
    stream = tokenize(list(topics.values()), AutoTokenizer.from_pretrained(assets.smollm2()))
    windows = stream[: len(stream) // 512 * 512].view(-1, 512)
    chosen = torch.linspace(0, len(windows) - 1, samples).long()
    others = [i for i in range(len(windows)) if i not in set(chosen.tolist())]
    return windows[chosen], windows[others][torch.linspace(0, len(others) - 1, 8).long()]


def dense_statistics(model: Any, tokens: Tensor, blocks: list[int]) -> tuple[dict[str, LinearStats], list[float]]:
    """Return statistics of the linears of some blocks, and the mean cosine of every block's input and output."""
    stack = capture.find_stacks(model)[0]
    linears = {
        f"{name}.{child}": m
        for i, (name, block) in enumerate(stack.items())
        if i in blocks
        for child, m in block.named_modules()
        if isinstance(m, nn.Linear)
    }
    cosines: dict[str, list[float]] = {name: [] for name in stack}

    def watch(name: str) -> Any:
        def after(block: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            similarity = torch.cosine_similarity(args[0].double(), capture.hidden_of(output).double(), dim=-1)
            cosines[name].append(float(similarity.mean()))

        return after

    handles = [block.register_forward_hook(watch(name)) for name, block in stack.items()]
    with torch.no_grad(), capture.collect_stats(linears) as stats:
        for batch in tqdm(tokens.split(4), desc="dense model", unit="batch"):
            model.model(input_ids=batch, use_cache=False)
    for handle in handles:
        handle.remove()
    return stats, [sum(found) / len(found) for found in cosines.values()]


def layers() -> dict[str, Any]:
    """Return the errors of every fit on four linears of block 15, on the inputs of the dense model."""
    model = AutoModelForCausalLM.from_pretrained(assets.smollm2(), dtype=torch.float32)
    stats, _ = dense_statistics(model, manual(32)[0], [15])
    found: dict[str, Any] = {}
    for name, own in tqdm(stats.items(), unit="layer"):
        weight, kind = model.get_submodule(name).weight.detach(), name.rpartition(".")[2]
        if kind in ("q_proj", "k_proj", "gate_proj", "down_proj"):
            found[kind] = table_of_fits(weight, own.second_moment(), quantiles=41)
            found[kind]["ARB-LLM_RC"] = {"8:8": fit_errors(weight, own.second_moment(), ARBConfig(quantiles=41))}
    return {"block": 15, "linears": found}


def quick(titles: Iterable[str] = QUICK) -> dict[str, Any]:
    """Return perplexity and mean errors of models whose layers were all fitted to the dense model's inputs.

    What the result file holds already is not measured again.
    """
    model = AutoModelForCausalLM.from_pretrained(assets.smollm2(), dtype=torch.bfloat16)
    calibration, heldout = manual(32)
    stats, cosines = dense_statistics(model, calibration, list(range(30)))
    names = list(capture.find_stacks(model)[0])
    found = read_results("quality_pbs2p").get("quick", {}).get("variants", {})
    found.setdefault("dense", {"perplexity": perplexity(model, heldout, 4)})
    for title in titles:
        if title in found:
            continue
        config = QUICK[title]
        plan = registry.get(config.method).plan
        if plan is not None:
            units = [registry.BlockUnit(name, 1) for name in names]
            planned = plan(units, config, lambda: dict(zip(names, cosines, strict=True)))
            config = dataclasses.replace(config, layers=planned or None)
        compressed, rows = copy.deepcopy(model), []
        for name, own in tqdm(stats.items(), desc=title, unit="layer"):
            linear: Any = compressed.get_submodule(name)
            unit = registry.LinearUnit(name, linear.weight.detach().float())
            packed = registry.get(config.method).compress(unit, own, config)
            dense = packed.unpack()
            rows.append((relative_errors(unit.weight, dense, own)["output_error"], packed.nbytes, dense.numel()))
            linear.weight.copy_(dense)
        found[title] = {
            "perplexity": perplexity(compressed, heldout, 4),
            "output_error": sum(row[0] for row in rows) / len(rows),
            "bits_per_weight": 8 * sum(row[1] for row in rows) / sum(row[2] for row in rows),
        }
        print(title, found[title], flush=True)
        write_result("quality_pbs2p/quick", {"cosines": cosines, "variants": found})
    return {"cosines": cosines, "variants": found}


PARTS: dict[str, Callable[[], dict[str, Any]]] = {"synthetic": synthetic, "layers": layers, "quick": quick}


def main() -> None:
    """Parse arguments, measure, write."""
    made = parser(__doc__, VARIANTS)
    made.add_argument("--quick", nargs="+", choices=list(QUICK), default=list(QUICK), help="variants of that part")
    made.add_argument("--part", nargs="+", choices=[*PARTS, "end-to-end"], default=[*PARTS, "end-to-end"])
    arguments = made.parse_args()
    with torch.no_grad():
        for part in arguments.part:
            if part in PARTS:
                result = quick(arguments.quick) if part == "quick" else PARTS[part]()
                write_result(f"quality_pbs2p/{part}", result)
    if "end-to-end" not in arguments.part:
        return
    calibration, heldout = sequences(arguments)
    for name in arguments.only:
        options = VARIANTS[name]
        result = measure(PBS2PConfig(calibration=calibration, **options), calibration, heldout)
        write(name, options, result, arguments.suffix)


if __name__ == "__main__":
    main()
