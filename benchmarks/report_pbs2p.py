"""Tables of PBS²P for ``benchmarks.report``: what was measured beside the figures known before, and the paper's."""

from __future__ import annotations

import json
from typing import Any

from benchmarks.common import RESULTS, read_results
from benchmarks.tables import number, table

# Perplexity of LLaMA-7B on WikiText2 and "W-bits" as the paper counts them: arXiv 2502.01705, Table 1.
PUBLISHED = {
    "dense-32x512": ("16", "5.68"),
    "billm-32x512": ("1.11", "49.79"),
    "rc-cgb-32x512": ("1.11", "14.03"),
    "pbs2p-6of8": ("0.80", "7.36"),
    "pbs2p-5of8": ("0.70", "8.09"),
    "pbs2p-4of8": ("0.55", "10.78"),
}
# result file without its suffix -> name in the table
END_TO_END = {
    "dense": "dense bfloat16",
    "billm": "BiLLM-style baseline",
    "rc-cgb": "ARB-LLM_RC",
    "x-cgb": 'ARB-LLM_X (`variant="x"`)',
    "pbs2p-8of8": "PBS²P 8:8 (nothing pruned)",
    "pbs2p-6of8": "**PBS²P 6:8**",
    "pbs2p-6of8-uniform": "PBS²P 6:8, the same N everywhere",
    "pbs2p-5of8": "**PBS²P 5:8**",
    "pbs2p-5of8-uniform": "PBS²P 5:8, the same N everywhere",
    "pbs2p-4of8": "**PBS²P 4:8** (default)",
    "pbs2p-4of8-uniform": "PBS²P 4:8, the same N everywhere",
    "pbs2p-4of8-one-group": "PBS²P 4:8, one group",
}
SUFFIX = "-32x512"
# Known before: same protocol on another text of the kind (perplexity of the dense model about 20); relative errors of
# outputs: mean over the layers, then 8:8, 6:8, 5:8, 4:8 of the synthetic layer, then layers of block 15.
KNOWN_QUICK: dict[str, tuple[float, float | None]] = {
    "dense": (20.0, None),
    "ARB-LLM_RC": (115.5, 0.0488),
    "ARB-LLM_X": (100.5, 0.0534),
    "PBS²P 6:8, uniform": (67.3, 0.0393),
    "PBS²P 4:8, uniform": (95.6, 0.0495),
    "PBS²P 4:8": (94.6, None),
    "PBS²P 4:8, one group": (4088.0, None),
}
KNOWN_SYNTHETIC = {
    "none, prune, then binarize": (0.538, 0.498, 0.484, 0.475),
    "none, prune, then ARB": (0.507, 0.484, 0.474, 0.462),
    "none, SPBO, signs fixed": (0.292, 0.258, 0.240, 0.225),
    "none, SPBO": (0.292, 0.188, 0.178, 0.171),
    "cgb, prune, then binarize": (0.141, 0.140, 0.139, 0.143),
    "cgb, prune, then ARB": (0.127, 0.124, 0.124, 0.128),
    "cgb, SPBO, signs fixed": (0.0710, 0.0661, 0.0657, 0.0682),
    "cgb, SPBO": (0.0710, 0.0641, 0.0633, 0.0659),
}
KINDS = ("q_proj", "k_proj", "gate_proj", "down_proj")
KNOWN_LAYERS: dict[tuple[str, str], tuple[float, ...]] = {
    ("none, prune, then binarize", "6:8"): (0.0919, 0.0773, 0.0866, 0.1824),
    ("none, SPBO", "6:8"): (0.0436, 0.0355, 0.0821, 0.1635),
    ("none, prune, then binarize", "4:8"): (0.0829, 0.0649, 0.0814, 0.1763),
    ("none, SPBO", "4:8"): (0.0404, 0.0326, 0.0749, 0.1514),
    ("cgb, prune, then binarize", "6:8"): (0.0163, 0.0125, 0.0353, 0.0812),
    ("cgb, prune, then ARB", "6:8"): (0.0132, 0.0099, 0.0287, 0.0626),
    ("cgb, SPBO", "6:8"): (0.0131, 0.0097, 0.0282, 0.0582),
    ("cgb, prune, then binarize", "4:8"): (0.0207, 0.0157, 0.0444, 0.0965),
    ("cgb, prune, then ARB", "4:8"): (0.0173, 0.0131, 0.0370, 0.0775),
    ("cgb, SPBO", "4:8"): (0.0170, 0.0129, 0.0365, 0.0723),
    ("ARB-LLM_RC", "8:8"): (0.0170, 0.0128, 0.0386, 0.0627),
}
NOT_YET = "Not measured yet."


def _part(name: str) -> dict[str, Any] | None:
    return read_results("quality_pbs2p").get(name)


def _title(groups_and_fit: str) -> str:
    groups, _, fit = groups_and_fit.partition(", ")
    return {"none": f"one group: {fit}", "cgb": f"four groups: {fit}"}.get(groups, groups_and_fit)


def _beside(found: float, known: float | None, digits: int = 4) -> str:
    return f"{found:.{digits}f}" + ("" if known is None else f" ({found / known - 1:+.1%})")


def end_to_end() -> str:
    """Return perplexity, stored bits and the paper's figures of every variant measured through the files."""
    results = read_results("quality")
    rows = []
    for stem, title in END_TO_END.items():
        result = results.get(stem + SUFFIX) or (results.get(stem) if stem == "dense" else None)
        if result is None:
            continue
        bits, published = PUBLISHED.get(stem, PUBLISHED.get(stem + SUFFIX, ("–", "–")))
        errors = result.get("errors") or {}
        error = sum(errors.values()) / len(errors) if errors else None
        rows.append(
            [
                title,
                number(result["perplexity"], 1),
                number(result.get("bits_per_weight", 16.0), 2),
                number(result["bytes"] / 1e6, 1),
                number(error, 4),
                bits,
                published,
            ]
        )
    header = ["SmolLM2-135M-Instruct", "perplexity", "stored bits per weight", "MB on disk", "output error"]
    return table([*header, "bits as the paper counts", "paper, LLaMA-7B"], rows)


