"""Tables of ReCalKV for ``benchmarks.report``: what was measured beside the figures known before, and the paper's."""

from __future__ import annotations

import statistics
from typing import Any

from benchmarks.common import read_results
from benchmarks.tables import number, table

RATIOS = ("0.5", "0.4", "0.3")
NOT_YET = "Not measured yet."
# Known before: the same protocol on other windows of the same articles (perplexity of the dense model 18.99).
KNOWN_DENSE = 18.99
KNOWN: dict[str, tuple[float, float, float]] = {
    "A": (68552, 83075, 47771),
    "B": (31.41, 41.75, 67.07),
    "C": (33.58, 50.60, 76.17),
    "D": (30.05, 41.47, 57.55),
    "E": (31.76, 43.53, 59.64),
    "F": (27.45, 32.40, 40.56),
    "G": (26.60, 28.96, 36.24),
}
TITLES = {
    "A": "A plain SVD, keys and values in groups of heads {0, 1}, {2}",
    "B": "B whitened, the same groups (Palu-like)",
    "C": "C = B, key heads grouped by similarity (HSR)",
    "energy pairs": "key heads grouped by energy, else B",
    "D": "D = C, values in one group",
    "E": "E = D, values calibrated in sequence (OVC)",
    "F": "F keys and values in one group each",
    "G": "G = F, ranks by `fisher_uniform`",
    "energy ranks": "F, ranks by energy",
    "loss, uniform": "F, errors weighed by the loss",
    "loss, fisher_uniform": "G, errors weighed by the loss",
    "loss, pairs": "H with groups {0, 1}, {2}",
    "loss by head": "H, weighed for each head apart",
    "text": "H one group each, ranks by energy, both weighed by the loss on text as it is",
    "default": "**default**: H, on text in which passages return",
    "text, values in sequence": "H, values in sequence",
    "values crossed": "**default**, values crossed",
}
# Perplexity on WikiText2, arXiv 2505.24357, Table 1: dense, then Palu and ReCalKV at 50, 60 and 70 % compression.
PAPER = {
    "LLaMA-7B": (5.68, (6.27, 6.13), (7.08, 6.63), (8.42, 7.24)),
    "LLaMA-2-7B": (5.47, (6.02, 5.83), (6.81, 6.21), (8.62, 6.75)),
    "Mistral-7B-Instruct-v0.2 (GQA)": (5.94, (6.33, 6.30), (7.07, 6.81), (8.71, 8.08)),
    "LongChat-7B-v1.5": (7.61, (8.11, 7.89), (9.15, 8.14), (11.95, 9.01)),
}


def _figures(part: str) -> dict[str, Any]:
    return dict(read_results("quality_recalkv").get(part, {}).get("figures", {}))


def perplexities() -> str:
    """Return perplexities of all variants at three ratios, on six sequences and on 24; the known ones beside."""
    found = _figures("table")
    if "dense" not in found:
        return NOT_YET
    found |= {key: row for key, row in _figures("runs").items() if key.startswith("E, ")}
    dense = found["dense"]
    rows = [["dense", *[_both(dense)] * 3, number(KNOWN_DENSE, 1)]]
    for title, words in TITLES.items():
        figures = [found.get(f"{title}, {ratio}") for ratio in RATIOS]
        if any(figures):
            known = KNOWN.get(title)
            shown = ", ".join(number(figure, 1) for figure in known) if known else "–"
            rows.append([words, *map(_both, figures), shown])
    return table(["perplexity of SmolLM2-135M, cache kept", *RATIOS, "known: 0.5, 0.4, 0.3"], rows)


def _both(row: dict[str, Any] | None, digits: int = 1) -> str:
    if row is None:
        return "–"
    return f"{number(row['perplexity'], digits)} ({number(row['perplexity_24'], digits)})"


def summary() -> str:
    """Return what the default leaves of the perplexity beside the published form of the method, in one sentence."""
    found = _figures("table")
    if not {"dense", *(f"{title}, {ratio}" for title in ("G", "default") for ratio in RATIOS)} <= set(found):
        return NOT_YET
    dense = found["dense"]["perplexity"]

    def times(title: str) -> str:
        return ", ".join(f"{found[f'{title}, {ratio}']['perplexity'] / dense:.2f} ×" for ratio in RATIOS)

    before = ", ".join(f"{figure / KNOWN_DENSE:.2f} ×" for figure in KNOWN["G"])
    return (
        f"Times the perplexity of the dense model at 0.5, 0.4 and 0.3: {times('default')} by default; {times('G')} "
        f"with variant G, the best of those known before ({before} there); {times('B')} with the Palu-like one."
    )


def runs() -> str:
    """Return whole runs through files beside the same variant fitted to shared statistics."""
    found, shared = _figures("runs"), _figures("table")
    if not found:
        return NOT_YET
    rows = []
    for key, row in found.items():
        title, _, ratio = key.rpartition(", ")
        beside = shared.get(f"{title}, {ratio}")
        rows.append(
            [TITLES[title], ratio, _both(row), _both(beside), f"{row['kept']:.4f}", f"{row['seconds'] / 60:.1f}"]
        )
    header = ["whole run", "ratio", "perplexity", "from shared statistics", "kept", "minutes"]
    return table(header, rows)


