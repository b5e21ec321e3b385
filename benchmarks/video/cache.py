"""Quality over work of QuantCache and of diffusers' own caches, on one trained video transformer.

    python -m benchmarks.video.cache            # a quarter of an hour on one core, then python -m benchmarks.report
    python -m benchmarks.video.cache --plot     # draw the picture again

Each setting of each cache makes the same videos (same prompts, noise and steps); quality is the PSNR of the pixels
against what the transformer makes without a cache. Work is what all block calls have multiplied, counted by torch's
counter of operations, in calls of a whole block: caches that skip attention alone are counted fairly, too.
"""

from __future__ import annotations

import argparse
import copy
import functools
import itertools
import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import FasterCacheConfig, FirstBlockCacheConfig, PyramidAttentionBroadcastConfig, TaylorSeerCacheConfig
from diffusers.hooks import MagCacheConfig, SeaCacheConfig
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop

import hf_lowbit
from assets import video
from benchmarks.common import ROOT, read_results, write_result
from benchmarks.report_cache import OWN, Made, family, frontier, usable
from hf_lowbit import DVDQuantConfig, QuantCacheConfig

STEPS = 24
SEEDS = (100, 101)
PLOT = ROOT / "benchmarks" / "video" / "cache.png"


class Counter:
    """Counts what the parts of all blocks multiply: attention and feed-forward, whenever their last layer runs."""

    def __init__(self, model: Any) -> None:
        self.operations = 0.0
        for name, cost in self._costs(model).items():
            module = model.get_submodule(name)
            last = module.to_out[0] if hasattr(module, "to_out") else module.net[2]
            last.register_forward_pre_hook(functools.partial(self._count, cost))

    def _count(self, cost: float, module: Any, args: Any) -> None:
        self.operations += cost

    @staticmethod
    def _costs(model: Any) -> dict[str, float]:
        """Return the operations of each part in a call, counted by torch."""
        attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # which torch knows by GPU's names only
        counter = FlopCounterMode(
            display=False, custom_mapping={attention: lambda q, k, v, *rest, **more: sdpa_flop(q, k, v)}
        )
        with counter:
            video.sample(model, steps=1)
        found = {name.partition(".")[2]: sum(counts.values()) for name, counts in counter.get_flop_counts().items()}
        parts = ("attn1", "attn2", "ffn")
        return {f"blocks.{i}.{part}": found[f"blocks.{i}.{part}"] for i in range(len(model.blocks)) for part in parts}


class Bench:
    """One model, and what it makes without a cache."""

    def __init__(self, model: Any, steps: int = STEPS, seeds: tuple[int, ...] = SEEDS) -> None:
        self.model, self.steps, self.seeds = model, steps, seeds
        self.counter = Counter(model)
        self.pipeline = video.pipeline(model)
        self.expected = self.sampled()
        self.calls = len(model.blocks) * steps

    def sampled(self) -> dict[int, tuple[Tensor, float]]:
        """Return for each seed the videos, and the operations of all blocks."""
        found = {}
        for seed in self.seeds:
            self.counter.operations = 0.0
            made = video.sample(self.pipeline, steps=self.steps, seed=seed)
            found[seed] = (made, self.counter.operations)
        return found

    def measure(self, name: str, settings: dict[str, Any], config: Any) -> Made:
        """Return the row of one setting of a cache; what it raises is told in the row."""
        row: Made = {"cache": name, "settings": settings}
        self.model.enable_cache(config)
        try:
            start = time.perf_counter()
            made = self.sampled()
            row["seconds"] = time.perf_counter() - start
            if isinstance(config, QuantCacheConfig):
                report = self.model.cache_report()
                row |= {"computed": report.computed, "block_calls": report.block_calls[0], "mode": report.mode}
                row |= {"cache_bytes": report.cache_bytes, "pruned": report.pruned}
        finally:
            self.model.disable_cache()
        return row | self.quality(made)

    def quality(self, made: dict[int, tuple[Tensor, float]]) -> Made:
        """Return PSNR and work of videos, over all seeds."""
        errors = [float((made[s][0].double() - self.expected[s][0].double()).square().mean()) for s in self.seeds]
        work = sum(made[s][1] for s in self.seeds) / sum(self.expected[s][1] for s in self.seeds)
        error = sum(errors) / len(errors)
        return {
            "psnr": 10 * math.log10(4 / error) if error else None,
            "error": error,
            "work": work,
            "calls": work * self.calls,
        }


