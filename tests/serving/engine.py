"""Runs in the environment that has vLLM: takes jobs as JSON from standard input, writes what came of each to a file.

    python engine.py RESULTS < JOBS

A job has ``model``, ``prompts`` (lists of token ids), ``tokens`` to generate and ``options`` of ``vllm.LLM``. Its
result has ``tokens`` of each prompt, the names of the quantization methods of the model's linear layers, and seconds;
or ``error``, what the user is told. All jobs run in this process, one after the other.
"""

import collections
import gc
import json
import sys
import time
from pathlib import Path

DEFAULTS = {
    "dtype": "float32",
    "enforce_eager": True,
    "max_model_len": 128,
    "max_num_seqs": 8,
    "max_num_batched_tokens": 512,
    "kv_cache_memory_bytes": 2**27,
    "distributed_executor_backend": "uni",
    "skip_tokenizer_init": True,
    "disable_log_stats": True,
}


def methods(model):
    """Return how many linear layers have which method."""
    found = (type(getattr(module, "quant_method", None)).__name__ for module in model.modules())
    return dict(collections.Counter(name for name in found if name.endswith("LinearMethod")))


def run(job):
    """Return the result of one job."""
    from vllm import LLM, SamplingParams, TokensPrompt
    from vllm.distributed import cleanup_dist_env_and_memory

    start, llm = time.perf_counter(), None
    try:
        llm = LLM(job["model"], **{**DEFAULTS, **job.get("options", {})})
        loaded = time.perf_counter()
        sampling = SamplingParams(temperature=0, max_tokens=job["tokens"], ignore_eos=True, detokenize=False)
        prompts = [TokensPrompt(prompt_token_ids=prompt) for prompt in job["prompts"]]
        seconds = []
        for _ in range(job.get("repeats", 1)):
            begin = time.perf_counter()
            outs = llm.generate(prompts, sampling, use_tqdm=False)
            seconds.append(time.perf_counter() - begin)
        return {
            "tokens": [list(out.outputs[0].token_ids) for out in outs],
            "methods": llm.apply_model(methods)[0],
            "load_seconds": loaded - start,
            "seconds": seconds,
        }
    except Exception as error:  # whatever the user would be told
        return {"error": f"{type(error).__name__}: {error}"}
    finally:
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()


if __name__ == "__main__":
    results = []
    for given in json.load(sys.stdin):
        results.append(run(given))
        Path(sys.argv[1]).write_text(json.dumps(results))
