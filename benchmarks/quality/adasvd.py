"""Quality and speed of AdaSVD on SmolLM2-135M: layers, perplexity at several ratios, decoding.

    python -m benchmarks.quality.adasvd --part layers decode guard      # some minutes each on one core
    python -m benchmarks.quality.adasvd --part adapters                 # what an adapter of the remainder takes back
    python -m benchmarks.quality.adasvd --part quick                    # perplexity, layers fitted to the dense model
    python -m benchmarks.quality.adasvd --part sequential               # perplexity of real runs, some minutes each
    python -m benchmarks.report                                         # renders the tables from the result files

Text is Python's language manual, for calibration and, other parts of it, for measuring: what the known figures were
taken with. ``quick`` takes all second moments from the dense model, so that every variant shares them.

Writes ``benchmarks/results/quality_adasvd/*.json``.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

import assets
import hf_lowbit
from benchmarks.common import calibration_sequences, read_results, write_result
from benchmarks.quality.pbs2p import dense_statistics, manual
from hf_lowbit import AdaSVDConfig, ARBConfig, PackedLinear, RunOptions, packed_modules, registry
from hf_lowbit.calibration import capture
from hf_lowbit.formats import LowRankFormat
from hf_lowbit.hf.adapter import dense_weights, save_remainder
from hf_lowbit.methods.adasvd.options import rank_of, stays_dense
from hf_lowbit.numerics import low_rank
from hf_lowbit.report.evaluate import perplexity

RATIOS = (0.8, 0.6, 0.4)
# name of the variant -> where factors start, rounds of refits, importance of blocks
VARIANTS = {
    "plain SVD": ("svd", 0, "uniform"),
    "plain SVD, adaComp": ("svd", 1, "uniform"),
    "whitened SVD": ("whitened", 0, "uniform"),
    "whitened SVD, adaCR": ("whitened", 0, "one_minus_cos"),
    "whitened SVD, adaCR with cos": ("whitened", 0, "cos"),
}
LAYERS = ("15.self_attn.q_proj", "15.mlp.gate_proj", "15.mlp.down_proj", "28.self_attn.o_proj")
# how layers are calibrated -> options; the last is the default
WAYS: dict[str, dict[str, Any]] = {
    "blocks": {"sequential": False, "dense_target": 0.0},
    "layers": {"dense_target": 0.0},
    "blocks, half way": {"sequential": False},
    "layers, half way": {},
}
# name of the run -> options
SEQUENTIAL: dict[str, dict[str, Any]] = {
    "0.6, layers, half way, adaCR": {"ratio": 0.6},
    "0.8, layers, half way, adaCR": {"ratio": 0.8},
    "0.4, layers, half way, adaCR": {"ratio": 0.4},
    "0.6, blocks, half way, adaCR": {"ratio": 0.6, **WAYS["blocks, half way"]},
    "0.6, layers, adaCR": {"ratio": 0.6, **WAYS["layers"]},
    "0.6, layers, half way, uniform": {"ratio": 0.6, "importance": "uniform"},
    "0.4, layers, half way, uniform": {"ratio": 0.4, "importance": "uniform"},
    "0.8, layers, half way, uniform": {"ratio": 0.8, "importance": "uniform"},
    **{
        f"{ratio}, blocks, {kind}": {"ratio": ratio, "importance": importance, **WAYS["blocks"]}
        for ratio in RATIOS
        for kind, importance in (("adaCR", "one_minus_cos"), ("uniform", "uniform"))
    },
    "0.6, int4": {"ratio": 0.6, "factors": "int4"},
    "0.6, int8": {"ratio": 0.6, "factors": "int8"},
    "0.6, signs": {"ratio": 0.6, "factors": ARBConfig()},
    "0.6, 64 samples": {"ratio": 0.6, "samples": 64},
    "0.6, all the way": {"ratio": 0.6, "dense_target": 1.0},
}


def _pair(outputs: Tensor, weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    return outputs[:, :rank], outputs[:, :rank].T @ weight


def _relative(weight: Tensor, moment: Tensor, factors: tuple[Tensor, Tensor]) -> float:
    residual = weight - factors[0] @ factors[1]
    return float(((residual @ moment) * residual).sum() / ((weight @ moment) * weight).sum())


def layers() -> dict[str, Any]:
    """Return output errors of four layers, on the inputs of the dense model: starts, and refits from each."""
    model = AutoModelForCausalLM.from_pretrained(assets.smollm2(), dtype=torch.float32)
    stats, _ = dense_statistics(model, manual(32)[0], [15, 28])
    found: dict[str, Any] = {}
    for layer in tqdm(LAYERS, unit="layer"):
        name = f"model.layers.{layer}"
        weight = model.get_submodule(name).weight.detach().double()
        moment = stats[name].second_moment(torch.float64)
        starts = {
            "plain": low_rank.leading_outputs(weight, None),
            "whitened": low_rank.leading_outputs(weight, moment),
        }
        for ratio in RATIOS:
            rank = rank_of((weight.shape[0], weight.shape[1]), ratio)
            row: dict[str, Any] = {"rank": rank}
            for title, outputs in starts.items():
                pair = _pair(outputs, weight, rank)
                steps = list(low_rank.alternate(weight, moment, *pair, 15))
                row[title] = _relative(weight, moment, pair)
                row[f"{title}, 1"], row[f"{title}, 15"] = (_relative(weight, moment, steps[i]) for i in (1, -1))
            found.setdefault(layer, {})[str(ratio)] = row
    return {"layers": found}


def _error_share(weight: Tensor, moment: Tensor, factors: tuple[Tensor, Tensor]) -> float:
    return round(_relative(weight, moment, factors), 6)


# sequences of 512 tokens that factors are fitted to
SIZES = (2, 8, 32)


def guard() -> dict[str, Any]:
    """Return errors on tokens that were not calibrated on, of what a run keeps and of the other candidates.

    A run keeps the candidate with the least error on the calibration tokens, which is whitened truncation. A guard
    would hold out a tenth of the sequences, at least one, and keep the candidate with the least error there.
    Beside it, how far the text alone moves the errors of ``layers``.
    """
    model = AutoModelForCausalLM.from_pretrained(assets.smollm2(), dtype=torch.bfloat16)
    windows = manual(64)[0]
    calibration, others = windows[::2], windows[1::2]
    measured, _ = dense_statistics(model, others, [15, 28])
    wikipedia = calibration_sequences(AutoTokenizer.from_pretrained(assets.smollm2()), 32, 512)
    by_text = {"other windows of the manual": measured, "Wikipedia": dense_statistics(model, wikipedia, [15, 28])[0]}
    moved: dict[str, Any] = {}
    for kind, stats in by_text.items():
        for layer in LAYERS:
            name = f"model.layers.{layer}"
            weight = model.get_submodule(name).weight.detach().double()
            moment = stats[name].second_moment(torch.float64)
            for start, metric in (("plain", None), ("whitened", moment)):
                outputs = low_rank.leading_outputs(weight, metric)
                for ratio in RATIOS:
                    pair = _pair(outputs, weight, rank_of((weight.shape[0], weight.shape[1]), ratio))
                    moved.setdefault(f"{layer}, {ratio}, {start}", {})[kind] = _error_share(weight, moment, pair)
    found: dict[str, Any] = {}
    for size in SIZES:
        chosen = calibration[torch.linspace(0, 31, size).long()]
        held = max(1, size // 10)
        parts = (chosen, chosen[:-held], chosen[-held:])
        whole, most, tenth = (dense_statistics(model, tokens, [15, 28])[0] for tokens in parts)
        for layer in LAYERS:
            name = f"model.layers.{layer}"
            weight, test = (
                model.get_submodule(name).weight.detach().double(),
                measured[name].second_moment(torch.float64),
            )
            for ratio in RATIOS:
                rank = rank_of((weight.shape[0], weight.shape[1]), ratio)
                candidates = _candidates(weight, whole[name], rank)
                guarded = _candidates(weight, most[name], rank)
                judge = tenth[name].second_moment(torch.float64)
                best = min(guarded, key=lambda title: _relative(weight, judge, guarded[title]))
                found[f"{layer}, {ratio}, {size}"] = {
                    **{title: _error_share(weight, test, pair) for title, pair in candidates.items()},
                    "guarded": _error_share(weight, test, guarded[best]),
                    "guard chose": best,
                }
    return {"errors": found, "by_text": moved}


def _candidates(weight: Tensor, stats: Any, rank: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Return the factors among which a guard could choose, fitted as a run fits them."""
    moment = stats.second_moment(torch.float64)
    if stats.tokens < len(moment):
        moment = moment + AdaSVDConfig().damping * moment.diagonal().mean() * torch.eye(
            len(moment), dtype=moment.dtype
        )
    plain = low_rank.truncate(weight, None, rank)
    steps = list(low_rank.alternate(weight, moment, *plain, 3))
    return {
        "plain": plain,
        "plain, 1 round": steps[1],
        "plain, 3 rounds": steps[-1],
        "whitened": low_rank.truncate(weight, moment, rank),
    }