# Settings -----------------------------------------------------------------------------------------------------------


def quantcache_settings() -> list[dict[str, Any]]:
    """Return the settings of QuantCache: intervals and thresholds, with and without extrapolation."""
    fixed = [{"intervals": [n, n, n], "deltas": [1.0, 1.0]} for n in (2, 3, 4, 5, 6)]
    adaptive = [
        {"intervals": list(intervals), "deltas": list(deltas)}
        for intervals in ((3, 2, 1), (4, 2, 1), (4, 3, 2), (6, 4, 2), (6, 3, 2))
        for deltas in ((0.05, 0.1), (0.08, 0.14), (0.1, 0.2), (0.14, 0.3))
    ]
    found = [{**setting, "extrapolation": order} for order in (0, 1, 2) for setting in (*fixed, *adaptive)]
    found += [{**setting, "extrapolation": 0, "granularity": "sublayer"} for setting in (*fixed[:3], *adaptive[4:8:2])]
    found += [{**setting, "extrapolation": 1, "granularity": "sublayer"} for setting in (*fixed[:3], *adaptive[4:8:2])]
    found += [{"intervals": [1, 1, 1], "prune_high": high, "prune_mode": mode}
              for high in (0.98, 0.95, 0.9) for mode in ("cached", "identity")]  # fmt: skip
    found += [{"schedule": "per_block", "extrapolation": order, **adaptive[n]} for order in (0, 1) for n in (4, 6, 12)]
    fine = [
        {"intervals": list(intervals), "deltas": list(deltas)}
        for intervals in ((3, 2, 1), (3, 2, 2))
        for deltas in ((0.07, 0.12), (0.09, 0.16), (0.12, 0.2), (0.12, 0.25), (0.16, 0.25))
    ]
    found += [{**setting, "extrapolation": order} for order in (1, 2) for setting in fine]
    later = [{**setting, "warmup": 4} for setting in (*fixed[:3], *adaptive[1:4], *adaptive[5:11])]
    found += [{**setting, "extrapolation": order} for order in (1, 2) for setting in later]
    return [{}, {"extrapolation": 0}, *found]


def others(pipeline: Any) -> list[tuple[str, dict[str, Any], Callable[[], Any]]]:
    """Return name, settings and a maker of the config for each setting of diffusers' caches."""
    timestep = lambda: pipeline.current_timestep  # noqa: E731
    found: list[tuple[str, dict[str, Any], Callable[[], Any]]] = []

    def add(name: str, make: Any, fixed: dict[str, Any], **settings: Any) -> None:
        found.append((name, settings, lambda: make(**settings, **fixed)))

    for threshold in (0.02, 0.04, 0.06, 0.08, 0.1, 0.13, 0.17, 0.22, 0.3, 0.4):
        add("FirstBlockCache", FirstBlockCacheConfig, {}, threshold=threshold)
    for span in (2, 3, 4, 6):
        for reach in ((100, 800), (0, 1000)):
            for both in (False, True):
                settings = {"spatial_attention_block_skip_range": span, "spatial_attention_timestep_skip_range": reach}
                if both:
                    settings |= {
                        "cross_attention_block_skip_range": span, "cross_attention_timestep_skip_range": reach,
                    }  # fmt: skip
                fixed = {"current_timestep_callback": timestep}
                add("PyramidAttentionBroadcast", PyramidAttentionBroadcastConfig, fixed, **settings)
    full = {"taylor_factors_dtype": torch.float32, "cache_identifiers": [r"blocks\.\d+\.attn\d", r"blocks\.\d+\.ffn"]}
    lite = {"taylor_factors_dtype": torch.float32, "use_lite_mode": True}
    for fixed in (full, lite):
        for interval in (2, 3, 4, 5, 6):
            for order in (0, 1, 2):
                for before in (2, 4):
                    settings = {"cache_interval": interval, "max_order": order, "disable_cache_before_step": before}
                    kind = "TaylorSeer" if fixed is full else "TaylorSeer lite"
                    add(kind, TaylorSeerCacheConfig, {**fixed, "disable_cache_after_step": STEPS - 1}, **settings)
    for threshold in (0.02, 0.05, 0.1, 0.2, 0.4):
        for most in (2, 4):
            settings = {"threshold": threshold, "max_skip_steps": most, "retention_ratio": 0.1}
            add("MagCache", MagCacheConfig, {"num_inference_steps": STEPS, "mag_ratios": None}, **settings)
    for threshold in (0.05, 0.1, 0.15, 0.25, 0.4, 0.6):
        for most in (2, 4):
            fixed = {"raw_vision_callback": _latents}
            add("SeaCache", SeaCacheConfig, fixed, threshold=threshold, max_consecutive_cached=most)
    for span in (2, 3, 4):
        fixed = {"current_timestep_callback": timestep, "is_guidance_distilled": True}
        settings = {"spatial_attention_block_skip_range": span, "spatial_attention_timestep_skip_range": (-1, 901)}
        add("FasterCache", FasterCacheConfig, fixed, **settings)
    return found


