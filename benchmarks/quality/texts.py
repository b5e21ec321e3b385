"""How far errors of single layers depend on the text that gives the inputs: figures known before beside several texts.

    python -m benchmarks.quality.texts     # some minutes on one core
    python -m benchmarks.report            # renders the table

The known figures of AdaSVD and PBS²P are of 32 × 512 tokens of an English manual that is not to be had. Here the same
fits see other windows of Python's manual, Wikipedia and news.

Writes ``benchmarks/results/texts.json``.
"""

from __future__ import annotations

import argparse
from pydoc_data.topics import topics
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

import assets
from benchmarks.common import calibration_sequences, write_result
from benchmarks.quality.pbs2p import dense_statistics, fit_errors, manual
from hf_lowbit import ARBConfig, PBS2PConfig
from hf_lowbit.calibration.data import load_texts, sample_sequences, tokenize
from hf_lowbit.methods.adasvd.options import rank_of
from hf_lowbit.numerics import low_rank

SHARES = {"15.self_attn.q_proj": 0.8, "15.mlp.gate_proj": 0.8, "15.mlp.down_proj": 0.8, "28.self_attn.o_proj": 0.8}
BINARY = ("15.self_attn.q_proj", "15.self_attn.k_proj", "15.mlp.down_proj")
# name -> config, with the searches as they were for the known figures
FITS: dict[str, Any] = {
    "one group: prune, then binarize, 6:8": PBS2PConfig(n=6, groups="none", fit="plain"),
    "one group: SPBO, 6:8": PBS2PConfig(n=6, groups="none"),
    "four groups: SPBO, 6:8": PBS2PConfig(n=6, quantiles=21),
    "four groups: prune, then ARB, 6:8": PBS2PConfig(n=6, quantiles=21, fit="arb"),
    "ARB-LLM_RC": ARBConfig(quantiles=41),
}


def texts() -> dict[str, Tensor]:
    """Return (32, 512) token ids by name of the text."""
    tokenizer = AutoTokenizer.from_pretrained(assets.smollm2())
    whole = tokenize(list(topics.values()), tokenizer)
    found = {"manual, evenly spaced": manual(32)[0], "manual, from the start": whole[: 32 * 512].view(32, 512)}
    found["manual, to the end"] = whole[-32 * 512 :].view(32, 512)
    found["manual, drawn"] = sample_sequences(whole, 32, 512, seed=1)
    found["Wikipedia"] = calibration_sequences(tokenizer, 32, 512)
    found["news"] = sample_sequences(tokenize(load_texts(str(assets.news())), tokenizer), 32, 512, seed=0)
    return found


def _low_rank_errors(weight: Tensor, moment: Tensor, share: float) -> dict[str, float]:
    """Return relative output errors at one rank: of the plain decomposition and of whitened truncation."""
    weight, rank = weight.double(), rank_of((weight.shape[0], weight.shape[1]), share)
    whole = float(((weight @ moment) * weight).sum())
    starts = {"plain SVD": None, "whitened SVD": moment}
    return {
        name: low_rank.output_error(weight, moment, *low_rank.truncate(weight, metric, rank)) / whole
        for name, metric in starts.items()
    }


def measure() -> dict[str, Any]:
    """Return by layer and fit the relative output error on every text."""
    model = AutoModelForCausalLM.from_pretrained(assets.smollm2(), dtype=torch.float32)
    found: dict[str, dict[str, dict[str, float]]] = {}

    def add(layer: str, fit: str, text: str, error: float) -> None:
        found.setdefault(layer, {}).setdefault(fit, {})[text] = error

    for text, tokens in tqdm(texts().items(), unit="text"):
        stats, _ = dense_statistics(model, tokens, [15, 28])
        for layer, share in SHARES.items():
            own = stats[f"model.layers.{layer}"]
            weight = model.get_submodule(f"model.layers.{layer}").weight.detach()
            for fit, error in _low_rank_errors(weight, own.second_moment(torch.float64), share).items():
                add(layer, f"{fit}, {share}", text, error)
        for layer in BINARY:
            own = stats[f"model.layers.{layer}"]
            weight = model.get_submodule(f"model.layers.{layer}").weight.detach()
            for fit, config in FITS.items():
                add(layer, fit, text, fit_errors(weight, own.second_moment(), config)["output_error"])
    return {"errors": found}


def main() -> None:
    """Measure and write."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    with torch.no_grad():
        write_result("texts", measure())


if __name__ == "__main__":
    main()
