"""Tables of AdaSVD for ``benchmarks.report``: what was measured beside the figures known before, and the paper's."""

from __future__ import annotations

import json
from typing import Any

from benchmarks.common import RESULTS, read_results
from benchmarks.tables import number, table

RATIOS = ("0.8", "0.6", "0.4")
# Perplexity of LLaMA2-7B on WikiText2 at 0.6 and 0.4: arXiv 2502.01403, Table 1 (SVD, SVD-LLM, AdaSVD).
PUBLISHED = {
    "plain SVD": (None, 39661.0, 65187.0),
    "whitened SVD": (None, 16.11, 89.90),
    "whitened SVD, adaCR": (None, 14.76, 50.33),
}
# Known before: the same protocol, on another text of the kind (perplexity of the dense model 20.07).
KNOWN = {
    "plain SVD": (4.9e6, None, None),
    "whitened SVD": (39.3, 77.8, 239.8),
    "whitened SVD, adaCR": (33.2, 55.1, 140.2),
    "whitened SVD, adaCR with cos": (None, 99.5, None),
}
# Output errors of layers known before: plain, whitened, adaComp from plain with 1 and 15 rounds.
KNOWN_LAYERS: dict[str, tuple[tuple[float, ...], ...]] = {
    "15.self_attn.q_proj": (
        (0.01850, 0.00342, 0.00371, 0.00342),
        (0.03684, 0.00720, 0.00779, 0.00722),
        (0.06421, 0.01532, 0.01656, 0.01534),
    ),
    "15.mlp.gate_proj": (
        (0.06559, 0.01564, 0.01782, 0.01568),
        (0.10895, 0.03036, 0.03438, 0.03042),
        (0.16685, 0.05614, 0.06295, 0.05621),
    ),
    "15.mlp.down_proj": ((0.17606, 0.04384, 0.05266, 0.04393), (0.28217, 0.08706, 0.10588, 0.08723)),
    "28.self_attn.o_proj": (
        (0.05204, 0.00590, 0.00675, 0.00591),
        (0.09428, 0.01298, 0.01495, 0.01299),
        (0.16091, 0.02811, 0.03250, 0.02815),
    ),
}
# Runs in which compressed layers feed the next ones.
IN_SEQUENCE = {
    "blocks, uniform": "block by block, own outputs, uniform",
    "blocks, adaCR": "block by block, own outputs, adaCR",
    "layers, adaCR": "layer by layer, own outputs, adaCR",
    "blocks, half way, adaCR": "block by block, half way to the dense outputs, adaCR",
    "layers, half way, uniform": "layer by layer, half way to the dense outputs, uniform",
    "layers, half way, adaCR": "**layer by layer, half way to the dense outputs, adaCR (default)**",
    "64 samples": "the default with 64 sequences for calibration",
    "all the way": "the default, all the way to the dense outputs",
}
# Runs with the default options but for how factors are held.
HELD = {
    "layers, half way, adaCR": "bfloat16",
    "int8": 'integers of 8 bits (`factors="int8"`)',
    "int4": 'integers of 4 bits (`factors="int4"`)',
    "signs": "signs (`factors=ARBConfig()`)",
}
NOT_YET = "Not measured yet."


def _part(name: str) -> dict[str, Any] | None:
    return read_results("quality_adasvd").get(name)


def perplexities() -> str:
    """Return perplexities by ratio: fitted to the dense model, then in sequence; known ones and the paper's beside."""
    result, runs = _part("quick"), (_part("sequential") or {}).get("runs", {})
    if result is None:
        return NOT_YET
    variants = result["variants"]
    rows = [["dense", *[number(variants["dense"]["perplexity"], 1)] * 3, "20.1", "5.68"]]
    for title in dict.fromkeys(key.partition(", ")[2] for key in variants if ", " in key):
        found = [variants.get(f"{ratio}, {title}", {}).get("perplexity") for ratio in RATIOS]
        known, paper = KNOWN.get(title, (None,) * 3), PUBLISHED.get(title, (None,) * 3)
        rows.append([title, *(number(p, 1) for p in found), _joined(known), _joined(paper[1:])])
    for way, title in IN_SEQUENCE.items():
        found = [runs.get(f"{ratio}, {way}", {}).get("perplexity") for ratio in RATIOS]
        if any(found):
            rows.append([title, *(number(p, 1) for p in found), "–", "–"])
    header = ["kept", *RATIOS, "known: 0.8, 0.6, 0.4", "paper, LLaMA2-7B: 0.6, 0.4"]
    return table(header, rows)


def _joined(figures: tuple[float | None, ...]) -> str:
    return ", ".join(number(figure, 1) for figure in figures) if any(figures) else "–"


