"""Quality at equal bytes: weight methods, recipes chosen under a budget, and other libraries, on SmolLM2-135M.

    pip install -e '.[budget,peers]'                     # HQQ, quanto, torchao, bitsandbytes
    pip install --no-deps llmcompressor==0.14.0.1 compressed-tensors==0.20.0 loguru==0.7.3    # GPTQ
    python -m benchmarks.equal_bytes errors              # what candidates lose on every layer; the others need it
    python -m benchmarks.equal_bytes rows                # compress, save, load, perplexity; resumes after the last row
    python -m benchmarks.equal_bytes rows --only hqq-2-64
    python -m benchmarks.equal_bytes speed               # decoding, all rows in turn, one thread
    python -m benchmarks.equal_bytes plot                # perplexity over bits of what is measured so far
    python -m benchmarks.report                          # renders the table

Bytes are those of the linear layers in the decoder blocks, everything that is stored for them counted; embeddings,
norms and head are the same bfloat16 tensors in all rows. Of other libraries the tensors that they hold are counted.
Text is that of the other tables: 32 × 512 tokens of Wikipedia articles to calibrate on (where a method does), 32 × 512
of other articles to measure on. Writes ``benchmarks/results/equal_bytes/<row>.json`` as soon as a row is done.

Recipes are chosen as a run with ``target_bits_per_weight`` chooses; the errors are measured once and kept in
``errors.json``, so that four budgets need not measure them four times.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import math
import shutil
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import assets
from benchmarks import report_equal_bytes
from benchmarks.common import RESULTS, calibration_sequences, heldout_sequences, read_results, write_result
from hf_lowbit import (
    AdaSVDConfig,
    ARBConfig,
    DVDQuantConfig,
    LowBitConfig,
    LowBitRecipe,
    PBS2PConfig,
    RunOptions,
    packed_modules,
)
from hf_lowbit.budget import settings_text
from hf_lowbit.compress.budget import Budget
from hf_lowbit.compress.engine import Run
from hf_lowbit.hf.save import save_model
from hf_lowbit.numerics.allocation import allocate
from hf_lowbit.report.evaluate import decode_speed, perplexity

FOLDER = "equal_bytes"
CANDIDATES_AT = (2.0, 2.5, 3.0, 4.0)
SAMPLES, LENGTH = 32, 512


@dataclasses.dataclass(frozen=True)
class Text:
    """Token ids, (sequences, length) each."""

    calibration: Tensor
    heldout: Tensor


def text() -> Text:
    """Return what all rows are calibrated and measured on."""
    tokenizer = AutoTokenizer.from_pretrained(assets.smollm2())
    return Text(calibration_sequences(tokenizer, SAMPLES, LENGTH), heldout_sequences(tokenizer, 32, LENGTH))


def integers(bits: int, group: int, calibration: Any = None, balance: str = "weight_columns") -> LowBitConfig:
    """Return weights of so many bits, a scale and a zero point for each group of columns.

    Calibrated ones are balanced, which the preset does not do: columns then make up for each other either way.
    """
    data = {"calibration": calibration, "samples": SAMPLES}
    return DVDQuantConfig(preset="weights", w_bits=bits, group_size=group, balance=balance, **data)


def candidates(calibration: Any) -> list[LowBitConfig]:
    """Return what the recipes choose from."""
    shared = {"calibration": calibration, "samples": SAMPLES}
    signs = ARBConfig(**shared, variant="rtn")
    pairs = ((2, -1), (2, 64), (3, 64), (4, 64))
    return [signs, *(integers(bits, group, calibration) for bits, group in pairs)]


# row -> config from the calibration text; what a method is called in the table is in report_equal_bytes
OURS: dict[str, Callable[[Any], LowBitConfig]] = {
    "integer-2-64": lambda data: integers(2, 64, data),
    "integer-3-128": lambda data: integers(3, 128, data),
    "integer-2-32": lambda data: integers(2, 32, data),
    "integer-4-128": lambda data: integers(4, 128, data),
    "integer-4-32-no-data": lambda data: integers(4, 32, balance="none"),
    "integer-4-32-no-data-balanced": lambda data: integers(4, 32),
    "integer-3-128-no-data": lambda data: integers(3, 128, balance="none"),
    "integer-2-32-no-data": lambda data: integers(2, 32, balance="none"),
    "adasvd-int4": lambda data: AdaSVDConfig(calibration=data, samples=SAMPLES, ratio=0.55, factors="int4"),
    "arb-rc": lambda data: ARBConfig(
        calibration=data, samples=SAMPLES, column_group_bitmap=False, iterations=3, max_salient_per_block=25
    ),
    "pbs2p-4of8-one-group": lambda data: PBS2PConfig(calibration=data, samples=SAMPLES, n=4, groups="none"),
}


# Recipes -----------------------------------------------------------------------------------------------------------


def measure_errors(data: Text) -> None:
    """Measure what every candidate loses on every layer of the dense model, as a run with a budget does."""
    model = AutoModelForCausalLM.from_pretrained(assets.smollm2()).eval()
    own = candidates(data.calibration)
    recipe = LowBitRecipe({"*": own}, target_bits_per_weight=8, run=RunOptions(progress=True))
    began = time.process_time()
    budget = Run(model, recipe).budget
    assert isinstance(budget, Budget)
    with torch.no_grad():
        sizes, errors = budget._measured()
    numbers = {name: [own_index(own, one) for one in fitting] for name, fitting in budget.candidates.items()}
    content = {"candidates": list(map(settings_text, own)), "layers": numbers, "bytes": sizes, "errors": errors}
    content |= {"methods": [one.method for one in own]}
    write_result(f"{FOLDER}/errors", {**content, "seconds": time.process_time() - began})


def own_index(own: list[LowBitConfig], one: LowBitConfig) -> int:
    """Return which candidate a settled one is."""
    return [(c.method, settings_text(c)) for c in own].index((one.method, settings_text(one)))


def chosen_recipe(data: Text, bits: float) -> LowBitRecipe:
    """Return what a run with this target compresses with: a rule for each candidate that is chosen anywhere."""
    found = read_results(FOLDER)["errors"]
    own = candidates(data.calibration)
    if found["candidates"] != list(map(settings_text, own)):
        raise ValueError("errors.json is of other candidates; measure them again")
    weights = sum(layer.weight.numel() for layer in linears(dense_model()).values())
    names = list(found["layers"])
    picks = allocate(
        [found["bytes"][name] for name in names],
        [found["errors"][name] for name in names],
        math.floor(bits * weights / 8),
    )
    by_candidate: dict[int, list[str]] = {}
    for name, pick in zip(names, picks, strict=True):
        by_candidate.setdefault(found["layers"][name][pick], []).append(name)
    rows = {"|".join(layers): own[number] for number, layers in sorted(by_candidate.items())}
    return LowBitRecipe(rules=tuple(rows.items()))


# Rows --------------------------------------------------------------------------------------------------------------


def dense_model() -> Any:
    """Return the model as it is, in bfloat16."""
    return AutoModelForCausalLM.from_pretrained(assets.smollm2(), dtype=torch.bfloat16).eval()


def linears(model: nn.Module) -> dict[str, Any]:
    """Return the dense linear layers in the decoder blocks."""
    return {n: m for n, m in model.named_modules() if type(m) is nn.Linear and not n.endswith("lm_head")}


def measure_own(name: str, config: LowBitConfig | None, data: Text, keep: Path) -> dict[str, Any]:
    """Compress, save, load back, measure."""
    if config is None:
        return {"perplexity": perplexity(dense_model(), data.heldout, 4), "bits": 16.0, "family": "dense"}
    began = time.process_time()
    model = AutoModelForCausalLM.from_pretrained(assets.smollm2(), quantization_config=config)
    seconds = time.process_time() - began
    shutil.rmtree(keep / name, ignore_errors=True)
    save_model(model, keep / name)
    del model
    loaded = AutoModelForCausalLM.from_pretrained(keep / name)
    packed = packed_modules(loaded).values()
    weights = sum(layer.in_features * layer.out_features for layer in packed)
    stored = sum(layer.packed.nbytes for layer in packed)
    pairs = getattr(config, "rules", ())
    rules = [[one.method, settings_text(one), len(pattern.split("|"))] for pattern, one in pairs]
    return {
        "perplexity": perplexity(loaded, data.heldout, 4),
        "bits": 8 * stored / weights,
        "bytes": stored,
        "file_bytes": sum(file.stat().st_size for file in (keep / name).glob("*.safetensors")),
        "seconds": seconds,
        "family": "recipe" if rules else "method",
        "rules": rules or [[config.method, settings_text(config), len(packed)]],
    }


def measure_peer(name: str, data: Text) -> dict[str, Any]:
    """Let another library quantize the same layers, and measure."""
    from benchmarks import equal_bytes_peers as peers

    package, make = peers.ROWS[name]
    dense = dense_model()
    weights = {layer: module.weight.numel() for layer, module in linears(dense).items()}
    began = time.process_time()
    model = make(dense, data.calibration)
    seconds = time.process_time() - began
    stored = peers.stored_bytes(model, weights)
    return {
        "perplexity": perplexity(model, data.heldout, 4),
        "bits": 8 * stored / sum(weights.values()),
        "bytes": stored,
        "seconds": seconds,
        "family": "peer",
        "package": f"{package} {version(package)}",
    }


def rows(only: list[str], keep: Path) -> None:
    """Measure the rows that have no result file yet; one that fails is said and left out."""
    from benchmarks import equal_bytes_peers as peers

    keep.mkdir(parents=True, exist_ok=True)
    data = text()
    wanted = only or ["dense", *OURS, *(f"recipe-{bits:g}" for bits in CANDIDATES_AT), *peers.ROWS]
    for name in wanted:
        if (RESULTS / FOLDER / f"{name}.json").exists() and not only:
            continue
        if name in peers.ROWS:
            result = measure_peer(name, data)
        elif name.startswith("recipe-"):
            result = measure_own(name, chosen_recipe(data, float(name.removeprefix("recipe-"))), data, keep)
        else:
            result = measure_own(name, OURS[name](data.calibration) if name in OURS else None, data, keep)
        write_result(f"{FOLDER}/{name}", {"row": name, **result})
        print(name, {key: result.get(key) for key in ("bits", "perplexity", "seconds")}, flush=True)
        gc.collect()


# Speed -------------------------------------------------------------------------------------------------------------


def speed(keep: Path, only: list[str], new_tokens: int) -> None:
    """Measure decoding beside the dense model, each row in turn with it; peers are made anew."""
    from benchmarks import equal_bytes_peers as peers

    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(assets.smollm2())
    dense, found = dense_model(), {}
    path = RESULTS / FOLDER / "speed.json"
    before = json.loads(path.read_text("utf-8"))["rows"] if path.exists() else {}
    for name in only or [name for name in read_results(FOLDER) if name not in before]:
        if name in peers.ROWS:
            model = peers.ROWS[name][1](dense_model(), calibration_sequences(tokenizer, SAMPLES, LENGTH))
        elif (keep / name).exists():
            model = AutoModelForCausalLM.from_pretrained(keep / name, dtype=torch.bfloat16).eval()
        else:
            continue
        result = decode_speed({"dense": dense, name: model}, tokenizer, new_tokens, repeats=3)
        found[name] = {"tokens_per_second": result[name]["tokens_per_second"], "ratio": result[name]["ratio"]}
        print(name, found[name], flush=True)
        write_result(f"{FOLDER}/speed", {"rows": {**before, **found}, "new_tokens": new_tokens})
        del model
        gc.collect()


def main() -> None:
    """Parse arguments, do one part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("errors", "rows", "speed", "plot"))
    parser.add_argument("--only", nargs="+", default=[], help="rows, by name")
    parser.add_argument("--keep", type=Path, default=Path("outputs/equal_bytes"), help="where compressed models go")
    parser.add_argument("--new-tokens", type=int, default=16)
    arguments = parser.parse_args()
    if arguments.part == "errors":
        measure_errors(text())
    elif arguments.part == "rows":
        rows(arguments.only, arguments.keep)
    elif arguments.part == "plot":
        report_equal_bytes.plot()
    else:
        speed(arguments.keep, arguments.only, arguments.new_tokens)


if __name__ == "__main__":
    main()
