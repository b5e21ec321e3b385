"""Speed of greedy decoding beside the dense model and llama.cpp, in turn in one process.

    python -m benchmarks.decode outputs/demo/arb-rc          # a compressed SmolLM2-135M, such as the demo leaves
    python -m benchmarks.decode --shape 1b                   # random weights in the shape of Llama-3.2-1B
    pip install xllamacpp                                    # adds llama.cpp, on the Q4_1 file that SmolLM2 comes from

One sequence; the time of a token is that of the whole call divided by the new tokens. Random bits take as long as
any others to multiply. Writes ``benchmarks/results/decode.json``, one entry for each model.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

import assets
from benchmarks.common import RESULTS, write_result
from hf_lowbit import PackedLinear, packed_modules
from hf_lowbit.report.bench import random_weight, timed_in_turn, typical_spec

DENSE, PACKED, LLAMA_CPP = "dense bfloat16", "packed", "llama.cpp Q4_1"
PROMPT = "The history of"
# Llama-3.2-1B, with a vocabulary of 32,000 so that the head, which stays dense, is no larger than that of older models
SHAPES = {"1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "vocab_size": 32000}}


def random_pair(shape: str) -> dict[str, Any]:
    """Return a dense and a packed Llama of random weights, which share what is not packed."""
    config = LlamaConfig(
        **SHAPES[shape], num_attention_heads=32, num_key_value_heads=8, tie_word_embeddings=True, dtype=torch.bfloat16
    )
    with torch.device("meta"):
        models = [LlamaForCausalLM(config).to(torch.bfloat16).eval() for _ in range(2)]
    dense = models[0].to_empty(device="cpu")
    for name, parameter in dense.named_parameters():
        nn.init.ones_(parameter) if "norm" in name else nn.init.normal_(parameter, std=0.02)
    dense.model.rotary_emb.__init__(config)  # its buffers are computed, not loaded
    dense.tie_weights()
    packed = models[1]
    for name, linear in list(packed.named_modules()):
        if type(linear) is nn.Linear and name != "lm_head":
            spec = typical_spec(linear.out_features, linear.in_features)
            packed.set_submodule(name, PackedLinear(random_weight(spec), None, torch.bfloat16))
        elif name == "lm_head" or isinstance(linear, nn.Embedding) or "norm" in name or name.endswith("rotary_emb"):
            packed.set_submodule(name, dense.get_submodule(name))
    return {DENSE: dense, PACKED: packed}


def generating(model: Any, prompt: torch.Tensor, new_tokens: int) -> Callable[[int], Any]:
    """Return the call that is timed."""
    settings = GenerationConfig(
        max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False, pad_token_id=0, eos_token_id=None
    )
    inputs = {"input_ids": prompt, "attention_mask": torch.ones_like(prompt)}

    def call(_: int) -> Any:
        return model.generate(**inputs, generation_config=settings)

    return call


def llama_cpp(folder: Path, new_tokens: int, threads: int) -> Callable[[int], Any] | None:
    """Return the same for llama.cpp, None without the package ``xllamacpp``."""
    try:
        import xllamacpp
    except ImportError:
        return None
    settings = xllamacpp.CommonParams()
    settings.model.path = str(assets.smollm2_gguf(folder))
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = threads
    settings.n_ctx, settings.n_parallel, settings.verbosity = 512, 1, 0
    server = xllamacpp.Server(settings)
    request = {"prompt": PROMPT, "max_tokens": new_tokens, "temperature": 0, "ignore_eos": True, "cache_prompt": False}

    def call(_: int) -> Any:
        answer = server.handle_completions(request)
        assert answer["usage"]["completion_tokens"] == new_tokens, answer
        return answer

    return call


def shares(model: Any, call: Callable[[int], Any], new_tokens: int) -> dict[str, float]:
    """Return milliseconds of a token inside the layers of blocks, inside the output head, and in all else."""
    spent = {"layers": 0.0, "head": 0.0}
    timed: dict[nn.Module, Callable[..., Any]] = {}
    for module in model.modules():
        if isinstance(module, nn.Linear):
            part = "head" if module is model.lm_head else "layers"

            def forward(x: torch.Tensor, part: str = part, own: Any = module.forward) -> Any:
                began = time.perf_counter()
                out = own(x)
                spent[part] += time.perf_counter() - began
                return out

            timed[module] = forward
    for module, own in timed.items():
        module.forward = own  # type: ignore[method-assign]
    call(0)
    rounds = 3
    spent.update(layers=0.0, head=0.0)
    began = time.perf_counter()
    for turn in range(rounds):
        call(turn)
    total = time.perf_counter() - began
    for module in timed:
        del module.forward
    found = {**spent, "rest": total - sum(spent.values())}
    return {part: round(seconds / rounds / new_tokens * 1e3, 2) for part, seconds in found.items()}


def main() -> None:
    """Parse arguments, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="folder of the compressed model")
    parser.add_argument("--shape", choices=SHAPES, help="random weights of this shape instead")
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=60.0, help="time to measure")
    parser.add_argument("--threads", type=int, default=1, help="of torch and of llama.cpp")
    arguments = parser.parse_args()
    if bool(arguments.model) == bool(arguments.shape):
        parser.error("give either the folder of a model or --shape")
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        if arguments.shape:
            name, models, prompt = f"random, {arguments.shape}", random_pair(arguments.shape), torch.arange(1, 4)[None]
            ways = {key: generating(model, prompt, arguments.new_tokens) for key, model in models.items()}
        else:
            name, dense = "SmolLM2-135M", assets.smollm2()
            models = {
                DENSE: AutoModelForCausalLM.from_pretrained(dense, dtype=torch.bfloat16),
                PACKED: AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.bfloat16),
            }
            prompt = AutoTokenizer.from_pretrained(dense)(PROMPT, return_tensors="pt")["input_ids"]
            ways = {key: generating(model, prompt, arguments.new_tokens) for key, model in models.items()}
            peer = llama_cpp(Path(folder), arguments.new_tokens, arguments.threads)
            ways |= {LLAMA_CPP: peer} if peer else {}
        times = timed_in_turn(ways, arguments.seconds)
        split = {way: shares(model, ways[way], arguments.new_tokens) for way, model in models.items()}
    record(name, models, times, split, arguments.new_tokens)


def record(name: str, models: dict[str, Any], times: dict[str, list[float]], split: Any, new_tokens: int) -> None:
    """Print the figures and add them to those of other models."""
    medians = {way: statistics.median(own) for way, own in times.items()}
    speeds = {
        way: {"tokens_per_second": round(new_tokens / own, 2), "ratio": round(medians[DENSE] / own, 3)}
        for way, own in medians.items()
    }
    stored = sum(layer.packed.nbytes for layer in packed_modules(models[PACKED]).values())
    path = RESULTS / "decode.json"
    before = json.loads(path.read_text("utf-8")).get("models", {}) if path.exists() else {}
    row = {"speeds": speeds, "rounds": len(times[DENSE]), "packed_bytes": stored, "milliseconds": split}
    write_result("decode", {"new_tokens": new_tokens, "models": {**before, name: row}})
    table = Table(name, "tokens per second", "× dense")
    for way, speed in speeds.items():
        table.add_row(way, f"{speed['tokens_per_second']:.1f}", f"{speed['ratio']:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