def budget() -> str:
    """Return one sentence on the shares that were really kept, and the time of a run."""
    result, runs = _part("quick"), (_part("sequential") or {}).get("runs", {})
    if result is None:
        return NOT_YET
    lines = []
    for ratio in RATIOS:
        shares = [result["variants"][f"{ratio}, {title}"]["kept"] for title in ("whitened SVD", "whitened SVD, adaCR")]
        lines.append(f"{shares[0]:.2%} and {shares[1]:.2%} at {ratio}")
    text = f"Really kept, uniform and with adaCR: {'; '.join(lines)}."
    if runs:
        minutes = sorted({f"{run['seconds'] / 60:.1f}" for run in runs.values()}, key=float)
        environment = (_part("sequential") or {})["environment"]
        text += (
            f" A run takes {' to '.join(dict.fromkeys((minutes[0], minutes[-1])))} minutes ({environment['cpu']}, "
            f"{environment['threads']} thread, niced on a machine with other work)."
        )
    return text


def held() -> str:
    """Return perplexity and bytes of models whose factors are held in different ways."""
    runs = (_part("sequential") or {}).get("runs", {})
    rows = []
    for name, title in HELD.items():
        run = runs.get(f"0.6, {name}")
        if run is not None:
            share = run["bytes"] / (2 * run["weights"])
            cells = [number(run["perplexity"], 1), f"{run['output_error']:.4f}", f"{16 * share:.2f}"]
            rows.append([title, *cells, f"{run['bytes'] / 1e6:.1f}"])
    header = ["factors, kept 0.6", "perplexity", "output error", "bits per weight of the layers", "MB of the layers"]
    return table(header, rows) if rows else NOT_YET


def layers() -> str:
    """Return output errors of layers, and how far they are from those known."""
    result = _part("layers")
    if result is None:
        return NOT_YET
    rows = []
    for layer, by_ratio in result["layers"].items():
        for at, ratio in enumerate(RATIOS):
            row = by_ratio[ratio]
            known = KNOWN_LAYERS[layer][at] if at < len(KNOWN_LAYERS[layer]) else (None,) * 4
            cells = [
                f"{row[key]:.5f}" + (f" ({row[key] / k - 1:+.1%})" if k else "")
                for key, k in zip(("plain", "whitened", "plain, 1", "plain, 15"), known, strict=True)
            ]
            rows.append(
                [f"{layer}, {ratio}", str(row["rank"]), *cells, f"{row['whitened, 15'] / row['whitened']:.6f}"]
            )
    header = ["layer, kept", "rank", "plain SVD", "whitened", "adaComp from plain, 1 round", "15 rounds"]
    return table([*header, "adaComp from whitened, × whitened"], rows)


def texts() -> str:
    """Return how far the errors of layers are from those known, by text: plain and whitened truncation."""
    result, own = _part("guard"), _part("layers")
    if result is None or own is None:
        return NOT_YET
    errors, rows = result["by_text"], []
    for layer, by_ratio in own["layers"].items():
        for ratio, row in by_ratio.items():
            for start in ("plain", "whitened"):
                case = f"{layer}, {ratio}, {start}"
                errors[case] = {"windows of the table above": row[start], **errors[case]}
    kinds = list(next(iter(errors.values())))
    distances: dict[str, list[float]] = {layer: [] for layer in KNOWN_LAYERS}
    for layer, known in KNOWN_LAYERS.items():
        for ratio, (plain, whitened, *_) in zip(RATIOS, known, strict=False):
            pairs = [
                (errors[f"{layer}, {ratio}, {start}"], k) for start, k in (("plain", plain), ("whitened", whitened))
            ]
            cells = [", ".join(f"{found[kind] / k - 1:+.1%}" for found, k in pairs) for kind in kinds]
            distances[layer] += [abs(found[kinds[0]] / k - 1) for found, k in pairs]
            rows.append([f"{layer}, {ratio}", f"{plain:.5f}, {whitened:.5f}", *cells])
    far = ", ".join(f"{layer} (up to {max(found):.1%})" for layer, found in distances.items() if max(found) > 0.05)
    return table(["layer, kept", "known: plain, whitened", *kinds], rows) + (
        f"\n\nOn the windows of the table above all are within 5 % of the known figures but those of {far or 'none'}."
    )


def guard() -> str:
    """Return errors on tokens that were not calibrated on, and what holding some out to choose by would change."""
    result = _part("guard")
    if result is None:
        return NOT_YET
    errors = result["errors"]
    titles = ("plain", "plain, 1 round", "plain, 3 rounds", "whitened", "guarded")
    rows = []
    for case, found in errors.items():
        layer, ratio, size = case.split(", ")
        if ratio == "0.6":
            cells = [f"{found[title]:.5f}" for title in titles]
            rows.append([f"{layer}, {size} × 512", *cells, found["guard chose"]])
    header = ["kept 0.6, calibrated on", *titles[:3], "whitened (what a run keeps)", "with a guard", "which chose"]
    changes = sorted(found["guarded"] / found["whitened"] - 1 for found in errors.values())
    other = sum(found["guard chose"] != "whitened" for found in errors.values())
    worse = sum(min(found[title] for title in titles[:3]) < found["whitened"] for found in errors.values())
    return table(header, rows) + (
        f"\n\nOf {len(errors)} cases (three ratios) another candidate than the one kept is better on those tokens in "
        f"{worse}, and a guard chooses another in {other}. What it holds out is lost to the fit: errors change by "
        f"{changes[0]:+.1%} to {changes[-1]:+.1%}, in the median {changes[len(changes) // 2]:+.1%}."
    )


