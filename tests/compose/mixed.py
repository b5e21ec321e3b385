"""Recipes that mix methods on a tiny model; used by the tests of this folder."""

import hf_lowbit  # noqa: F401 - registers with transformers
from hf_lowbit import AdaSVDConfig, ARBConfig, DVDQuantConfig, LowBitRecipe, PBS2PConfig, ReCalKVConfig, RunOptions
from tests.tiny import tokens

QUIET = RunOptions(progress=False, batch_size=4)
DATA = {"samples": 8, "sequence_length": 24}
FITS = {
    "iterations": 2,
    "quantiles": 5,
    "max_salient_per_block": 4,
}  # quick: the size of the search, not what is stored


def data(calibrated=True):
    """Options of a calibrated run, or of one without data."""
    return {"calibration": tokens(8), **DATA} if calibrated else {"calibration": None}


def everything(calibrated=True, **changes):
    """Every weight method and the cache in one model of three blocks, each way to hold low-rank factors among them."""
    own = data(calibrated)
    rules = {
        "*.self_attn": ReCalKVConfig(**own, rank_multiple=4, latent_bits=4),
        "layers.0.self_attn": AdaSVDConfig(**own, ratio=0.7, factors="int4", factor_group=16),
        "layers.0.mlp": PBS2PConfig(**own, **FITS, n=6),
        "layers.1.mlp.gate_proj": AdaSVDConfig(**own, ratio=0.7, factors=ARBConfig(**FITS)),
        "layers.1.mlp.up_proj": AdaSVDConfig(**own, ratio=0.7),
        "layers.1.mlp": PBS2PConfig(**own, **FITS, n=4),
        "layers.2.mlp.down_proj": DVDQuantConfig(layers="all", delta=None),
        "*": ARBConfig(**own, **FITS),
    }
    return LowBitRecipe({**rules, **changes}, run=QUIET)


# layer of the tiny Llama -> (method, how it is held)
HELD = {
    **{f"layers.{i}.self_attn.{part}": ("recalkv", "latent") for i in range(3) for part in ("k_proj", "v_proj")},
    **{f"layers.0.self_attn.{part}": ("adasvd", "low_rank of integer") for part in ("q_proj", "o_proj")},
    **{f"layers.0.mlp.{part}": ("pbs2p", "binary, 6:8") for part in ("gate_proj", "up_proj", "down_proj")},
    "layers.1.mlp.gate_proj": ("adasvd", "low_rank of binary"),
    "layers.1.mlp.up_proj": ("adasvd", "low_rank"),
    "layers.1.mlp.down_proj": ("pbs2p", "binary, 4:8"),
    "layers.2.mlp.down_proj": ("dvd_quant", "integer"),
    **{f"layers.{i}.self_attn.{part}": ("arb", "binary") for i in (1, 2) for part in ("q_proj", "o_proj")},
    **{f"layers.2.mlp.{part}": ("arb", "binary") for part in ("gate_proj", "up_proj")},
}