def _ratios(model: Any, cosines: dict[str, float], ratio: float, importance: str) -> dict[str, float]:
    """Return the ratio of every block, as a run would plan it."""
    config = AdaSVDConfig(ratio=ratio, importance=importance)
    units = []
    for name, block in capture.find_stacks(model)[0].items():
        shapes = tuple(m.weight.shape for m in block.modules() if isinstance(m, nn.Linear))
        units.append(registry.BlockUnit(name, sum(n * m for n, m in shapes), tuple((n, m) for n, m in shapes)))
    plan: Any = registry.get("adasvd").plan
    return plan(units, config, lambda: cosines) or dict.fromkeys(cosines, ratio)


def quick() -> dict[str, Any]:
    """Return perplexity and mean error of every variant, all layers fitted to the dense model's inputs."""
    model = AutoModelForCausalLM.from_pretrained(assets.smollm2(), dtype=torch.bfloat16)
    calibration, heldout = manual(32)
    blocks = list(capture.find_stacks(model)[0])
    stats, values = dense_statistics(model, calibration, list(range(len(blocks))))
    cosines = dict(zip(blocks, values, strict=True))
    cases = {(r, title): v for r in RATIOS for title, v in VARIANTS.items() if v[2] != "cos" or r == 0.6}
    plans = {case: _ratios(model, cosines, case[0], importance) for case, (_, _, importance) in cases.items()}
    models = {case: copy.deepcopy(model) for case in cases}
    errors: dict[Any, list[float]] = {case: [] for case in cases}
    held = dict.fromkeys(cases, 0)
    for name, own in tqdm(stats.items(), desc="layers", unit="layer"):
        weight = model.get_submodule(name).weight.detach().double()
        shape = (weight.shape[0], weight.shape[1])
        moment = own.second_moment(torch.float64)
        starts = {"svd": low_rank.leading_outputs(weight, None), "whitened": low_rank.leading_outputs(weight, moment)}
        for case, (start, iterations, _) in cases.items():
            ratio = plans[case][".".join(name.split(".")[:3])]
            if stays_dense(shape, ratio):
                held[case] += shape[0] * shape[1]
                errors[case].append(0.0)
                continue
            pair = _pair(starts[start], weight, rank_of(shape, ratio))
            *_, pair = pair, *low_rank.alternate(weight, moment, *pair, iterations)
            packed = LowRankFormat.pack(*low_rank.balance(*pair), torch.bfloat16)
            held[case] += packed.nbytes // 2
            errors[case].append(_relative(weight, moment, (packed.up.double(), packed.down.double())))
            models[case].get_submodule(name).weight.copy_(packed.unpack())
    total = sum(model.get_submodule(name).weight.numel() for name in stats)
    found: dict[str, Any] = {"dense": {"perplexity": perplexity(model, heldout, 4)}}
    for (ratio, title), fitted in models.items():
        case = (ratio, title)
        found[f"{ratio}, {title}"] = {
            "perplexity": perplexity(fitted, heldout, 4),
            "output_error": statistics.mean(errors[case]),
            "kept": held[case] / total,
            "ratios": plans[case],
        }
        print(case, found[f"{ratio}, {title}"]["perplexity"], flush=True)
    return {"cosines": cosines, "variants": found}