def speed() -> str:
    """Return one sentence on how long a layer takes."""
    results = {stem: result for stem, result in read_results("quality").items() if "seconds_per_layer" in result}
    own = {stem: result for stem, result in results.items() if stem.startswith("pbs2p")}
    if not own:
        return NOT_YET
    seconds = sorted(result["seconds_per_layer"] for result in own.values())
    environment = next(iter(own.values()))["environment"]
    return (
        f"Fitting takes {seconds[0]:.1f} to {seconds[-1]:.1f} seconds per layer, of 0.5 million weights on average "
        f"({environment['cpu']}, {environment['threads']} thread, niced on a machine with other work)."
    )


def quick() -> str:
    """Return perplexities of the cheap protocol beside those known before."""
    result = _part("quick")
    if result is None:
        return NOT_YET
    variants = result["variants"]
    peer, known_peer = variants["ARB-LLM_RC"]["perplexity"], KNOWN_QUICK["ARB-LLM_RC"][0]
    rows = []
    for title, found in variants.items():
        perplexity, error = KNOWN_QUICK.get(title, (None, None))
        cells = [number(found["perplexity"], 1), number(perplexity, 1)]
        if title == "dense":
            rows.append([title, *cells, "–", "–", "16.00"])
            continue
        known = None if perplexity is None else perplexity / known_peer
        ratio = found["perplexity"] / peer
        near = ratio < 10  # collapsed models have no meaningful ratio
        cells += [_beside(ratio, known if near else None, 3 if near else 0), _beside(found["output_error"], error)]
        rows.append([title, *cells, number(found["bits_per_weight"], 2)])
    header = ["", "perplexity", "known", "× ARB-LLM_RC (from known)", "mean output error (from known)"]
    return table([*header, "stored bits per weight"], rows)


def synthetic() -> str:
    """Return errors of every fit on the synthetic layer, and how far they are from those known."""
    result = _part("synthetic")
    if result is None:
        return NOT_YET
    ratios = ("8:8", "6:8", "5:8", "4:8")
    rows = []
    for name, by_ratio in result["exact"].items():
        known = KNOWN_SYNTHETIC.get(name, (None,) * 4)
        cells = [_beside(by_ratio[r]["output_error"], k) for r, k in zip(ratios, known, strict=True)]
        rows.append([_title(name), *cells, f"{result['none'][name]['4:8']['output_error']:.4f}"])
    return table(["", *ratios, "4:8, no compensation"], rows)


def layers() -> str:
    """Return errors of layers of block 15 beside those known."""
    result = _part("layers")
    if result is None:
        return NOT_YET
    kinds = result["linears"]
    rows = []
    for (name, ratio), known in KNOWN_LAYERS.items():
        cells = [_beside(kinds[kind][name][ratio]["output_error"], k) for kind, k in zip(KINDS, known, strict=True)]
        bits = kinds[KINDS[0]][name][ratio]["bits_per_weight"]
        rows.append([_title(name), "–" if name.startswith("ARB") else ratio, *cells, f"{bits:.2f}"])
    return table(["", "N:M", *KINDS, "stored bits, q_proj"], rows)


def claim() -> str:
    """Return in how many matrices pruning lowers the output error below that of the same fit without pruning."""
    parts = {"synthetic layer": _part("synthetic"), "block 15": _part("layers")}
    if any(part is None for part in parts.values()):
        return NOT_YET
    matrices = [parts["synthetic layer"]["exact"], *parts["block 15"]["linears"].values()]  # type: ignore[index]
    rows = []
    for fit in ("none, SPBO, signs fixed", "none, SPBO", "cgb, SPBO, signs fixed", "cgb, SPBO"):
        cells = []
        for ratio in ("6:8", "5:8", "4:8"):
            quotients = [m[fit][ratio]["output_error"] / m[fit]["8:8"]["output_error"] for m in matrices]
            below = sum(quotient < 1 for quotient in quotients)
            cells.append(f"{below} of {len(quotients)} (× {min(quotients):.2f} to {max(quotients):.2f})")
        rows.append([_title(fit), *cells])
    return table(["output error below that of 8:8", "6:8", "5:8", "4:8"], rows)


def masks() -> str:
    """Return the table of the two ways to store a mask."""
    path = RESULTS / "nm_mask.json"
    if not path.exists():
        return NOT_YET
    result = json.loads(path.read_text())
    rows = []
    for case in result["cases"]:
        bits, times = case["bits_per_weight"], case["milliseconds"]
        cells = [f"{bits['bitmap']:.3f}", f"{bits['code']:.3f}", f"{case['bound']:.3f}", f"{case['layer_saved']:.0%}"]
        times_cells = [f"{times['bitmap']:.2f}", f"{times['code']:.2f}", f"{times['code'] / times['bitmap']:.1f}"]
        rows.append([f"{case['rows']} × {case['columns']}, {case['n']}:{case['m']}", *cells, *times_cells])
    header = ["", "bits: bitmap", "code", "bound", "of a layer", "ms to unpack: bitmap", "code", "ratio"]
    return table(header, rows)


TABLES = {
    "pbs2p-end-to-end": end_to_end,
    "pbs2p-speed": speed,
    "pbs2p-quick": quick,
    "pbs2p-synthetic": synthetic,
    "pbs2p-layers": layers,
    "pbs2p-claim": claim,
    "nm-masks": masks,
}
