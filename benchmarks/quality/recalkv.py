"""Quality of ReCalKV: perplexity at 50, 60 and 70 % compression of the cache, and which part of the method helps.

    python -m benchmarks.quality.recalkv --part table singles           # about half an hour on one core
    python -m benchmarks.quality.recalkv --part runs                    # whole runs: through files, and in sequence
    python -m benchmarks.quality.recalkv --part heads                   # a model that does not share heads (no GQA)
    python -m benchmarks.quality.recalkv --part queries                 # groupings of nine heads, errors alone
    python -m benchmarks.quality.recalkv --part latents                 # latents of 8, 4 and 3 bits
    python -m benchmarks.quality.recalkv --part elsewhere               # measured on news instead of articles
    python -m benchmarks.report                                         # renders the tables from the result files

What a result file holds already is not measured again; remove the file to measure anew.

The protocol is that of the figures known before: Wikipedia articles, every other one for calibration (32 sequences of
512 tokens), the others for measuring (6 sequences of 512 tokens, evenly spaced). Six sequences are few, so a second
figure is of 24, the six among them. Every variant is fitted to the same statistics of the dense model, but for
``runs``, which are complete runs of the package.

Writes ``benchmarks/results/quality_recalkv/*.json``.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import functools
import itertools
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import assets
import hf_lowbit
from benchmarks.common import calibration_sequences, heldout_sequences, read_results, write_result
from benchmarks.quality import multihead as multihead_model
from hf_lowbit import PackedLinear, ReCalKVConfig, RunOptions, registry
from hf_lowbit.calibration import capture
from hf_lowbit.calibration.data import load_texts, tokenize
from hf_lowbit.calibration.stats import LinearStats, PairedStats
from hf_lowbit.compress.engine import Run
from hf_lowbit.compress.measures import GradientStats, StackMeasures
from hf_lowbit.compress.projections import projection_of
from hf_lowbit.hf.save import save_model
from hf_lowbit.kernels.latent_codec import decode_rows, encode_rows, row_bytes
from hf_lowbit.numerics import grouping, low_rank
from hf_lowbit.report.evaluate import perplexity

FOLDER = "quality_recalkv"
RATIOS = (0.5, 0.4, 0.3)
_PAIRS: dict[str, Any] = {
    "key_group_size": 2,
    "value_group_size": 2,
    "ragged_groups": True,
    "grouping": "contiguous",
    "rank_allocation": "uniform",
    "rank_multiple": 1,
    "weighting": "none",
}
_WHOLE: dict[str, Any] = {"rank_allocation": "uniform", "rank_multiple": 1, "weighting": "none"}
# Gradients of shorter sequences of text as it is: the default until passages returned in them.
_TEXT: dict[str, Any] = {"recall": 0.0, "gradient_length": 256}
# The letters are those of the figures known before.
VARIANTS: dict[str, dict[str, Any]] = {
    "A": {**_PAIRS, "whiten": False},
    "B": _PAIRS,
    "C": {**_PAIRS, "grouping": "cka"},
    "D": {**_PAIRS, "grouping": "cka", "value_group_size": 0},
    "F": _WHOLE,
    "G": {"rank_allocation": "fisher_uniform", "weighting": "none", **_TEXT},
    "energy ranks": {"weighting": "none"},
    "energy pairs": {**_PAIRS, "grouping": "energy"},
    "default": {},
    "text": _TEXT,
    "loss by head": {"weighting": "loss_by_head", **_TEXT},
    "loss, pairs": {"key_group_size": 2, "value_group_size": 2, "ragged_groups": True, **_TEXT},
    "loss, uniform": {"rank_allocation": "uniform", "rank_multiple": 1, **_TEXT},
    "loss, fisher_uniform": {"rank_allocation": "fisher_uniform", **_TEXT},
}
AT_ONE_RATIO = ("loss, pairs", "loss, uniform", "loss, fisher_uniform")
SINGLES: dict[str, dict[str, Any]] = {
    "key pair by energy": {**_PAIRS, "grouping": "energy"},
    "key pair by cka": {**_PAIRS, "grouping": "cka"},
    "keys in one group": {**_PAIRS, "key_group_size": 0},
    "values in one group": {**_PAIRS, "value_group_size": 0},
    "each head alone": {**_PAIRS, "key_group_size": 1, "value_group_size": 1},
}
# whole runs: each block on what the run has made of those before it, where the variant asks for that
RUNS: dict[str, tuple[dict[str, Any], tuple[float, ...]]] = {
    "default": ({}, (0.5,)),
    "text": (_TEXT, (0.5,)),
    "E": ({**_PAIRS, "grouping": "cka", "value_group_size": 0, "ocmf": "sequential"}, (0.5,)),
    "text, values in sequence": ({"ocmf": "sequential", **_TEXT}, (0.5,)),
    "values crossed": ({"ocmf": "cross"}, (0.5,)),
}


# the model without GQA: sizes of groups of its 8 key heads, and how they are chosen
_MANY: dict[str, Any] = {"rank_allocation": "uniform", "rank_multiple": 1, "weighting": "none"}
HEADS: dict[str, dict[str, Any]] = {
    "plain SVD, groups of 4": {**_MANY, "key_group_size": 4, "grouping": "contiguous", "whiten": False},
    "keys and values in groups of 4 (Palu-like)": {
        **_MANY,
        "key_group_size": 4,
        "value_group_size": 4,
        "grouping": "contiguous",
    },
    "groups of 4, contiguous": {**_MANY, "key_group_size": 4, "grouping": "contiguous"},
    "groups of 4, cka": {**_MANY, "key_group_size": 4, "grouping": "cka"},
    "groups of 4, energy": {**_MANY, "key_group_size": 4, "grouping": "energy"},
    "groups of 2, contiguous": {**_MANY, "key_group_size": 2, "grouping": "contiguous"},
    "groups of 2, cka": {**_MANY, "key_group_size": 2, "grouping": "cka"},
    "groups of 2, energy": {**_MANY, "key_group_size": 2, "grouping": "energy"},
    "one group": {**_MANY, "key_group_size": 8},
    "groups of 4, energy, fisher_uniform": {"weighting": "none", "rank_allocation": "fisher_uniform", "recall": 0.0},
    "default": {},
    "default, one group": {"key_group_size": 8},
    "default, `recall=0`": {"recall": 0.0},
    "default, `recall=0`, one group": {"key_group_size": 8, "recall": 0.0},
    "default, `recall=0`, by head": {"weighting": "loss_by_head", "recall": 0.0},
}
HEAD_RUNS: dict[str, dict[str, Any]] = {
    "groups of 4, cka, values in sequence": {**_MANY, "key_group_size": 4, "grouping": "cka", "ocmf": "sequential"},
    "paper": {
        "grouping": "cka",
        "ocmf": "sequential",
        "rank_allocation": "fisher_uniform",
        "weighting": "none",
        "recall": 0.0,
    },
    "default, `recall=0`, values in sequence": {"ocmf": "sequential", "recall": 0.0},
    "default, values crossed": {"ocmf": "cross"},
}
# variant -> options, and pairs of bits and whether latents are rotated
LATENTS: dict[str, tuple[dict[str, Any], tuple[tuple[int, bool], ...]]] = {
    "default": ({}, ((4, True), (3, True))),
    "text": (_TEXT, ((4, True), (4, False), (3, True))),
    "F": (_WHOLE, ((4, True),)),
}


class Bench:
    """A dense model with what the variants share: statistics, gradients, text to measure on."""

    def __init__(self, model: Any, calibration: Tensor, heldout: Tensor) -> None:
        """Keep them.

        Args:
            model: in float32.
            calibration: (sequences, length), token ids.
            heldout: (24, length), token ids.
        """
        self.model, self.calibration, self.heldout = model, calibration, heldout
        self.names = [name for name, _ in model.named_modules() if projection_of(model, name) is not None]
        self._losses: dict[tuple[int, float], dict[str, GradientStats]] = {}

    @functools.cached_property
    def stats(self) -> dict[str, LinearStats]:
        """Inputs of all key and value projections in the dense model."""
        linears = {name: self.model.get_submodule(name) for name in self.names}
        with torch.no_grad(), capture.collect_stats(linears) as stats:
            for batch in self.calibration.split(4):
                self.model(input_ids=batch, use_cache=False, logits_to_keep=1)
        return stats

    def loss(self, config: ReCalKVConfig) -> dict[str, GradientStats]:
        """Return gradients at all projections, as a run measures them; once for all variants that ask for the same."""
        asked = config.gradient_length, config.returning
        if asked not in self._losses:
            run = Run(self.model, config)
            with torch.no_grad():
                measures = StackMeasures(run, run.stacks[0], run.batches)
                self._losses[asked] = measures.gradients(self.names, config.gradient_samples, *asked)
        return self._losses[asked]

    def config(self, **options: Any) -> ReCalKVConfig:
        """Return a config of this model's calibration."""
        samples = len(self.calibration)
        return ReCalKVConfig(
            calibration=self.calibration, samples=samples, run=RunOptions(progress=False, batch_size=4), **options
        )

    # what the method asks of a run
    def gradients(
        self, names: Sequence[str], samples: int, length: int, recall: float = 0.0
    ) -> dict[str, GradientStats]:
        """Return the shared gradients."""
        return self.loss(self.config(gradient_samples=samples, gradient_length=length, recall=recall))

    def dense_inputs(self, names: Sequence[str]) -> Iterator[tuple[str, Tensor, LinearStats]]:
        """Yield the shared statistics."""
        for name in names:
            yield name, self.model.get_submodule(name).weight.detach(), self.stats[name]

    def figures(self) -> dict[str, float]:
        """Return perplexities of the model as it is: on six sequences, and on all 24."""
        six = perplexity(self.model, self.heldout[::4], 2, progress=False)
        rest = perplexity(self.model, self.heldout[torch.arange(len(self.heldout)) % 4 > 0], 2, progress=False)
        return {"perplexity": six, "perplexity_24": math.exp((math.log(six) + 3 * math.log(rest)) / 4)}

    @contextlib.contextmanager
    def compressed(self, **options: Any) -> Iterator[dict[str, Any]]:
        """Put latent projections into the model within the ``with`` statement; yields ranks and errors."""
        config = self.config(**options)
        method: Any = registry.get("recalkv")
        projections = [projection_of(self.model, name) for name in self.names]
        config = self.config(**options, layers=method.allocate(projections, config, self) or None)
        dense = {name: self.model.get_submodule(name) for name in self.names}
        errors: dict[str, list[float]] = {"key": [], "value": []}
        ranks = {}
        try:
            for projection in projections:
                layer = dense[projection.name]
                unit = registry.LinearUnit(projection.name, layer.weight.detach(), projection=projection)
                seen = PairedStats(dense=self.stats[projection.name])
                if config.weighting != "none":
                    seen.gradients = self.loss(config)[projection.name].second_moment
                packed = method.compress(unit, seen, config)
                residual = layer.weight.detach() - packed.unpack()
                moment = self.stats[projection.name].second_moment(torch.float64)
                energies = [float(((w.double() @ moment) * w.double()).sum()) for w in (residual, layer.weight)]
                errors[projection.part].append((energies[0] / energies[1]) ** 0.5)
                ranks[projection.name] = packed.spec.width
                self.model.set_submodule(projection.name, PackedLinear.replacing(layer, packed))
            whole = sum(projection.shape[0] for projection in projections)
            yield {
                "kept": sum(ranks.values()) / whole,
                "ranks": {part: [r for n, r in ranks.items() if n.endswith(f"{part[0]}_proj")] for part in errors},
                "errors": {part: statistics.mean(found) for part, found in errors.items()},
            }
        finally:
            for name, layer in dense.items():
                self.model.set_submodule(name, layer)

    def measure(self, **options: Any) -> dict[str, Any]:
        """Return the figures of one variant."""
        with torch.no_grad(), self.compressed(**options) as found:
            return {**found, **self.figures()}


