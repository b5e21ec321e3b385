"""Tokens per second of a packed model and of the dense one, each in vLLM and in transformers, all four in turns.

A machine that does something else slows neighbours in time alike. So each engine is a process that waits until it is
asked, and what is reported are ratios within a turn, their median over all turns.
"""

from __future__ import annotations

import contextlib
import json
import statistics
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from benchmarks.common import write_result
from hf_lowbit.report.bench import timed_in_turn
from tests.serving import cases, engine

TOKENS = 32
BATCHES = (1, 8)
TURNS = 5
DTYPE = "bfloat16"


def measure(python: Path, folders: Mapping[str, Path], prompt: list[int]) -> None:
    """Write one result for each packed model.

    Args:
        python: of the environment with vLLM.
        folders: of the models, that of ``dense`` among them.
        prompt: token ids.
    """
    for name in folders:
        if name == "dense":
            continue
        with contextlib.ExitStack() as stack:
            runs: dict[str, Callable[[int], Any]] = {}
            for each in ("dense", name):
                runs[f"{each} vllm"] = stack.enter_context(_engine(python, folders[each], prompt))
                runs[f"{each} transformers"] = _transformers(folders[each], prompt)
            rows = [_row(name, batch, runs) for batch in BATCHES]
        write_result(
            f"serving/speed-{name}",
            {"model": name, "dtype": DTYPE, "tokens": TOKENS, "turns": TURNS, "rows": rows},
        )


def _row(name: str, batch: int, runs: Mapping[str, Callable[[int], Any]]) -> dict[str, Any]:
    at = {run: lambda turn, call=call: call(batch) for run, call in runs.items()}
    seconds = timed_in_turn(at, 0.0, least=TURNS + 2)
    dense, packed = ({of: seconds[f"{each} {of}"] for of in ("vllm", "transformers")} for each in ("dense", name))
    return {
        "batch": batch,
        "tokens_per_second": {run: TOKENS * batch / statistics.median(took) for run, took in seconds.items()},
        "vllm_to_transformers": _faster(packed["transformers"], packed["vllm"]),
        "dense_vllm_to_transformers": _faster(dense["transformers"], dense["vllm"]),
        "packed_to_dense_vllm": _faster(dense["vllm"], packed["vllm"]),
        "packed_to_dense_transformers": _faster(dense["transformers"], packed["transformers"]),
    }


def _faster(slow: list[float], fast: list[float]) -> float:
    """Return how many times as fast the second is, within a turn; median of all turns."""
    return statistics.median(a / b for a, b in zip(slow, fast, strict=True))


@contextlib.contextmanager
def _engine(python: Path, folder: Path, prompt: list[int]) -> Iterator[Callable[[int], None]]:
    """Start vLLM with a model; yields what generates for a number of requests, and returns when they are done."""
    with tempfile.TemporaryDirectory() as work:
        job = {"model": str(folder), "prompts": [prompt], "tokens": TOKENS, "asked": True, "options": {"dtype": DTYPE}}
        results = Path(work) / "results.json"
        process = subprocess.Popen(
            [str(python), engine.__file__, str(results)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**cases.settings(), "OMP_NUM_THREADS": str(torch.get_num_threads())},
        )
        asked: Any = process.stdin
        answers: Any = process.stdout

        def wait() -> None:
            if not any(line.strip() == engine.DONE for line in answers):
                said = json.loads(results.read_text("utf-8")) if results.is_file() else [{}]
                raise RuntimeError(f"{folder.name}: {said[0].get('error', 'vLLM ended')}")

        def generate(batch: int) -> None:
            asked.write(f"{batch}\n")
            asked.flush()
            wait()

        try:
            asked.write(json.dumps([job]) + "\n")
            asked.flush()
            wait()
            yield generate
        finally:
            asked.close()
            process.terminate()
            process.wait(60)


def _transformers(folder: Path, prompt: list[int]) -> Callable[[int], None]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, DTYPE)).eval()

    def generate(batch: int) -> None:
        ids = torch.tensor([prompt] * batch)
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=TOKENS,
            min_new_tokens=TOKENS,
            pad_token_id=0,
        )

    return generate
