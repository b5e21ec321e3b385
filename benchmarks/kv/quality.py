"""Long texts with a compressed cache: perplexity by position, and what is found again that stands far back.

    python -m benchmarks.kv.quality          # about ten minutes on two idle cores; less with --tokens 2048

SmolLM2-135M-Instruct, which was trained on 8192 positions, reads held-out Wikipedia articles in pieces of 512 tokens
with the cache that is measured; every row of a table uses the same texts. Needles are sentences with a name and a
number, put at a tenth, half and nine tenths of a text; at its end the sentence begins again, and the number counts as
found if the model's most likely tokens are all of its tokens. The model is compressed once (32 × 512 tokens, half of
the cache's width, factors mixed for few bits) and kept in the cache folder of ``assets``.

Writes ``benchmarks/results/kv_quality.json``.
"""

from __future__ import annotations

import argparse
import itertools
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.cache_utils import Cache, DynamicCache

import assets
from benchmarks.common import write_result
from hf_lowbit import ReCalKVCache, ReCalKVConfig, RunOptions
from hf_lowbit.hf.save import save_model
from hf_lowbit.report.evaluate import heldout_tokens

PIECE = 512
DEPTHS = (0.1, 0.5, 0.9)
NEEDLES = (("Tobermory", "48 16 93"), ("Lillesand", "70 25 61"))
LENGTHS = (512, 2048, 4096)  # of texts with a needle
NEEDLE = "The secret number of {} is {}."
# Reads in pieces with every cache; None is the dense model.
CACHES: dict[str, int | None] = {"dense": None, "latents": 0, "latents, 8 bits": 8, "latents, 4 bits": 4}


def compressed() -> Path:
    """Return the folder of the compressed model, made at the first call."""

    def build(target: Path, work: Path) -> None:
        config = ReCalKVConfig(
            ratio=0.5,
            latent_bits=4,
            calibration=assets.wikipedia("calibration"),
            samples=32,
            sequence_length=512,
            run=RunOptions(progress=False),
        )
        model = AutoModelForCausalLM.from_pretrained(
            assets.smollm2(), dtype=torch.bfloat16, quantization_config=config
        )
        save_model(model, work / "saved")
        target.rmdir()
        (work / "saved").rename(target)

    return assets.cached("smollm2-recalkv-1", None, build)


def made(model: Any, bits: int | None) -> Cache:
    """Return an empty cache for a model; None is one of dense keys and values, 0 of latents as they are."""
    return (
        DynamicCache(config=model.config) if bits is None else ReCalKVCache.from_model(model, latent_bits=bits or None)
    )


@torch.inference_mode()
def losses(model: Any, tokens: Tensor, cache: Cache) -> Tensor:
    """Return the loss of each token of ``tokens`` (1, length) but the first, read in pieces: (length - 1,)."""
    found = []
    for start in range(0, tokens.shape[1], PIECE):
        piece = tokens[:, start : start + PIECE]
        logits = model(piece, past_key_values=cache).logits[0].float()
        following = tokens[0, start + 1 : start + PIECE + 1]
        found.append(cross_entropy(logits[: len(following)], following, reduction="none"))
    return torch.cat(found)


def by_position(model: Any, texts: Tensor, bits: int | None) -> list[float]:
    """Return the perplexity of each doubling of the position: up to 512, 1024, 2048 and so on."""
    found = torch.stack([losses(model, text[None], made(model, bits)) for text in texts])
    edges = [0, PIECE]
    while edges[-1] < texts.shape[1]:
        edges.append(2 * edges[-1])
    return [math.exp(float(found[:, low:high].mean())) for low, high in itertools.pairwise(edges)]


def haystack(tokenizer: Any, text: Tensor, depth: float, needle: tuple[str, str]) -> tuple[Tensor, Tensor]:
    """Return a prompt (1, length of text) with a needle and its beginning at the end, and the tokens of the number."""
    whole = tokenizer(" " + NEEDLE.format(*needle))["input_ids"]
    begun = tokenizer("\n" + NEEDLE.partition(" {}.")[0].format(needle[0]))["input_ids"]
    answer = tokenizer(" " + needle[1])["input_ids"]
    rest = text[: len(text) - len(whole) - len(begun)].tolist()
    place = int(depth * len(rest))
    return torch.tensor([[*rest[:place], *whole, *rest[place:], *begun]]), torch.tensor(answer)


@torch.inference_mode()
def is_found(model: Any, prompt: Tensor, answer: Tensor, cache: Cache) -> bool:
    """Return whether greedy decoding would write the answer."""
    for piece in prompt[:, :-1].split(PIECE, dim=1):
        model(piece, past_key_values=cache, logits_to_keep=1)
    last = torch.cat([prompt[:, -1:], answer[None, :-1]], dim=1)
    logits = model(last, past_key_values=cache).logits[0]
    return bool((logits.argmax(-1) == answer).all())


def needles(model: Any, tokenizer: Any, texts: Tensor, bits: int | None, lengths: list[int]) -> dict[str, float]:
    """Return the share of needles that are found by the length of the text."""
    shares = {}
    for length in lengths:
        found = [
            is_found(model, *haystack(tokenizer, text[:length], depth, needle), made(model, bits))
            for text in texts
            for needle in NEEDLES
            for depth in DEPTHS
        ]
        shares[str(length)] = sum(found) / len(found)
    return shares


def main() -> None:
    """Parse arguments, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192, help="length of the longest text (default 8192)")
    parser.add_argument("--texts", type=int, default=3, help="number of texts for perplexity (default 3)")
    parser.add_argument("--needles", type=int, default=4096, help="length of the longest text with a needle")
    arguments = parser.parse_args()
    path = assets.smollm2()
    tokenizer = AutoTokenizer.from_pretrained(path)
    texts = heldout_tokens(assets.wikipedia("heldout"), tokenizer, arguments.texts, arguments.tokens)
    lengths = [length for length in LENGTHS if length <= min(arguments.tokens, arguments.needles)]
    models = {None: AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)}
    models[0] = AutoModelForCausalLM.from_pretrained(compressed(), dtype=torch.bfloat16)
    rows: dict[str, Any] = {}
    for name, bits in CACHES.items():
        model = models[None if bits is None else 0].eval()
        rows[name] = {
            "perplexity": by_position(model, texts, bits),
            "needles": needles(model, tokenizer, texts[:1], bits, lengths),
        }
        print(name, rows[name], flush=True)
    write_result(
        "kv_quality",
        {"texts": list(texts.shape), "lengths": lengths, "needles": len(NEEDLES) * len(DEPTHS), "rows": rows},
    )


if __name__ == "__main__":
    main()
