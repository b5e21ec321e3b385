"""What integer weights and activations do to videos: DVD-Quant on the small trained transformer of ``assets.video``.

    python -m benchmarks.quality.video                       # all parts, about 35 minutes on one core
    python -m benchmarks.quality.video --part schedules      # one of the parts below
    python -m benchmarks.quality.video --part size --write   # also compresses a real file of 2.8 GB, on disk

Writes ``benchmarks/results/quality_video/<part>.json``:

* ``schemes``: PSNR of six videos of 16 steps against those of the float model from the same noise, for plain rounding
  and parts of the method, at 8, 6 and 4 bits of activations and with activations left alone; on the model as it was
  trained and on the same function with outlier channels.
* ``schedules``: the same over 30 steps with δ-GBS, against schedules of the same mean width.
* ``long_schedules``: the same over 50 steps, which are spread as those of the paper's videos, for 18 clips one by one.
* ``weights``: squared error of the trained weights for each way to find grids, rotated or not.
* ``size``: bytes of a transformer of Wan2.1-1.3B's shape, counted from its shapes alone, without weights.

The seeds of the noise and of the random schedules are fixed. Kernels differ in the order of sums, by which codes flip;
with another one decibels change by one or two tenths (``--kernel reference`` takes the plain-torch form). Two noises
of the float model itself are as far apart as the figure called "other noise" says.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import random
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

import hf_lowbit
from assets import video
from benchmarks.common import read_results, write_result
from hf_lowbit import DVDQuantConfig, RunOptions, set_act_bits
from hf_lowbit.formats import IntegerFormat
from hf_lowbit.kernels import dispatch
from hf_lowbit.methods.dvd_quant import places
from hf_lowbit.methods.dvd_quant.algorithm import Search, quantize, spec_of

QUIET = RunOptions(progress=False)
PLAIN = {"group_size": -1, "rotation": "none", "balance": "none", "act_scale": "token"}
TURNED = {**PLAIN, "rotation": "full"}
GROUPED = {"group_size": 32, "act_group_size": 32}
# name in the table -> options
SCHEMES: dict[str, dict[str, Any]] = {
    "rtn": {**PLAIN, "weight_init": "absmax"},
    "minmax": {**PLAIN, "weight_init": "minmax"},
    "bgr": {**PLAIN, "refine": "full"},
    "rotation": {**TURNED, "weight_init": "minmax"},
    "both": {**TURNED, "refine": "full"},
    "both, channel": {**TURNED, "refine": "full", "act_scale": "channel"},
    "both, channel_token": {**TURNED, "refine": "full", "act_scale": "channel_token"},
    "paper": {"preset": "paper"},
    "groups, no rotation": {**GROUPED, "rotation": "none", "balance": "none"},
    "groups, full rotation": {**GROUPED, "rotation": "full", "balance": "none"},
    "groups, full rotation, minmax": {**GROUPED, "rotation": "full", "balance": "none", "weight_init": "minmax"},
    "groups, blocks": {**GROUPED, "balance": "none"},
    "groups, blocks, balance": {**GROUPED, "beta": 0.5, "balance_beyond": 1.0},
    "groups, blocks, balance 1": {**GROUPED, "balance_beyond": 1.0},
    "groups, blocks, outliers": dict(GROUPED),
    "groups of 64": {"group_size": 64},
    "default": {},
}
WIDTHS = (16, 8, 6, 4)
# What the schedules are tried with: groups as in the rows of SCHEMES that show the parts of the method.
SCHEDULED = dict(GROUPED)
STEPS, DELTAS, DRAWS = 30, (0.02, 0.04, 0.06, 0.09, 0.12, 0.18, 0.3), 6
# Steps, their shift towards noise, a δ that gives 6 bits in the mean, and noises. The paper's videos have such steps:
# most of them at much noise, and the last ones long.
SHIFTED = (50, 7.0, 0.037, 3)
# Wan2.1-1.3B; the config of `Wan-AI/Wan2.1-T2V-1.3B-Diffusers`.
WAN = {
    "patch_size": (1, 2, 2), "num_attention_heads": 12, "attention_head_dim": 128, "in_channels": 16,
    "out_channels": 16, "text_dim": 4096, "freq_dim": 256, "ffn_dim": 8960, "num_layers": 30, "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads", "eps": 1e-6, "rope_max_seq_len": 1024,
}  # fmt: skip


def compressed(model: nn.Module, options: dict[str, Any]) -> Any:
    """Return a quantized copy of a model, with one width of activations until another is chosen."""
    found: Any = copy.deepcopy(model)
    hf_lowbit.quantize(found, DVDQuantConfig(**{**options, "delta": None, "a_bits": 8, "run": QUIET}))
    return found


MODELS = ("clean", "outliers")


def models() -> Iterator[tuple[str, Any]]:
    """Yield the trained model and its twin with outlier channels."""
    for kind in MODELS:
        yield kind, video.load(outliers=kind == "outliers")


def schemes(only: list[str] | None) -> dict[str, Any]:
    """Return decibels of every scheme and width on both models; of those in ``only`` anew, the others as stored."""
    before = read_results("quality_video").get("schemes", {}).get("figures", {}) if only else {}
    figures: dict[str, Any] = {}
    for kind, model in models():
        want = video.sample(model)
        rows: dict[str, Any] = {"other noise": video.psnr(video.sample(model, seed=101), want)}
        if kind == "outliers":
            rows["injection"] = video.psnr(want, video.sample(video.load()))
        rows = {**before.get(kind, {}), **rows}
        for name, options in tqdm(SCHEMES.items(), desc=kind, unit="scheme"):
            if only and name not in only:
                continue
            found = compressed(model, options)
            layers = hf_lowbit.packed_modules(found).values()
            weights = sum(layer.in_features * layer.out_features for layer in layers)
            row: dict[str, Any] = {"bits_per_weight": 8 * sum(layer.packed.nbytes for layer in layers) / weights}
            for bits in WIDTHS:
                set_act_bits(found, bits)
                row[str(bits)] = video.psnr(video.sample(found), want)
            rows[name] = row
        figures[kind] = rows
    return {"figures": figures, "steps": 16, "videos": len(video.PROMPTS), "layers": len(layers)}


# Schedules -------------------------------------------------------------------------------------------------------


def even(model: Any) -> Tensor:
    """Return the videos of a model with steps that are spread evenly."""
    return video.sample(model, steps=STEPS)


def shifted(model: Any) -> Tensor:
    """Return a clip for each prompt and noise, with the steps of the paper's videos; all are made in one call."""
    steps, shift, _, noises = SHIFTED
    return video.sample(video.pipeline(model, shift), video.PROMPTS * noises, steps=steps)


