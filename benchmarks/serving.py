"""SmolLM2-135M in vLLM and in transformers: the same packed files, the same tokens, and what either takes for them.

    python -m benchmarks.serving --part checkpoints              # packed once, without data; about ten minutes
    python -m benchmarks.serving --part tokens [--engine PYTHON] # greedy tokens in float32 and bfloat16
    python -m benchmarks.serving --part speed [--engine PYTHON]  # in one run, nothing else running

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
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import assets
import hf_lowbit
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
BATCHES = (1, 8)


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


def served(engine: Path, jobs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return what vLLM makes of some jobs, see ``tests/serving/engine.py``."""
    with tempfile.TemporaryDirectory() as work:
        results = Path(work) / "results.json"
        script = Path(environment.__file__).with_name("engine.py")
        subprocess.run(
            [str(engine), str(script), str(results)], input=json.dumps(jobs).encode(), check=True, env=cases.settings()
        )
        found: list[dict[str, Any]] = json.loads(results.read_text("utf-8"))
    for job, result in zip(jobs, found, strict=True):
        if "error" in result:
            raise RuntimeError(f"{job['model']}: {result['error']}")
    return found


def prompts() -> list[list[int]]:
    """Return the token ids of the prompts."""
    tokenizer = AutoTokenizer.from_pretrained(assets.smollm2())
    ids: list[list[int]] = [tokenizer(text)["input_ids"] for text in PROMPTS]
    return ids


def compare_tokens(engine: Path, names: list[str], dtypes: list[str]) -> None:
    """Write for every model and dtype how many tokens agree."""
    given = prompts()
    for dtype in dtypes:
        jobs = [
            {"model": str(folder_of(name)), "prompts": given, "tokens": TOKENS, "options": {"dtype": dtype}}
            for name in names
        ]
        for name, result in zip(names, served(engine, jobs), strict=True):
            want = cases.generated(folder_of(name), given, TOKENS, getattr(torch, dtype))
            rows = _agreement(folder_of(name), given, want, result["tokens"], getattr(torch, dtype))
            write_result(
                f"serving/tokens-{name}-{dtype}",
                {"model": name, "dtype": dtype, "tokens": TOKENS, "layers": result["methods"], "prompts": rows},
            )


def _agreement(
    folder: Path, given: list[list[int]], want: list[list[int]], got: list[list[int]], dtype: torch.dtype
) -> list[dict[str, Any]]:
    """Return for every prompt how many tokens agree from the start and, if not all, the margin where they part."""
    rows = []
    model = None
    for prompt, ours, theirs in zip(given, want, got, strict=True):
        same = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b), len(ours))
        row: dict[str, Any] = {"same": same}
        if same < len(ours):
            model = model or AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
            with torch.no_grad():
                logits = model(torch.tensor([prompt + ours[:same]])).logits[0, -1].float()
            row["margin"] = float(logits[ours[same]] - logits[theirs[same]])
            row["deviation"] = float(logits.std())
        rows.append(row)
    return rows


def compare_speed(engine: Path, names: list[str]) -> None:
    """Write tokens per second of vLLM and of transformers, in turns on the same cores."""
    prompt = prompts()[0]
    rows = []
    for name in names:
        for batch in BATCHES:
            (job,) = served(
                engine,
                [
                    {
                        "model": str(folder_of(name)),
                        "prompts": [prompt] * batch,
                        "tokens": TOKENS,
                        "repeats": 3,
                        "options": {"dtype": "bfloat16"},
                    }
                ],
            )
            rows.append(
                {
                    "model": name,
                    "batch": batch,
                    "vllm": TOKENS * batch / min(job["seconds"]),
                    "transformers": _speed(folder_of(name), prompt, batch),
                }
            )
    write_result("serving/speed", {"dtype": "bfloat16", "tokens": TOKENS, "rows": rows})


def _speed(folder: Path, prompt: list[int], batch: int) -> float:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    ids = torch.tensor([prompt] * batch)
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=TOKENS,
            min_new_tokens=TOKENS,
            pad_token_id=0,
        )
        seconds.append(time.perf_counter() - start)
    return TOKENS * batch / min(seconds)


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=("checkpoints", "tokens", "speed"), required=True)
    parser.add_argument("--engine", type=Path, help="Python of an environment with vLLM")
    parser.add_argument("--models", nargs="+", choices=("dense", *MODELS), default=["dense", *MODELS])
    parser.add_argument("--dtypes", nargs="+", choices=("float32", "bfloat16"), default=["float32", "bfloat16"])
    options = parser.parse_args()
    torch.set_num_threads(1)  # vLLM keeps one of two cores to itself
    if options.part == "checkpoints":
        write_checkpoints()
        return
    engine = options.engine or environment.python()
    if options.part == "tokens":
        compare_tokens(engine, options.models, options.dtypes)
    else:
        compare_speed(engine, options.models)


if __name__ == "__main__":
    main()