class Record:
    """A result file that grows figure by figure, so that a measurement that was cut off goes on where it was."""

    def __init__(self, part: str) -> None:
        self.part = part
        self.found: dict[str, Any] = dict(read_results(FOLDER).get(part, {}).get("figures", {}))

    def take(self, key: str, measure: Callable[[], dict[str, Any]]) -> None:
        """Measure and write a figure, unless it is there."""
        if key in self.found:
            return
        began = time.perf_counter()
        self.found[key] = measure()
        write_result(f"{FOLDER}/{self.part}", {"figures": self.found})
        shown = {name: value for name, value in self.found[key].items() if isinstance(value, float)}
        print(self.part, key, shown, f"{time.perf_counter() - began:.0f} s", flush=True)


@functools.cache
def smollm2() -> Bench:
    """Return the model that shares heads: 9 query heads, 3 key and value heads."""
    path = assets.smollm2()
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    return Bench(model, calibration_sequences(tokenizer, 32, 512), heldout_sequences(tokenizer, 24, 512))


def table(record: Record) -> None:
    """Measure every variant at every ratio."""
    bench = smollm2()
    record.take("dense", bench.figures)
    for ratio in RATIOS:
        for title, options in VARIANTS.items():
            if ratio == 0.4 or title not in AT_ONE_RATIO:
                record.take(f"{title}, {ratio}", functools.partial(bench.measure, ratio=ratio, **options))