def scheduled(model: Any, bits: list[int], run: Callable[[Any], Tensor] = even) -> Tensor:
    """Return the videos of a model whose activations have ``bits[i]`` in step i; it runs once in each step."""
    steps = iter(bits)
    hook = model.register_forward_pre_hook(lambda *_: set_act_bits(model, next(steps)) and None)
    try:
        found = run(model)
    finally:
        hook.remove()
        set_act_bits(model, None)
    if next(steps, None) is not None:
        raise AssertionError("the transformer did not run once in each step")
    return found


def named_schedules(high: int, steps: int = STEPS, draws: int = DRAWS) -> dict[str, list[list[int]]]:
    """Return the schedules with ``high`` steps of 8 bits and the others of 4, random ones by seed."""
    low = steps - high
    spread = [8 if (i + 1) * high // steps > i * high // steps else 4 for i in range(steps)]
    drawn = []
    for seed in range(draws):
        order = [8] * high + [4] * low
        random.Random(seed).shuffle(order)
        drawn.append(order)
    return {
        "8 to 4": [[8] * high + [4] * low],
        "4 to 8": [[4] * low + [8] * high],
        "alternate": [spread],
        "random": drawn,
    }


def with_delta(model: Any, delta: float, run: Callable[[Any], Tensor] = even) -> tuple[Tensor, dict[str, Any]]:
    """Return the videos with δ-GBS, and what it decides."""
    from hf_lowbit.hf.delta_gbs import delta_gbs_report, disable_delta_gbs, enable_delta_gbs

    enable_delta_gbs(model, delta=delta)
    try:
        found = run(model)
        report = delta_gbs_report(model)
    finally:
        disable_delta_gbs(model)
    changes = [round(change, 4) for change in report.changes]
    return found, {"bits": list(report.bits), "mean": report.mean_bits, "changes": changes}


def reached(model: Any, delta: float, want: Tensor) -> dict[str, Any]:
    """Return what δ-GBS decides and reaches, with even steps."""
    found, row = with_delta(model, delta)
    return {"psnr": video.psnr(found, want), **row}


def delta_for(model: Any, mean: float, want: Any, known: dict[float, dict[str, Any]], tries: int = 3) -> float:
    """Return the δ whose mean width is nearest to ``mean``: of those known, or between the two around it.

    Args:
        model: quantized.
        mean: bits.
        want: videos of the float model.
        known: rows of some δ; those of further ones are added.
        tries: how often the stretch between two is halved, in the logarithm.
    """
    for _ in range(tries):
        above = [delta for delta in known if known[delta]["mean"] > mean]
        below = [delta for delta in known if known[delta]["mean"] <= mean]
        if not above or not below:
            break
        delta = (max(above) * min(below)) ** 0.5
        known[delta] = reached(model, delta, want)
    return min(known, key=lambda delta: abs(known[delta]["mean"] - mean))


def schedules() -> dict[str, Any]:
    """Return decibels of schedules on both models."""
    figures: dict[str, Any] = {}
    for kind, model in models():
        want = video.sample(model, steps=STEPS)
        found = compressed(model, SCHEDULED)
        rows: dict[str, Any] = {"all": {}}
        for bits in (4, 8):
            rows["all"][str(bits)] = video.psnr(scheduled(found, [bits] * STEPS), want)
        tried = {delta: reached(found, delta, want) for delta in tqdm(DELTAS, desc=f"{kind}, δ")}
        rows["delta"] = {str(delta): row for delta, row in tried.items()}
        delta = delta_for(found, 6.0, want, tried)
        row = tried[delta]
        rows["mean 6"] = {"delta": delta, **row}
        for name, orders in tqdm(named_schedules(row["bits"].count(8)).items(), desc=f"{kind}, others"):
            rows[name] = [video.psnr(scheduled(found, order), want) for order in orders]
        figures[kind] = rows
    return {"figures": figures, "steps": STEPS, "options": SCHEDULED}


def apart(found: Tensor, want: Tensor) -> list[float]:
    """Return the decibels of each clip."""
    return [round(video.psnr(one, other), 3) for one, other in zip(found, want, strict=True)]


def long_schedules(kinds: list[str]) -> dict[str, Any]:
    """Return decibels of schedules with the paper's steps, clip by clip; those of other models as they are stored."""
    steps, shift, delta, _ = SHIFTED
    figures: dict[str, Any] = read_results("quality_video").get("long_schedules", {}).get("figures", {})
    for kind, model in models():
        if kind not in kinds:
            continue
        found, want = compressed(model, {}), shifted(model)
        clips, row = with_delta(found, delta, shifted)
        rows = {"δ-GBS": [apart(clips, want)]}
        others = named_schedules(row["bits"].count(8), steps, draws=3)
        others |= {f"all {bits}": [[bits] * steps] for bits in (8, 4)}
        for name, orders in tqdm(others.items(), desc=f"{kind}, shift {shift:g}"):
            rows[name] = [apart(scheduled(found, order, shifted), want) for order in orders]
        figures[kind] = {"delta": delta, **row, "clips": rows}
    return {"figures": figures, "steps": steps, "shift": shift}


# Weights and size ------------------------------------------------------------------------------------------------

GRIDS = {
    "absmax": {"weight_init": "absmax"}, "minmax": {"weight_init": "minmax"}, "bounds": {"iters": 0},
    "best_start": {"refine": "best_start"}, "full": {"refine": "full"},
}  # fmt: skip


def weights() -> dict[str, Any]:
    """Return relative squared errors of all trained weights together, for each search, per row and per group."""
    figures: dict[str, Any] = {}
    for kind, model in models():
        own = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and n.startswith("blocks.")}
        total = sum(float(layer.weight.double().square().sum()) for layer in own.values())
        for size in (-1, 64, 32):
            for rotation in ("none", "full", "block"):
                for name, options in GRIDS.items():
                    config = DVDQuantConfig(group_size=size, rotation=rotation, balance="none", **options)
                    if Search.of(config).symmetric and rotation == "block":
                        continue
                    wrong = 0.0
                    for layer, module in own.items():
                        found = quantize(module.weight, config, layer).unpack()
                        wrong += float((found.double() - module.weight.double()).square().sum())
                    figures.setdefault(kind, {})[f"{size}, {rotation}, {name}"] = wrong / total
    return {"figures": figures}


