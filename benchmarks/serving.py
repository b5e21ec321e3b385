"""SmolLM2-135M in vLLM and in transformers: the same packed files, the same tokens, and what either takes for them.

    python -m benchmarks.serving --part checkpoints              # packed once, without data; about ten minutes
    python -m benchmarks.serving --part tokens [--engine PYTHON] # greedy tokens in float32 and bfloat16
    python -m benchmarks.serving --part rounding                 # what bfloat16 changes in transformers alone
    python -m benchmarks.serving --part speed [--engine PYTHON]  # beside the dense model, in turns

``PYTHON`` is that of an environment with vLLM, by default the one that ``tests.serving.environment`` makes. Tokens are
compared one by one. Sums are made in another order in either library, so where two tokens are nearly as likely they
may differ; then the margin says how near: the difference of the logits of both, as transformers computes them for the
text up to there, beside the standard deviation of all logits of that token.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import assets
import hf_lowbit
from benchmarks import serving_speed
from benchmarks.common import write_result
from tests.serving import cases, environment

FOLDER = "serving-1"
# What takes minutes to fit is packed in the first two blocks, the others stay dense.
FEW = tuple(f"model.layers.{block}" for block in range(2, 30))
MODELS: dict[str, Any] = {
    "integer": cases.INTEGER,
    "arb": hf_lowbit.ARBConfig(
        variant="rc", calibration=None, iterations=1, quantiles=3, max_salient_per_block=3, group_splits=1
    ),
    "adasvd": hf_lowbit.AdaSVDConfig(ratio=0.9, calibration=None, skip=FEW),
    "adasvd-int8": hf_lowbit.AdaSVDConfig(ratio=0.9, calibration=None, factors="int8", skip=FEW),
    "pbs2p": hf_lowbit.PBS2PConfig(calibration=None, skip=FEW),
    "mixed": hf_lowbit.LowBitRecipe(cases.MIXED.rules, skip=["*.v_proj", "layers.1", *FEW]),
}
PROMPTS = (
    "The capital of France is",
    "Water boils at",
    "Once upon a time there was a",
    "The three primary colours are",
)
TOKENS = 48


def folder_of(name: str) -> Path:
    """Return the folder of a model: the dense one, or a packed one that was written before."""
    return assets.smollm2() if name == "dense" else assets.cache_folder() / f"{FOLDER}-{name}"


def write_checkpoints() -> None:
    """Pack and write those models that are not there."""
    tokenizer = AutoTokenizer.from_pretrained(assets.smollm2())
    for name, config in MODELS.items():

        def build(target: Path, work: Path, config: Any = config) -> None:
            model = AutoModelForCausalLM.from_pretrained(assets.smollm2(), quantization_config=config)
            model.save_pretrained(target)
            tokenizer.save_pretrained(target)

        assets.cached(f"{FOLDER}-{name}", None, build)


def served(engine: Path, job: dict[str, Any]) -> dict[str, Any]:
    """Return what vLLM makes of a job, see ``tests/serving/engine.py``."""
    with tempfile.TemporaryDirectory() as work:
        results = Path(work) / "results.json"
        script = Path(environment.__file__).with_name("engine.py")
        subprocess.run(
            [str(engine), str(script), str(results)],
            input=json.dumps([job]).encode(),
            check=True,
            env=cases.settings(),
        )
        (found,) = json.loads(results.read_text("utf-8"))
    if "error" in found:
        raise RuntimeError(f"{job['model']}: {found['error']}")
    result: dict[str, Any] = found
    return result


def prompts() -> list[list[int]]:
    """Return the token ids of the prompts."""
    tokenizer = AutoTokenizer.from_pretrained(assets.smollm2())
    ids: list[list[int]] = [tokenizer(text)["input_ids"] for text in PROMPTS]
    return ids


def compare_tokens(engine: Path, names: list[str], dtypes: list[str]) -> None:
    """Write for every model and dtype how many tokens agree."""
    given = prompts()
    for dtype in dtypes:
        for name in names:  # each written when it is known
            folder = folder_of(name)
            job = {"model": str(folder), "prompts": given, "tokens": TOKENS, "options": {"dtype": dtype}}
            result = served(engine, job)
            want = cases.generated(folder, given, TOKENS, getattr(torch, dtype))
            rows = _agreement(folder, given, want, result["tokens"], getattr(torch, dtype))
            write_result(
                f"serving/tokens-{name}-{dtype}",
                {"model": name, "dtype": dtype, "tokens": TOKENS, "layers": result["methods"], "prompts": rows},
            )


def compare_rounding(names: list[str]) -> None:
    """Write for every model how many tokens of transformers in bfloat16 are its own in float32: what rounding does."""
    given = prompts()
    for name in names:
        exact, rounded = (
            cases.generated(folder_of(name), given, TOKENS, dtype) for dtype in (torch.float32, torch.bfloat16)
        )
        same = [_same(a, b) for a, b in zip(exact, rounded, strict=True)]
        result = {"model": name, "dtype": "bfloat16", "tokens": TOKENS, "rounded": same}
        write_result(f"serving/rounding-{name}", result)


def _same(ours: list[int], theirs: list[int]) -> int:
    return next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b), len(ours))


def _agreement(
    folder: Path, given: list[list[int]], want: list[list[int]], got: list[list[int]], dtype: torch.dtype
) -> list[dict[str, Any]]:
    """Return for every prompt how many tokens agree from the start and, if not all, the margin where they part."""
    rows = []
    model = None
    for prompt, ours, theirs in zip(given, want, got, strict=True):
        same = _same(ours, theirs)
        row: dict[str, Any] = {"same": same}
        if same < len(ours):
            model = model or AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
            with torch.no_grad():
                logits = model(torch.tensor([prompt + ours[:same]])).logits[0, -1].float()
            row["margin"] = float(logits[ours[same]] - logits[theirs[same]])
            row["deviation"] = float(logits.std())
        rows.append(row)
    return rows


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=("checkpoints", "tokens", "rounding", "speed"), required=True)
    parser.add_argument("--engine", type=Path, help="Python of an environment with vLLM")
    parser.add_argument("--models", nargs="+", choices=("dense", *MODELS), default=["dense", *MODELS])
    parser.add_argument("--dtypes", nargs="+", choices=("float32", "bfloat16"), default=["float32", "bfloat16"])
    options = parser.parse_args()
    torch.set_num_threads(1)  # as many as vLLM gets
    if options.part == "checkpoints":
        write_checkpoints()
        return
    if absent := [name for name in options.models if not folder_of(name).is_dir()]:
        parser.error(f"{absent[0]} is not packed yet; --part checkpoints does it")
    if options.part == "rounding":
        compare_rounding(options.models)
        return
    engine = options.engine or environment.python()
    if options.part == "tokens":
        compare_tokens(engine, options.models, options.dtypes)
    else:
        serving_speed.measure(engine, {name: folder_of(name) for name in ("dense", *options.models)}, prompts()[0])


if __name__ == "__main__":
    main()
