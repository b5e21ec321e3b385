"""Tables of docs/serving.md: tokens and speeds that ``benchmarks.serving`` has measured."""

from __future__ import annotations

from typing import Any

from benchmarks.common import RESULTS, read_results
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


def tokens() -> str:
    """Return how many greedy tokens agree, up to where each prompt first parts."""
    found = {(r["model"], r["dtype"]): r for r in read_results("serving").values() if "prompts" in r}
    if not found:
        return NOT_YET
    rows = [
        [TITLES[name], dtype, str(result["layers"].get("PackedLinearMethod", 0)), _agreed(result), _margin(result)]
        for name in TITLES
        for dtype in ("float32", "bfloat16")
        if (result := found.get((name, dtype)))
    ]
    header = ["SmolLM2-135M", "dtype", "packed layers in vLLM", "tokens that agree", "largest margin where they part"]
    command = next(iter(found.values()))["environment"]["command"]
    note = (
        f"Four prompts, continued greedily by vLLM together and by transformers one by one; `{command}`. Tokens count "
        "until the first that differs; the margin is the difference of the two logits there, in standard deviations "
        "of all logits."
    )
    return f"{table(header, rows)}\n\n{note}"


def speed() -> str:
    """Return tokens per second in one run, dense and packed, in both libraries."""
    if not (RESULTS / "serving" / "speed.json").is_file():
        return "Speed has not been measured: `python -m benchmarks.serving --part speed` does it on an idle machine."
    result = read_results("serving")["speed"]
    dense = {row["batch"]: row["vllm"] for row in result["rows"] if row["model"] == "dense"}
    rows = [
        [
            TITLES[row["model"]],
            str(row["batch"]),
            number(row["vllm"], 1),
            number(row["transformers"], 1),
            f"{row['vllm'] / row['transformers']:.2f} ×",
            f"{row['vllm'] / dense[row['batch']]:.2f} ×" if row["batch"] in dense else "–",
        ]
        for row in result["rows"]
    ]
    header = ["SmolLM2-135M", "requests", "vLLM, tokens/s", "transformers, tokens/s", "vLLM : transformers"]
    place = result["environment"]
    note = f"{result['dtype']}, eager, one thread of {place['cpu']}; `{place['command']}`."
    return f"{table([*header, 'vLLM: packed : dense'], rows)}\n\n{note}"


TABLES = {"serving-tokens": tokens, "serving-speed": speed}