SIZES: dict[str, dict[str, Any]] = {
    "default": {}, "default, no column stands out": {"balance": "none"}, "group_size=64": {"group_size": 64},
    'preset="paper"': {"preset": "paper"},
}  # fmt: skip


def size(write: bool) -> dict[str, Any]:
    """Return bytes of a transformer of Wan2.1-1.3B's shape, dense in bfloat16 and packed, for some options."""
    from diffusers import WanTransformer3DModel

    with torch.device("meta"):
        model = WanTransformer3DModel(**WAN)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    rows: dict[str, Any] = {}
    for title, options in SIZES.items():
        config = DVDQuantConfig(**options)
        packed = weights = layers = 0
        for name, module in model.named_modules():
            if not isinstance(module, nn.Linear):
                continue
            shape = (module.out_features, module.in_features)
            if places.reason_to_leave(name, shape, config) is None:
                spec = spec_of(shape, config, places.rounds_activations(name, config))
                packed += IntegerFormat.empty(spec).nbytes
                weights, layers = weights + shape[0] * shape[1], layers + 1
        total = packed + 2 * (parameters - weights)
        rows[title] = {
            "layers": layers,
            "bits_per_weight": 8 * packed / weights,
            "bytes": total,
            "times_smaller": 2 * parameters / total,
        }
    found: dict[str, Any] = {"figures": rows, "parameters": parameters, "dense_bytes": 2 * parameters}
    return {**found, "written": written()} if write else found