def sequential(titles: list[str]) -> dict[str, Any]:
    """Return perplexity of runs in which every block is calibrated on what the compressed ones before it produce.

    What the result file holds already is not measured again.
    """
    calibration, heldout = manual(32)
    found = read_results("quality_adasvd").get("sequential", {}).get("runs", {})
    for title in titles:
        if title in found:
            continue
        model = AutoModelForCausalLM.from_pretrained(assets.smollm2(), dtype=torch.bfloat16)
        began = time.perf_counter()
        options = {"samples": 32, **SEQUENTIAL[title]}
        tokens = calibration if options["samples"] == 32 else _more(options["samples"], heldout)
        config = AdaSVDConfig(calibration=tokens, run=RunOptions(progress=False), **options)
        report = hf_lowbit.quantize(model, config)
        seconds = time.perf_counter() - began
        dense = [name for name, reason in report.dense.items() if "save nothing" in reason]
        layers = packed_modules(model).values()
        numbers = sum(layer.spec.rank * (layer.in_features + layer.out_features) for layer in layers)
        numbers += sum(model.get_submodule(name).weight.numel() for name in dense)
        total = sum(row["weights"] for row in report.rows)
        total += sum(model.get_submodule(name).weight.numel() for name in dense)
        found[title] = {
            "perplexity": perplexity(model, heldout, 4),
            "output_error": statistics.mean(row["output_error"] for row in report.rows),
            "kept": numbers / total,
            "bytes": sum(row["bytes"] for row in report.rows)
            + 2 * sum(model.get_submodule(name).weight.numel() for name in dense),
            "weights": total,
            "left_dense": len(dense),
            "seconds": seconds,
            "ratios": dict(model.config.quantization_config.layers or {}),
        }
        print(title, found[title]["perplexity"], f"{seconds:.0f} s", flush=True)
        write_result("quality_adasvd/sequential", {"runs": found})
    return {"runs": found}


