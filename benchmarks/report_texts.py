"""Table of ``benchmarks.quality.texts`` for ``benchmarks.report``: known errors beside those on several texts."""

from __future__ import annotations

import json

from benchmarks import report_adasvd, report_pbs2p
from benchmarks.common import RESULTS
from benchmarks.tables import table

# fit of the result file -> groups and fit, and N:M, of the known figures
_BINARY = {
    "one group: prune, then binarize, 6:8": ("none, prune, then binarize", "6:8"),
    "one group: SPBO, 6:8": ("none, SPBO", "6:8"),
    "four groups: SPBO, 6:8": ("cgb, SPBO", "6:8"),
    "four groups: prune, then ARB, 6:8": ("cgb, prune, then ARB", "6:8"),
    "ARB-LLM_RC": ("ARB-LLM_RC", "8:8"),
}
_LOW_RANK = {"plain SVD, 0.8": 0, "whitened SVD, 0.8": 1}


def _known(layer: str, fit: str) -> float | None:
    if fit in _LOW_RANK:
        return report_adasvd.KNOWN_LAYERS[layer][0][_LOW_RANK[fit]]
    kind = layer.rpartition(".")[2]
    return report_pbs2p.KNOWN_LAYERS[_BINARY[fit]][report_pbs2p.KINDS.index(kind)]


def texts() -> str:
    """Return for every layer and fit the known error and those on other texts, as distances from it."""
    path = RESULTS / "texts.json"
    if not path.exists():
        return "Not measured yet."
    rows = []
    for layer, fits in json.loads(path.read_text())["errors"].items():
        for fit, by_text in fits.items():
            known = _known(layer, fit)
            if known is None:
                continue
            low, high = min(by_text.values()), max(by_text.values())
            place = "within" if low <= known <= high else ("below" if known < low else "above")
            near = min(abs(error / known - 1) for error in by_text.values())
            cells = [f"{error / known - 1:+.1%}" for error in by_text.values()]
            rows.append([f"{layer}, {fit}", f"{known:.4f}", *cells, f"{place}, {near:.1%} from the nearest"])
            header = ["layer, fit", "known", *by_text, "the known figure"]
    return table(header, rows)


TABLES = {"texts": texts}
