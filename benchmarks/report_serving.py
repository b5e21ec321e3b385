"""Tables of docs/serving.md: tokens and speeds that ``benchmarks.serving`` has measured."""

from __future__ import annotations

from typing import Any

from benchmarks.common import read_results
from benchmarks.tables import number, table

NOT_YET = "Not measured yet."
TITLES = {
    "dense": "dense",
    "arb": "ARB-LLM_RC (`binary`), few refinements",
    "pbs2p": "PBS²P (`binary`, N:M), two blocks",
    "adasvd": "AdaSVD (`low_rank`), two blocks",
    "adasvd-int8": "AdaSVD, INT8 factors, two blocks",
    "integer": "INT4 weights alone (`integer`)",
    "mixed": "recipe of all, two blocks",
}


def _agreed(result: dict[str, Any]) -> str:
    same = sum(row["same"] for row in result["prompts"])
    return f"{same} of {result['tokens'] * len(result['prompts'])}"


def _margin(result: dict[str, Any]) -> str:
    parted = [row["margin"] / row["deviation"] for row in result["prompts"] if "margin" in row]
    return f"{max(parted):.4f}" if parted else "–"


def _alone(result: dict[str, Any] | None, dtype: str) -> str:
    if result is None or dtype != result["dtype"]:
        return "–"
    return f"{sum(result['rounded'])} of {result['tokens'] * len(result['rounded'])}"


def tokens() -> str:
    """Return how many greedy tokens agree, up to where each prompt first parts."""
    found = {(r["model"], r["dtype"]): r for r in read_results("serving").values() if "prompts" in r}
    if not found:
        return NOT_YET
    rounding = {r["model"]: r for r in read_results("serving").values() if "rounded" in r}
    rows = [
        [
            TITLES[name],
            dtype,
            str(result["layers"].get("PackedLinearMethod", 0)),
            _agreed(result),
            _margin(result),
            _alone(rounding.get(name), dtype),
        ]
        for name in TITLES
        for dtype in ("float32", "bfloat16")
        if (result := found.get((name, dtype)))
    ]
    header = [
        "SmolLM2-135M",
        "dtype",
        "packed layers in vLLM",
        "tokens that agree",
        "largest margin where they part",
        "transformers alone",
    ]
    if not rounding:
        header, rows = header[:-1], [row[:-1] for row in rows]
    note = (
        "Four prompts, continued greedily by vLLM together and by transformers one by one; "
        "`python -m benchmarks.serving --part tokens`. Tokens count until the first that differs; the margin is the "
        "difference of the two logits there, in standard deviations of all logits."
    )
    if rounding:
        note += (
            " The last column compares transformers with itself: how many tokens it writes in bfloat16 as in float32."
        )
    return f"{table(header, rows)}\n\n{note}"


def speed() -> str:
    """Return tokens per second of packed models in both libraries, and ratios within the turns."""
    found = {r["model"]: r for r in read_results("serving").values() if "turns" in r}
    if not found:
        return NOT_YET
    rows = [
        [
            TITLES[name],
            str(row["batch"]),
            number(row["tokens_per_second"][f"{name} vllm"], 1),
            number(row["tokens_per_second"][f"{name} transformers"], 1),
            f"{row['vllm_to_transformers']:.2f} ×",
            f"{row['dense_vllm_to_transformers']:.2f} ×",
            f"{row['packed_to_dense_vllm']:.2f} ×",
            f"{row['packed_to_dense_transformers']:.2f} ×",
        ]
        for name in TITLES
        if name in found
        for row in found[name]["rows"]
    ]
    header = [
        "SmolLM2-135M",
        "requests",
        "vLLM, tokens/s",
        "transformers, tokens/s",
        "vLLM : transformers",
        "the same, dense",
        "packed : dense in vLLM",
        "packed : dense in transformers",
    ]
    first = next(iter(found.values()))
    place = first["environment"]
    note = (
        f"{first['dtype']}, eager, one thread of {place['cpu']}, {first['tokens']} tokens a request, other work "
        f"on the machine; medians of {first['turns']} turns in which all four took one after the other, ratios within "
        f"a turn; `{place['command']}` and so for each model."
    )
    return f"{table(header, rows)}\n\n{note}"


TABLES = {"serving-tokens": tokens, "serving-speed": speed}