def _latents(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    latents = kwargs.get("hidden_states", args[0] if args else None)
    return [*latents] if latents is not None else []


def mag_ratios(bench: Bench) -> list[float]:
    """Return what MagCache wants to know of a model: how the residual's size changes from step to step."""
    sizes: list[Tensor] = []
    first: list[Tensor] = []
    blocks = bench.model.blocks
    handles = [
        blocks[0].register_forward_pre_hook(lambda module, args: first.append(args[0])),
        blocks[-1].register_forward_hook(lambda module, args, out: sizes.append(out - first.pop())),
    ]
    video.sample(bench.pipeline, steps=bench.steps, seed=999)
    for handle in handles:
        handle.remove()
    norms = [size.norm(dim=-1) for size in sizes]
    return [1.0, *(float((b / a).mean()) for a, b in itertools.pairwise(norms))]


def sweep(bench: Bench, keep: Callable[[list[Made]], None], rows: list[Made]) -> None:
    """Measure every setting of every cache that is not among the rows; what there is so far is kept after each."""
    known = [(row["cache"], json.loads(json.dumps(row["settings"]))) for row in rows]
    for settings in quantcache_settings():
        if ("QuantCache", settings) in known:
            continue
        rows.append(bench.measure("QuantCache", settings, QuantCacheConfig(**settings)))
        _tell(rows[-1])
        keep(rows)
    ratios = mag_ratios(bench)
    refused: dict[str, str] = {}
    for name, settings, make in others(bench.pipeline):
        if name in refused or (name, json.loads(json.dumps(settings))) in known:
            continue
        try:
            config = (
                MagCacheConfig(**settings, num_inference_steps=STEPS, mag_ratios=ratios)
                if name == "MagCache"
                else make()
            )
            rows.append(bench.measure(name, settings, config))
        except (TypeError, ValueError, RuntimeError, AttributeError, KeyError, IndexError) as error:
            refused[name] = f"{type(error).__name__}: {error}"
            rows.append({"cache": name, "settings": settings, "failure": refused[name]})
            continue
        _tell(rows[-1])
        keep(rows)


# With quantized weights and activations -----------------------------------------------------------------------------

TOGETHER = {"intervals": [4, 2, 1], "deltas": [0.1, 0.2]}
# groups of 64, not the default's 32: errors of quantization that can be seen beside those of the cache
QUANTIZED = {
    "W4A8": {"preset": "w4a8", "group_size": 64},
    "W4A4": {"preset": "w4a4", "group_size": 64},
    "W4A4/8 by step": {"group_size": 64},
}


def together(bench: Bench, outliers: bool, keep: Callable[[list[Made]], None]) -> None:
    """Measure errors of DVD-Quant alone, of QuantCache alone, and of both, all against the dense model uncached."""
    dense = bench.model
    rows: list[Made] = []
    for order in (0, 1):
        cache = {**TOGETHER, "extrapolation": order}
        alone = bench.measure("QuantCache", cache, QuantCacheConfig(**cache))
        for name, options in QUANTIZED.items():
            bench.model = copy.deepcopy(dense)
            hf_lowbit.quantize(bench.model, DVDQuantConfig(**options))
            bench.pipeline = video.pipeline(bench.model)
            plain = bench.quality(bench.sampled())
            for policy in ("fixed", "redundancy", "post_skip", "delta_gbs") if order else ("fixed",):
                bits = {"bits": [4, 4, 4] if name == "W4A4" else [8, 8, 8]} if policy == "fixed" else {}
                config = QuantCacheConfig(**cache, bit_policy=policy, **bits)
                bench.model.enable_cache(config)
                made = bench.sampled()
                report = bench.model.cache_report()
                bench.model.disable_cache()
                both = bench.quality(made)
                rows.append(
                    {
                        "outliers": outliers,
                        "quantized": name,
                        "cache": cache,
                        "bit_policy": policy,
                        "bits": report.bits,
                        "computed": [alone["computed"], report.computed],
                        "errors": [plain["error"], alone["error"], both["error"]],
                        "psnr": [plain["psnr"], alone["psnr"], both["psnr"]],
                    }
                )
                print(rows[-1], flush=True)
                keep(rows)
            bench.model, bench.pipeline = dense, video.pipeline(dense)


def _tell(row: Made) -> None:
    psnr = "exact" if row["psnr"] is None else f"{row['psnr']:.1f} dB"
    print(f"{row['cache']:26} {1 / row['work']:5.2f} × {psnr:>9}  {row['settings']}", flush=True)


# The picture --------------------------------------------------------------------------------------------------------


def save_plot(rows: list[Made], file: Path = PLOT) -> Path:
    """Draw PSNR over work saved, one line for the best settings of each cache."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    names = dict.fromkeys(family(row) for row in usable(rows))
    for name in names:
        best = frontier([row for row in usable(rows) if family(row) == name])
        own = name.startswith(OWN)
        axes.plot(
            [1 / row["work"] for row in best], [row["psnr"] for row in best], marker="o" if own else ".",
            linewidth=2 if own else 1, label=name, zorder=3 if own else 2,
        )  # fmt: skip
    axes.set_xlabel("block calls without a cache / with it")
    axes.set_ylabel("PSNR against no cache, dB")
    axes.legend(fontsize="small")
    axes.grid(alpha=0.3)
    axes.set_xlim(1, 5)
    figure.savefig(file, format="png", dpi=110)
    return file


def main() -> int:
    """Measure, or draw what was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plot", action="store_true", help="only draw")
    parser.add_argument("--fresh", action="store_true", help="measure settings again that the result file has")
    parser.add_argument("--part", choices=("sweep", "together", "all"), default="all")
    parser.add_argument("--budget", choices=tuple(video.BUDGETS), default="full", help="quick only tries the command")
    arguments = parser.parse_args()
    if not arguments.plot:
        torch.set_num_threads(1)
        for part, outliers in (("sweep", False), ("together", False), ("together", True)):
            if arguments.part not in (part, "all"):
                continue
            bench = Bench(video.load(arguments.budget, outliers=outliers))
            setup = {"steps": STEPS, "seeds": SEEDS, "prompts": len(video.PROMPTS), "blocks": len(bench.model.blocks)}
            name = part if part == "sweep" else f"{part}{'-outliers' if outliers else ''}"

            def keep(rows: list[Made], name: str = name, setup: Made = setup) -> None:
                if arguments.budget == "full":
                    write_result(f"video_cache/{name}", {**setup, "rows": rows})

            if part == "sweep":
                before = {} if arguments.fresh else read_results("video_cache").get("sweep", {})
                sweep(bench, keep, before.get("rows", []))
            else:
                together(bench, outliers, keep)
    results = read_results("video_cache")
    if "sweep" in results:
        print(save_plot(results["sweep"]["rows"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