def adapters() -> str:
    """Return perplexities with and without an adapter of what was left out."""
    result = _part("adapters")
    if result is None:
        return NOT_YET
    numbers, rank = result["numbers"], result["rank"]
    base, more = numbers["base"] / numbers["dense"], (numbers["base"] + numbers["adapter"]) / numbers["dense"]
    titles = {
        "dense": ("dense", 1.0, None),
        "without an adapter": (f"factors, kept {result['ratio']}", base, None),
        "adapter by outputs": (f"the same, adapter of rank {rank}, fitted to outputs (`--data`)", more, "outputs"),
        "adapter by weights": (f"the same, adapter of rank {rank}, fitted to weights", more, "weights"),
        "larger factors": (f"factors of a rank higher by {rank}, no adapter", more, None),
    }
    rows = []
    for key, (title, share, left) in titles.items():
        lost = "–" if left is None else f"{result['left'][left]:.1%} of the {left}"
        rows.append([title, f"{share:.1%}", number(result["perplexity"][key], 1), lost])
    return table(["model", "numbers kept", "perplexity", "still lost of what was lost"], rows)


def ratios() -> str:
    """Return the ratios that adaCR gives the blocks, drawn as bars."""
    result = _part("quick")
    if result is None:
        return NOT_YET
    plans = [result["variants"][f"{ratio}, whitened SVD, adaCR"]["ratios"] for ratio in RATIOS]
    lines = [f"block   1-cos   {'    '.join(f'kept at {ratio}'.ljust(26) for ratio in RATIOS)}".rstrip()]
    for i, (block, cosine) in enumerate(result["cosines"].items()):
        bars = [f"{plan[block]:.3f} {'█' * round(20 * plan[block])}".ljust(26) for plan in plans]
        lines.append(f"{i:5d}   {1 - cosine:.3f}   {'    '.join(bars)}".rstrip())
    return "```text\n" + "\n".join(lines) + "\n```"


def products() -> str:
    """Return times of single products."""
    path = RESULTS / "kernels_low_rank.json"
    if not path.exists():
        return NOT_YET
    result, rows = json.loads(path.read_text("utf-8")), []
    for case in result["cases"]:
        times = {way: found[1] for way, found in case["microseconds"].items()}
        held = "" if case["activations"] == case["factors"] else f" on {case['factors']}"
        name = (
            f"{case['rows']} × {case['columns']}, kept {case['ratio']}, {case['activations']}{held}, {case['batch']}"
        )
        ratios = (times["dense"] / times["ours"], times["two torch products"] / times["C++"])
        rows.append(
            [name, f"{times['ours']:,.0f}", case["kernel"]]
            + [f"{times[way]:,.0f}" for way in ("C++", "two torch products", "dense")]
            + [f"{ratio:.2f}" for ratio in ratios]
            + [f"{case['floor_microseconds'] / times['ours']:.0%}"]
        )
    header = ["shape, dtype, tokens", "µs: a layer", "kernel", "C++", "two torch products", "dense"]
    environment, rate = result["environment"], result["gigabytes_per_second"]
    where = f"{environment['cpu']}, {environment['threads']} thread(s), memory read at {rate} GB/s"
    return table([*header, "× dense", "torch / C++", "of byte floor"], rows) + f"\n\n{where}."


def decode() -> str:
    """Return one sentence on decoding."""
    result = _part("decode")
    if result is None:
        return NOT_YET
    faster = ", ".join(f"{result['times_dense'][ratio]:.2f} × at {ratio}" for ratio in RATIOS)
    environment = result["environment"]
    return (
        "Greedy decoding of SmolLM2-135M in bfloat16, all decoder linears in factors, beside the dense model in the "
        f"same run: {faster} ({environment['cpu']}, {environment['threads']} thread)."
    )


TABLES = {
    "adasvd-perplexity": perplexities,
    "adasvd-budget": budget,
    "adasvd-held": held,
    "adasvd-layers": layers,
    "adasvd-texts": texts,
    "adasvd-guard": guard,
    "adasvd-adapters": adapters,
    "adasvd-ratios": ratios,
    "adasvd-products": products,
    "adasvd-decode": decode,
}