def singles(record: Record) -> None:
    """Measure what one change alone does, beside variant B, at 60 % compression."""
    for title, options in SINGLES.items():
        record.take(title, functools.partial(smollm2().measure, ratio=0.4, **options))


def _whole_run(options: dict[str, Any], ratio: float) -> dict[str, Any]:
    """Compress while loading, save, load back, compare, measure."""
    bench, path = smollm2(), assets.smollm2()
    began = time.perf_counter()
    config = bench.config(ratio=ratio, **options)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, quantization_config=config)
    seconds = time.perf_counter() - began
    with tempfile.TemporaryDirectory() as folder:
        save_model(model, Path(folder) / "model")
        loaded = AutoModelForCausalLM.from_pretrained(Path(folder) / "model")
    with torch.no_grad():
        before, after = (m(input_ids=bench.heldout[:1, :64]).logits for m in (model, loaded))
        if not torch.equal(before, after):
            raise RuntimeError("the reloaded model does not give the same logits")
        found = Bench(loaded, bench.calibration, bench.heldout).figures()
    specs = [layer.spec for layer in hf_lowbit.packed_modules(loaded).values()]
    kept = sum(spec.width for spec in specs) / sum(spec.out_features for spec in specs)
    return {**found, "kept": kept, "seconds": seconds}