def written() -> dict[str, Any]:
    """Compress a file of that size from disk, layer by layer, and return what ``hf-lowbit inspect`` says of it."""
    import psutil
    from diffusers import WanTransformer3DModel

    from hf_lowbit.report.inspect import inspect

    with tempfile.TemporaryDirectory() as folder:
        dense, out = Path(folder) / "dense", Path(folder) / "packed"
        torch.manual_seed(0)
        with torch.device("meta"):
            model = WanTransformer3DModel(**WAN)
        model = model.to(torch.bfloat16).to_empty(device="cpu")
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.02)
        model.save_pretrained(dense)
        del model
        config = DVDQuantConfig(n_bounds=4, iters=1, run=QUIET)  # the size does not depend on how grids are found
        packed: Any = WanTransformer3DModel.from_pretrained(dense, quantization_config=config)
        resident = psutil.Process().memory_info().rss
        packed.save_pretrained(out)
        found = inspect(out)
        stored = sum(file.stat().st_size for file in dense.iterdir())
        return {
            "dense_bytes_on_disk": stored,
            "bytes_on_disk": found.total_bytes,
            "times_smaller": stored / found.total_bytes,
            "bits_per_parameter": found.bits_per_parameter,
            "resident_bytes": resident,
        }


PARTS = ("schemes", "schedules", "long_schedules", "weights", "size")


def main() -> None:
    """Measure the parts that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--write", action="store_true", help="size: compress a file of that size, too")
    parser.add_argument("--only", nargs="+", choices=SCHEMES, help="schemes: measure these anew, keep the others")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS, help="long_schedules: only these anew")
    parser.add_argument("--kernel", help="name of a kernel to use, see `hf-lowbit bench --list`")
    arguments = parser.parse_args()
    for option, part, given in (("--write", "size", arguments.write), ("--only", "schemes", arguments.only)):
        if given and part not in arguments.part:
            parser.error(f"{option} belongs to --part {part}, which is not among {', '.join(arguments.part)}")
    with contextlib.ExitStack() as stack:
        if arguments.kernel:
            try:
                stack.enter_context(dispatch.forced(arguments.kernel))
            except ValueError as error:
                parser.error(f"--kernel: {error}")
        for part in arguments.part:
            result = {
                "schemes": lambda: schemes(arguments.only),
                "schedules": schedules,
                "long_schedules": lambda: long_schedules(arguments.models),
                "weights": weights,
                "size": lambda: size(arguments.write),
            }[part]()
            print(write_result(f"quality_video/{part}", result))


if __name__ == "__main__":
    main()
