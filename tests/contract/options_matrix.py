"""What the contract test needs to know of each method: small options, and the plain baseline it must not fall behind.

A new method adds a line; a registered method without one fails the contract test.
"""

from typing import Any

from hf_lowbit import ARBConfig

# method -> options that make a small layer quick to compress, several sets to cover the method's forms
OPTIONS: dict[str, list[dict[str, Any]]] = {
    "adasvd": [
        {},
        {"ratio": 0.4, "iterations": 0},
        {"ratio": 0.6, "init": "svd", "iterations": 3},
        {"ratio": 0.5, "rank_multiple": 4, "factor_dtype": "float32"},
        {"factors": "int8", "factor_group": 0},
        {"factors": "int4", "factor_group": 32},
        {"factors": ARBConfig(iterations=4, quantiles=9, max_salient_per_block=4)},
    ],
    "arb": [
        {"variant": variant, "iterations": 4, "x_iterations": 4, "quantiles": 9, "max_salient_per_block": 12}
        for variant in ("rc", "x", "arb", "billm", "rtn")
    ],
    "condiquant": [
        {"cond_steps": 3, "dobi_candidates": 10, **form}
        for form in (
            {},
            {"weight_bits": 2, "act_bits": 2, "cond_strength": 0.03},
            {"weight_bits": 3, "act_mode": "dynamic", "regularizer": "top"},
            {"weight_bits": 8, "act_bits": 8, "regularizer": "clip"},
            {"weight_bits": 2, "act_bits": 4, "bound_search": "percentile"},
            {"weight_bits": 3, "act_mode": "none", "cond_strength": 0, "search_sides": "two"},
        )
    ],
    "dvd_quant": [
        {"layers": "all", **form}
        for form in (
            {},
            {"preset": "paper"},
            {"preset": "w4a8", "w_bits": 3, "group_size": 32, "scale_dtype": "float32"},
            {"preset": "w4a4", "rotation_signs_seed": 1, "act_scale": "token", "rotation_block": 32},
            {"act_scale": "channel", "w_bits": 8, "group_size": -1, "weight_init": "pbq", "refine": "full"},
            {"act_scale": "channel_token", "w_bits": 2, "rotation": "none", "beta": 1.0, "n_bounds": 8, "iters": 3},
            {"a_bits": 16, "delta": None, "act_group_size": 32, "scale_dtype": "bfloat16", "tol": 0.01},
        )
    ],
    "pbs2p": [
        {"iterations": 4, "quantiles": 9, "max_salient_per_block": 12, **form}
        for form in (
            {},
            {"n": 6},
            {"n": 8},
            {"n": 2, "m": 4, "groups": "none", "scale_dtype": "bfloat16"},
            {"n": 5, "groups": "billm", "solver": "alternating", "stepwise": False, "score": "wanda"},
            {"n": 11, "m": 16, "fit": "arb"},
            {"n": 3, "m": 5, "block_size": 160, "refresh_signs": False, "score": "magnitude"},
        )
    ],
}

# the same for methods of unit "attention", whose contract is in test_attention_contract.py
ATTENTION: dict[str, list[dict[str, Any]]] = {
    "recalkv": [
        {"rank_multiple": 1},
        {"rank_multiple": 1, "key_group_size": 2, "grouping": "cka", "ocmf": "sequential", "ocmf_for": "both"},
        {"rank_multiple": 2, "key_group_size": 2, "value_group_size": 2, "ratio": 0.4, "factor_dtype": "float32"},
        {"rank_multiple": 1, "key_group_size": 3, "ragged_groups": True, "latent_bits": 4},
        {"rank_multiple": 1, "ocmf": "cross", "ratio": 0.3},
    ],
}

# methods of unit "pipeline", which compress no weights; their contract is in tests/hf/test_quantcache_pipelines.py
PIPELINE = {"quantcache"}

# methods of unit "conv2d", which are trained; their contract is in tests/hf/test_convs.py
CONV = {"bidrn"}

# method -> options of the plain baseline of its kind
BASELINE: dict[str, dict[str, Any]] = {
    "adasvd": {"init": "svd", "iterations": 0},
    "arb": {"variant": "rtn"},
    "condiquant": {"bound_search": "minmax", "cond_strength": 0},
    "dvd_quant": {"weight_init": "minmax", "rotation": "none", "balance": "none"},
    "pbs2p": {"fit": "plain", "groups": "none", "compensation": "none"},
}
# method -> options that the baseline shares with what it is compared with, such as the size
SHARED: dict[str, tuple[str, ...]] = {
    "adasvd": ("ratio", "rank_multiple", "factors", "factor_group"),
    "condiquant": ("weight_bits", "act_bits", "act_mode"),
    "dvd_quant": ("w_bits", "group_size", "scale_dtype", "preset"),
}

# formats whose reference multiplies by the dense weight, rounded once, as the dequantized layer does
REBUILT = ("binary",)