def runs(record: Record) -> None:
    """Measure whole runs."""
    for title, (options, ratios) in RUNS.items():
        for ratio in ratios:
            record.take(f"{title}, {ratio}", functools.partial(_whole_run, options, ratio))


@functools.cache
def multihead() -> Bench:
    """Return the small model in which every query head has keys and values of its own: 8 of each."""
    path = multihead_model.folder()
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    return Bench(model, calibration_sequences(tokenizer, 128, 128), heldout_sequences(tokenizer, 192, 128))


def heads(record: Record) -> None:
    """Measure groupings and calibrations on the model without shared heads."""
    bench = multihead()
    record.take("dense", bench.figures)
    for ratio in (0.5, 0.3, 0.15):  # what a model this small holds in keys and values is of low rank
        for title, options in HEADS.items():
            record.take(f"{title}, {ratio}", functools.partial(bench.measure, ratio=ratio, **options))
        for title, options in HEAD_RUNS.items():
            record.take(f"{title}, {ratio}", functools.partial(_run_in_memory, bench, options, ratio))


def _run_in_memory(bench: Bench, options: dict[str, Any], ratio: float) -> dict[str, Any]:
    """Compress a copy of the model by a whole run, measure."""
    model = copy.deepcopy(bench.model)
    hf_lowbit.quantize(model, bench.config(ratio=ratio, **options))
    with torch.no_grad():
        return Bench(model, bench.calibration, bench.heldout).figures()


def queries(record: Record) -> None:
    """Measure groupings of the nine query heads of SmolLM2, which stand in for many key heads: errors alone."""
    bench = smollm2()
    for block in range(1, 30, 3):
        record.take(f"block {block}", functools.partial(_partitions_of_queries, bench, block))


