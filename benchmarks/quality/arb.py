"""End-to-end quality of ARB-LLM on SmolLM2-135M: compress, save, load back, measure perplexity on held-out articles.

    python -m benchmarks.quality.arb                    # dense, rounding and all variants, about an hour on two cores
    python -m benchmarks.quality.arb --only rc-cgb --samples 32 --suffix=-32x512
    python -m benchmarks.report                         # renders the tables of README from the result files

Writes ``benchmarks/results/quality/<variant>.json``. Every variant goes through the files: what is measured is what a
user loads.
"""

from __future__ import annotations

from typing import Any

from benchmarks.quality.run import measure, parser, sequences, write
from hf_lowbit import ARBConfig

# name of the result -> options of ARBConfig; None is the dense model
VARIANTS: dict[str, dict[str, Any] | None] = {
    "dense": None,
    "rounding": {"variant": "rtn"},
    "billm": {"variant": "billm", "compensation": "reference"},
    "billm-exact": {"variant": "billm"},
    "arb": {"variant": "arb", "column_group_bitmap": False},
    "x": {"variant": "x", "column_group_bitmap": False},
    "x-cgb": {"variant": "x"},
    "rc": {"variant": "rc", "column_group_bitmap": False},
    "rc-cgb": {"variant": "rc"},
    "rc-cgb-reference": {"variant": "rc", "compensation": "reference"},
    "rc-cgb-3-iterations": {"variant": "rc", "iterations": 3},
}


def main() -> None:
    """Parse arguments, measure, write."""
    arguments = parser(__doc__, VARIANTS).parse_args()
    calibration, heldout = sequences(arguments)
    for name in arguments.only:
        options = VARIANTS[name]
        config = None
        if options is not None:
            config = ARBConfig(calibration=None if options["variant"] == "rtn" else calibration, **options)
        write(name, options, measure(config, calibration, heldout), arguments.suffix)


if __name__ == "__main__":
    main()
