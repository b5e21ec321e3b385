"""What the contract test needs to know of each method: small options, and the plain baseline it must not fall behind.

A new method adds a line; a registered method without one fails the contract test.
"""

from typing import Any

# method -> options that make a small layer quick to compress, several sets to cover the method's forms
OPTIONS: dict[str, list[dict[str, Any]]] = {
    "arb": [
        {"variant": variant, "iterations": 4, "x_iterations": 4, "quantiles": 9, "max_salient_per_block": 12}
        for variant in ("rc", "x", "arb", "billm", "rtn")
    ],
}

# method -> options of the plain baseline of its kind
BASELINE: dict[str, dict[str, Any]] = {"arb": {"variant": "rtn"}}