def _more(samples: int, heldout: Tensor) -> Tensor:
    """Return more sequences of the same text, none of them among those to measure on."""
    taken = {tuple(row) for row in heldout.tolist()}
    windows = manual(2 * samples)[0]
    return torch.stack([row for row in windows if tuple(row.tolist()) not in taken][::2][:samples])


def adapters(samples: int = 8, rank: int = 16) -> dict[str, Any]:
    """Return perplexity of a model with and without an adapter of what it lost, and of a larger one without.

    Layers are fitted to the inputs of the dense model, as in ``quick``, and aim at their own outputs: what an adapter
    of the remainder is for.
    """
    calibration, heldout = manual(32)
    tokens = calibration[torch.linspace(0, 31, samples).long()]
    path = assets.smollm2()
    dense = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    stats, _ = dense_statistics(dense, tokens, list(range(len(dense.model.layers))))
    base, larger = copy.deepcopy(dense), copy.deepcopy(dense)
    numbers = {"base": 0, "adapter": 0, "dense": 0}
    for name, own in tqdm(stats.items(), desc="layers", unit="layer"):
        linear = dense.get_submodule(name)
        weight = linear.weight.detach().double()
        outputs = low_rank.leading_outputs(weight, own.second_moment(torch.float64))
        kept = rank_of((weight.shape[0], weight.shape[1]), 0.6)
        for model, held in ((base, kept), (larger, kept + rank)):
            packed = LowRankFormat.pack(*low_rank.balance(*_pair(outputs, weight, held)), torch.bfloat16)
            model.set_submodule(name, PackedLinear(packed, None, torch.bfloat16))
        numbers["base"] += kept * sum(weight.shape)
        numbers["adapter"] += rank * sum(weight.shape)
        numbers["dense"] += weight.numel()
    found: dict[str, Any] = {"numbers": numbers, "rank": rank, "ratio": 0.6, "perplexity": {}, "left": {}}
    found["perplexity"]["dense"] = perplexity(dense, heldout, 4)
    found["perplexity"]["without an adapter"] = perplexity(base, heldout, 4)
    found["perplexity"]["larger factors"] = perplexity(larger, heldout, 4)
    with tempfile.TemporaryDirectory() as folder:
        for kind, given in (("outputs", tokens), ("weights", None)):
            place = Path(folder) / kind
            left = save_remainder(base, dense_weights(path, base.base_model_prefix), place, rank, given)
            found["left"][kind] = statistics.mean(left.values())
            with_adapter = PeftModel.from_pretrained(base, place)
            found["perplexity"][f"adapter by {kind}"] = perplexity(with_adapter, heldout, 4)
            base = with_adapter.unload()
    return found


