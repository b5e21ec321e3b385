"""Long texts with a compressed cache: perplexity by position, and what is found again that stands far back.

    python -m benchmarks.kv.quality          # about half an hour on one idle core; less with --tokens 2048

SmolLM2-135M-Instruct, which was trained on 8192 positions, reads held-out Wikipedia articles in pieces of 512 tokens
with the cache that is measured; every row of a table uses the same texts. Needles are sentences with a name and a
number, put at a tenth, half and nine tenths of a text; at its end the sentence begins again, and the number counts as
found if the model's most likely tokens are all of its tokens. The model is compressed twice (32 × 512 tokens, half of
the cache's width, factors mixed for few bits), by default, where passages return in the sequences that gradients are
taken of, and with gradients of text as it is, and kept in the cache folder of ``assets``. Texts of 8192 tokens have
needles of one name.

Writes ``benchmarks/results/kv_quality.json``, row by row; what it holds already is not measured again.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.cache_utils import Cache, DynamicCache

import assets
from benchmarks.common import RESULTS, write_result
from hf_lowbit import ReCalKVCache, ReCalKVConfig, RunOptions
from hf_lowbit.hf.save import save_model
from hf_lowbit.report.evaluate import heldout_tokens

PIECE = 512
DEPTHS = (0.1, 0.5, 0.9)
NEEDLES = (("Tobermory", "48 16 93"), ("Lillesand", "70 25 61"))
LENGTHS = (512, 2048, 4096, 8192)  # of texts with a needle
_LONG = 8192  # from here on, needles of one name are enough: reading takes minutes
NEEDLE = "The secret number of {} is {}."
# what gradients are taken of -> options
MODELS: dict[str, dict[str, Any]] = {
    "returns": {},
    "plain": {"recall": 0.0, "gradient_length": 256},
}
# Reads in pieces with every cache: of which model, in how many bits; None is the dense model, and 0 for all bits.
CACHES: dict[str, tuple[str | None, int]] = {
    "dense": (None, 0),
    "latents": ("returns", 0),
    "latents, 4 bits": ("returns", 4),
    "latents, `recall=0`": ("plain", 0),
    "latents, 8 bits, `recall=0`": ("plain", 8),
    "latents, 4 bits, `recall=0`": ("plain", 4),
}


def compressed(kind: str) -> Path:
    """Return the folder of a compressed model, made at the first call."""

    def build(target: Path, work: Path) -> None:
        config = ReCalKVConfig(
            ratio=0.5,
            latent_bits=4,
            calibration=assets.wikipedia("calibration"),
            samples=32,
            sequence_length=512,
            run=RunOptions(progress=False),
            **MODELS[kind],
        )
        model = AutoModelForCausalLM.from_pretrained(
            assets.smollm2(), dtype=torch.bfloat16, quantization_config=config
        )
        save_model(model, work / "saved")
        target.rmdir()
        (work / "saved").rename(target)

    return assets.cached("smollm2-recalkv-1" if kind == "plain" else f"smollm2-recalkv-{kind}-1", None, build)


def made(model: Any, bits: int) -> Cache:
    """Return an empty cache for a model, dense or of latents; 0 bits keep them as they are."""
    if not getattr(model, "is_quantized", False):
        return DynamicCache(config=model.config)
    return ReCalKVCache.from_model(model, latent_bits=bits or None)


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


def by_position(model: Any, texts: Tensor, bits: int) -> list[float]:
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


def hidden(length: int) -> tuple[tuple[str, str], ...]:
    """Return names and numbers that are looked for in texts of a length, each at every depth."""
    return NEEDLES if length < _LONG else NEEDLES[:1]


def needles(model: Any, tokenizer: Any, text: Tensor, bits: int, length: int) -> float:
    """Return the share of needles that are found in a text of so many tokens."""
    found = [
        is_found(model, *haystack(tokenizer, text[:length], depth, needle), made(model, bits))
        for needle in hidden(length)
        for depth in DEPTHS
    ]
    return sum(found) / len(found)


def main() -> None:
    """Parse arguments, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096, help="length of the texts for perplexity (default 4096)")
    parser.add_argument("--texts", type=int, default=2, help="number of texts for perplexity (default 2)")
    parser.add_argument("--needles", nargs="+", type=int, choices=LENGTHS, default=LENGTHS, help="texts with a needle")
    parser.add_argument("--caches", nargs="+", choices=list(CACHES), default=list(CACHES), help="others keep figures")
    arguments = parser.parse_args()
    path = assets.smollm2()
    tokenizer = AutoTokenizer.from_pretrained(path)
    file = RESULTS / "kv_quality.json"
    result: dict[str, Any] = json.loads(file.read_text("utf-8")) if file.exists() else {"rows": {}}
    shape = [arguments.texts, arguments.tokens]
    if result.setdefault("texts", shape) != shape:
        raise SystemExit(f"{file} is of {result['texts']} texts and tokens, {shape} are asked for; remove it first")
    texts = heldout_tokens(assets.wikipedia("heldout"), tokenizer, *shape)
    far = heldout_tokens(assets.wikipedia("heldout"), tokenizer, 1, max(LENGTHS))[0]
    for name in arguments.caches:
        kind, bits = CACHES[name]
        row = result["rows"].setdefault(name, {"needles": {}})
        wanted = [length for length in arguments.needles if str(length) not in row["needles"]]
        if "perplexity" in row and not wanted:
            continue
        model = AutoModelForCausalLM.from_pretrained(path if kind is None else compressed(kind), dtype=torch.bfloat16)
        if "perplexity" not in row:
            row["perplexity"] = by_position(model.eval(), texts, bits)
            print(name, row["perplexity"], flush=True)
        for length in wanted:
            # a text of its own length, so that a figure does not depend on which others are measured
            row["needles"][str(length)] = needles(
                model, tokenizer, far if length > shape[1] else texts[0], bits, length
            )
            print(name, length, row["needles"][str(length)], flush=True)
            counts = {str(length): len(hidden(length)) * len(DEPTHS) for length in LENGTHS}
            result |= {"lengths": list(LENGTHS), "needles": counts}
            write_result("kv_quality", result)


if __name__ == "__main__":
    main()