def _partitions_of_queries(bench: Bench, block: int) -> dict[str, Any]:
    """Return relative errors of the groups that each method finds, of the best, worst and mean partition."""
    weight = bench.model.get_submodule(f"model.layers.{block}.self_attn.q_proj").weight.detach().double()
    moment = bench.stats[f"model.layers.{block}.self_attn.k_proj"].second_moment(torch.float64)  # the same input
    gram = low_rank.output_gram(weight, moment)
    heads, rows = 9, len(weight) // 9
    energies = {}
    for group in itertools.combinations(range(heads), 3):
        index = torch.cat([torch.arange(head * rows, (head + 1) * rows) for head in group])
        energies[group] = torch.linalg.eigvalsh(gram[index][:, index]).clamp(min=0)
    by_similarity = grouping.greedy(grouping.head_similarity(weight, moment, heads), [3] * 3)
    found: dict[str, Any] = {}
    for ratio in (0.5, 0.3):
        rank = int(ratio * 3 * rows)

        def error(groups: Sequence[Sequence[int]], rank: int = rank) -> float:
            lost = sum(float(energies[tuple(sorted(group))][: 3 * rows - rank].sum()) for group in groups)
            return (lost / float(gram.trace())) ** 0.5

        in_order = grouping.contiguous(heads, 3)
        every = [error(groups) for groups in _threes(list(range(heads)))]
        found[str(ratio)] = {
            "contiguous": error(in_order),
            "cka": error(by_similarity),
            "energy": error(grouping.least_loss(gram, heads, [in_order, by_similarity], [rank] * 3)),
            "best": min(every),
            "mean": statistics.mean(every),
            "worst": max(every),
        }
    return found


def _threes(heads: list[int]) -> Iterator[list[tuple[int, ...]]]:
    """Yield all partitions of heads into groups of three."""
    if not heads:
        yield []
        return
    for rest in itertools.combinations(heads[1:], 2):
        others = [head for head in heads[1:] if head not in rest]
        for groups in _threes(others):
            yield [(heads[0], *rest), *groups]


class Rounded:
    """Makes every latent of a model be coded and decoded, as a cache of few bits would, whoever asks for it."""

    def __init__(self, bits: int) -> None:
        self.bits = bits

    def __call__(self, module: PackedLinear, args: tuple[Tensor], output: Tensor) -> Tensor:
        """Return the layer's output by way of rounded latents; a forward hook."""
        packed: Any = module.packed
        rows = encode_rows(packed.latent(args[0]), packed.spec.ranks, self.bits)
        return packed.expand(decode_rows(rows, packed.spec.ranks, self.bits, torch.float32))


def latents(record: Record) -> None:
    """Measure latents of few bits, rotated or not, at 50 % compression; a row of them is coded as a cache does."""
    for title, (options, cases) in LATENTS.items():
        for bits, rotation in cases:
            name = f"{title}, {bits} bits" + ("" if rotation else ", not rotated")
            record.take(name, functools.partial(_with_codes, smollm2(), bits, rotation, options))


def _with_codes(bench: Bench, bits: int, rotation: bool, options: dict[str, Any]) -> dict[str, Any]:
    with torch.no_grad(), bench.compressed(ratio=0.5, latent_bits=bits, rotation=rotation, **options) as found:
        layers: list[Any] = [bench.model.get_submodule(name) for name in bench.names]
        widths = [layer.spec.ranks for layer in layers]
        hooks = [layer.register_forward_hook(Rounded(bits)) for layer in layers]
        figures = bench.figures()
        for hook in hooks:
            hook.remove()
    held = sum(row_bytes(ranks, bits) for ranks in widths)
    dense = sum(2 * layer.out_features for layer in layers)
    return {**figures, "kept": found["kept"], "bytes_per_token": held, "dense_bytes_per_token": dense}


def elsewhere(record: Record) -> None:
    """Measure on news reports, text of another kind than what everything was calibrated on."""
    articles = smollm2()
    tokenizer = AutoTokenizer.from_pretrained(assets.smollm2())
    stream = tokenize(load_texts(str(assets.news())), tokenizer)
    step = len(stream) // 24
    news = torch.stack([stream[i * step : i * step + 512] for i in range(24)])
    bench = copy.copy(articles)  # shares statistics and gradients
    bench.heldout = news
    record.take("dense", bench.figures)
    for title in ("B", "F", "G", "text", "default"):
        record.take(f"{title}, 0.4", functools.partial(bench.measure, ratio=0.4, **VARIANTS[title]))


PARTS: dict[str, Callable[[Record], None]] = {
    "table": table,
    "singles": singles,
    "runs": runs,
    "heads": heads,
    "queries": queries,
    "latents": latents,
    "elsewhere": elsewhere,
}


def main() -> None:
    """Parse arguments, measure, write."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--part", nargs="+", choices=list(PARTS), default=list(PARTS))
    for part in made.parse_args().part:
        PARTS[part](Record(part))


if __name__ == "__main__":
    main()