def _random_layer(dense: nn.Linear, ratio: float) -> PackedLinear:
    rank = rank_of((dense.out_features, dense.in_features), ratio)
    up, down = torch.randn(dense.out_features, rank), torch.randn(rank, dense.in_features)
    return PackedLinear(LowRankFormat.pack(0.02 * up, 0.02 * down, torch.bfloat16), None, torch.bfloat16)


def decode(tokens: int = 24, turns: int = 5) -> dict[str, Any]:
    """Return the speed of greedy decoding with low-rank layers and dense ones, in turn; the values do not matter."""
    dense = AutoModelForCausalLM.from_pretrained(assets.smollm2(), dtype=torch.bfloat16)
    models: dict[str, Any] = {"dense": dense}
    for ratio in RATIOS:
        models[str(ratio)] = model = copy.deepcopy(dense)
        names = [name for name, m in model.named_modules() if isinstance(m, nn.Linear) and "layers" in name]
        for name in names:
            model.set_submodule(name, _random_layer(model.get_submodule(name), ratio))
        if len(packed_modules(model)) != len(names):
            raise RuntimeError("not all layers were replaced")
    prompt = torch.arange(100, 116)[None]
    times: dict[str, list[float]] = {name: [] for name in models}
    for turn in range(turns + 1):
        for name, model in models.items():
            began = time.perf_counter()
            model.generate(prompt, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)
            if turn:
                times[name].append(time.perf_counter() - began)
    medians = {name: statistics.median(found) / tokens for name, found in times.items()}
    print({name: medians["dense"] / seconds for name, seconds in medians.items()}, flush=True)
    return {"seconds_per_token": medians, "times_dense": {name: medians["dense"] / s for name, s in medians.items()}}


PARTS: dict[str, Callable[[], dict[str, Any]]] = {
    "layers": layers,
    "guard": guard,
    "adapters": adapters,
    "decode": decode,
    "quick": quick,
}


def main() -> None:
    """Parse arguments, measure, write."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--part", nargs="+", choices=[*PARTS, "sequential"], default=[*PARTS, "sequential"])
    made.add_argument("--runs", nargs="+", choices=list(SEQUENTIAL), default=list(SEQUENTIAL), help="of sequential")
    arguments = made.parse_args()
    with torch.no_grad():
        for part in arguments.part:
            result = sequential(arguments.runs) if part == "sequential" else PARTS[part]()
            write_result(f"quality_adasvd/{part}", result)


if __name__ == "__main__":
    main()