def heads() -> str:
    """Return what groupings do on a model in which every query head has keys and values of its own."""
    found = _figures("heads")
    if "dense" not in found:
        return NOT_YET
    ratios = sorted({key.rpartition(", ")[2] for key in found if ", " in key}, reverse=True)
    rows = [["dense", *[_both(found["dense"], 3)] * len(ratios)]]
    for title in dict.fromkeys(key.rpartition(", ")[0] for key in found if ", " in key):
        rows.append([title, *(_both(found.get(f"{title}, {ratio}"), 3) for ratio in ratios)])
    return table(["perplexity of the 8-head model, cache kept", *ratios], rows)


def queries() -> str:
    """Return errors of groupings of nine query heads, means over the blocks measured."""
    found = _figures("queries")
    if not found:
        return NOT_YET
    rows = []
    for ratio in ("0.5", "0.3"):
        cells = [
            number(statistics.mean(row[ratio][way] for row in found.values()), 4)
            for way in ("contiguous", "cka", "energy", "best", "mean", "worst")
        ]
        rows.append([f"{ratio}, {len(found)} blocks", *cells])
    return table(["kept", "contiguous", "cka", "energy", "best of all 280", "mean of all", "worst of all"], rows)


def latents() -> str:
    """Return perplexity and bytes of latents in few bits."""
    found, shared = _figures("latents"), _figures("table")
    if not found:
        return NOT_YET
    rows = []
    for key, row in found.items():
        base = shared.get(f"{key.partition(', ')[0]}, 0.5", {})
        more = f"{row['perplexity'] / base['perplexity'] - 1:+.1%}" if base else "–"
        wide = f"{row['perplexity_24'] / base['perplexity_24'] - 1:+.1%}" if base else "–"
        held, dense = row["bytes_per_token"], row["dense_bytes_per_token"]
        rows.append([key.replace("text", "H"), _both(row), f"{more} ({wide})", f"{held:,}", f"{dense / held:.1f}"])
    header = [
        "variant, bits of a latent",
        "perplexity",
        "above 16 bits",
        "bytes per token",
        "fewer than dense 16 bits",
    ]
    return table(header, rows)


def elsewhere() -> str:
    """Return perplexities on text of another kind."""
    found = _figures("elsewhere")
    if "dense" not in found:
        return NOT_YET
    dense = found["dense"]["perplexity_24"]
    shown = [
        f"{TITLES[key.partition(', ')[0]].replace('**', '')}: {number(row['perplexity_24'], 1)} "
        f"({row['perplexity_24'] / dense:.2f} ×)"
        for key, row in found.items()
        if key != "dense"
    ]
    return f"On 24 × 512 tokens of news reports, 0.4 kept: dense {number(dense, 1)}; {'; '.join(shown)}."


def ranks() -> str:
    """Return the ranks that the default gives keys and values, drawn as bars."""
    found = _figures("table")
    rows = [found.get(f"default, {ratio}") for ratio in RATIOS]
    if not all(rows):
        return NOT_YET
    lines = [f"block   {''.join(f'keys, values at {ratio}'.ljust(46) for ratio in RATIOS)}".rstrip()]
    for i in range(len(rows[0]["ranks"]["key"])):  # type: ignore[index]
        cells = []
        for row in rows:
            key, value = (row["ranks"][part][i] for part in ("key", "value"))  # type: ignore[index]
            cells.append(f"{key:3d} {'█' * round(key / 12):16s} {value:3d} {'█' * round(value / 12):16s}".ljust(46))
        lines.append(f"{i:5d}   {''.join(cells)}".rstrip())
    return "```text\n" + "\n".join(lines) + "\n```"


def errors() -> str:
    """Return mean relative errors of the outputs of keys and of values."""
    found = _figures("table")
    rows = []
    for title in ("A", "B", "C", "energy pairs", "F", "G", "energy ranks", "text", "default"):
        figures = [found.get(f"{title}, {ratio}", {}).get("errors") for ratio in RATIOS]
        if any(figures):
            cells = [f"{row['key']:.3f}, {row['value']:.3f}" if row else "–" for row in figures]
            rows.append([TITLES[title], *cells])
    return table(["relative error of outputs: keys, values", *RATIOS], rows) if rows else NOT_YET


def paper() -> str:
    """Return the published table."""
    rows = []
    for model, (dense, *pairs) in PAPER.items():
        rows.append([model, number(dense, 2), *(f"{palu:.2f}, {ours:.2f}" for palu, ours in pairs)])
    return table(["paper, WikiText2: Palu, ReCalKV", "dense", *RATIOS], rows)


def singles() -> str:
    """Return what one change alone does."""
    found = _figures("singles")
    if not found:
        return NOT_YET
    beside = _figures("table").get("B, 0.4")
    rows = [["B", _both(beside)], *([title, _both(row)] for title, row in found.items())]
    return table(["one change to variant B", "perplexity"], rows)


TABLES = {
    "recalkv-singles": singles,
    "recalkv-perplexity": perplexities,
    "recalkv-summary": summary,
    "recalkv-runs": runs,
    "recalkv-heads": heads,
    "recalkv-queries": queries,
    "recalkv-latents": latents,
    "recalkv-elsewhere": elsewhere,
    "recalkv-ranks": ranks,
    "recalkv-errors": errors,
    "recalkv-paper": paper,
}
