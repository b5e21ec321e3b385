"""Speed of greedy decoding beside the dense model, the two in turn in one process.

    python -m benchmarks.decode outputs/demo/arb-rc          # a compressed SmolLM2-135M, such as the demo leaves

Writes ``benchmarks/results/decode.json``.
"""

from __future__ import annotations

import argparse

from transformers import AutoModelForCausalLM, AutoTokenizer

import assets
from benchmarks.common import write_result
from hf_lowbit import packed_modules
from hf_lowbit.report.evaluate import decode_speed


def main() -> None:
    """Parse arguments, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of the compressed model")
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    dense = assets.smollm2()
    models = {
        "dense": AutoModelForCausalLM.from_pretrained(dense),
        "packed": AutoModelForCausalLM.from_pretrained(arguments.model),
    }
    tokenizer = AutoTokenizer.from_pretrained(dense)
    speeds = decode_speed(models, tokenizer, arguments.new_tokens, arguments.repeats)
    stored = sum(layer.packed.nbytes for layer in packed_modules(models["packed"]).values())
    write_result("decode", {"new_tokens": arguments.new_tokens, "speeds": speeds, "packed_bytes": stored})
    for name, row in speeds.items():
        print(f"{name}: {row['tokens_per_second']:.2f} tokens/s, {row['ratio']:.3f} × dense")


if __name__ == "__main__":
    main()
