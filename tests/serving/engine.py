"""Runs in the environment that has vLLM: takes jobs as JSON from standard input, writes what came of each to a file.

    python engine.py RESULTS < JOBS

The jobs are the first line. A job has ``model``, ``prompts`` (lists of token ids), ``tokens`` to generate and
``options`` of ``vllm.LLM``. Its result has ``tokens`` of each prompt and the names of the quantization methods of the
model's linear layers; or ``error``, what the user is told. All jobs run in this process, one after the other. One that
is ``asked`` generates again for every further line, a number of times that the prompts are repeated, and prints DONE.
"""

import collections
import gc
import json
import sys
from pathlib import Path

DONE = "done"  # a line of its own
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

    llm = None
    try:
        llm = LLM(job["model"], **{**DEFAULTS, **job.get("options", {})})
        sampling = SamplingParams(temperature=0, max_tokens=job["tokens"], ignore_eos=True, detokenize=False)
        prompts = [TokensPrompt(prompt_token_ids=prompt) for prompt in job["prompts"]]
        outs = llm.generate(prompts, sampling, use_tqdm=False)
        if job.get("asked"):
            print(DONE, flush=True)
            for line in sys.stdin:
                llm.generate(prompts * int(line), sampling, use_tqdm=False)
                print(DONE, flush=True)
        return {
            "tokens": [list(out.outputs[0].token_ids) for out in outs],
            "methods": llm.apply_model(methods)[0],
        }
    except Exception as error:  # whatever the user would be told
        return {"error": f"{type(error).__name__}: {error}"}
    finally:
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()


if __name__ == "__main__":
    results = []
    for given in json.loads(sys.stdin.readline()):
        results.append(run(given))
        Path(sys.argv[1]).write_text(json.dumps(results))
