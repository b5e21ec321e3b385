"""Example cards in ``model_cards/``: one per method, rendered by the package's template from the result files.

    python -m benchmarks.report     # rewrites them along with the tables

No figure is typed here: a card reads a result file and says which. What a file does not hold, its card leaves out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.common import ROOT, read_results
from hf_lowbit import (
    AdaSVDConfig,
    ARBConfig,
    CalibrationRecord,
    CondiQuantConfig,
    LowBitConfig,
    PBS2PConfig,
    ReCalKVConfig,
)
from hf_lowbit.hf.card import CardFields, Facts, ImageScores, ModelFacts, Scores, calibration_text
from hf_lowbit.hf.card_page import render

FIELDS = CardFields("HuggingFaceTB/SmolLM2-135M-Instruct", "apache-2.0", ("en",), pipeline_tag="text-generation")
DENSE = "SmolLM2-135M-Instruct"


def _facts(
    method: str,
    config: LowBitConfig,
    model: ModelFacts,
    scores: Scores | ImageScores,
    result: Mapping[str, Any],
    source: str,
) -> Facts:
    """Return the facts of a card; ``source`` names the result file and how it was made."""
    environment = result["environment"]
    packages = {"python": environment["python"], **environment["packages"]}
    run = {"devices": [environment["cpu"]], "threads": environment["threads"], "packages": packages}
    if "seconds" in result:
        run["seconds"] = result["seconds"]
    return Facts(
        repo=f"user/{DENSE}-{method}",
        fields=FIELDS,
        library="transformers",
        loader="AutoModelForCausalLM",
        tokenizer=str(FIELDS.base_model),
        methods=(method,),
        models=(model,),
        recipe=config.to_dict(),
        calibration=(calibration_text(config),),
        run=run,
        scores=scores,
        source="This is an example: there is no such repository. Its figures are those of benchmarks/results/"
        f"{source}. The dense weights are those of a 4-bit file that a package ships, so figures compare with each "
        "other, not with other people's.",
    )


def _of_a_run(method: str, config_class: Any, name: str) -> Facts | None:
    """Return the facts of a result of ``benchmarks.quality.run``."""
    results = read_results("quality")
    if name not in results or "dense" not in results:
        return None
    result, dense = results[name], results["dense"]
    samples, length = result["calibration"]
    record = CalibrationRecord("tokens", tokens=samples * length)
    config = config_class(**result["options"], calibration=record, samples=samples, sequence_length=length)
    model = ModelFacts(
        bits_per_weight=result["bits_per_weight"],
        total_bytes=result["bytes"],
        kinds=tuple((kind, None, None, error) for kind, error in result["errors"].items()),
    )
    rows = ((f"{DENSE}-{method}", result["perplexity"], result["bytes"], None), _dense(dense))
    scores = Scores("Wikipedia articles, none of them calibrated on", *result["heldout"], rows)
    source = f"quality/{name}.json (python -m benchmarks.quality.{method})"
    return _facts(method, config, model, scores, result, source)


def _dense(result: Mapping[str, Any]) -> tuple[str, float, int | None, float | None]:
    return (f"{DENSE}, bfloat16", result["perplexity"], result.get("bytes"), None)


def arb() -> Facts | None:
    """Return the facts of ARB-LLM with its default options."""
    return _of_a_run("arb", ARBConfig, "rc-cgb")


def pbs2p() -> Facts | None:
    """Return the facts of PBS²P that keeps 4 of 8."""
    return _of_a_run("pbs2p", PBS2PConfig, "pbs2p-4of8-32x512")


def adasvd() -> Facts | None:
    """Return the facts of AdaSVD that keeps 0.6 of the numbers, with its default options."""
    results = read_results("quality_adasvd")
    run = results.get("sequential", {}).get("runs", {}).get("0.6, layers, half way, adaCR")
    if run is None or "quick" not in results:
        return None
    config = AdaSVDConfig(
        ratio=0.6, calibration=CalibrationRecord("tokens", tokens=32 * 512), samples=32, sequence_length=512
    )
    model = ModelFacts(bits_per_weight=8 * run["bytes"] / run["weights"])
    rows = ((f"{DENSE}-adasvd", run["perplexity"], None, None), _dense(results["quick"]["variants"]["dense"]))
    scores = Scores("Python's language manual, other parts than those calibrated on", 8, 512, rows)
    result = {"environment": results["sequential"]["environment"], "seconds": run["seconds"]}
    source = "quality_adasvd/sequential.json and quick.json (python -m benchmarks.quality.adasvd)"
    return _facts("adasvd", config, model, scores, result, source)


def recalkv() -> Facts | None:
    """Return the facts of ReCalKV that keeps half of the cache, with its default options."""
    table = read_results("quality_recalkv").get("table")
    if table is None or not {"default, 0.5", "dense"} <= table["figures"].keys():
        return None
    found, dense = table["figures"]["default, 0.5"], table["figures"]["dense"]
    config = ReCalKVConfig(
        ratio=0.5, calibration=CalibrationRecord("tokens", tokens=32 * 512), samples=32, sequence_length=512
    )
    model = ModelFacts(cache={"kept": found["kept"]})
    rows = (
        (f"{DENSE}-recalkv", found["perplexity_24"], None, None),
        _dense({"perplexity": dense["perplexity_24"]}),
    )
    scores = Scores("Wikipedia articles, none of them calibrated on", 24, 512, rows)
    source = "quality_recalkv/table.json (python -m benchmarks.quality.recalkv --part table)"
    return _facts("recalkv", config, model, scores, table, source)


def condiquant() -> Facts | None:
    """Return the facts of CondiQuant at 2 bits, with its default options."""
    results, dense_name = read_results("quality_condiquant"), "swin2sr-small"
    if not {"w2-condiquant", "dense"} <= results.keys():
        return None
    run, dense = results["w2-condiquant"], results["dense"]
    config = CondiQuantConfig(
        weight_bits=2, act_bits=2, patch_size=32, calibration=CalibrationRecord("image folder", tokens=32 * 32 * 32),
        **run["options"],
    )  # fmt: skip
    model = ModelFacts(
        bits_per_weight=run["bits_per_weight"], total_bytes=run["bytes"], parameters=dense["parameters"]
    )
    rows = (
        (f"{dense_name}-condiquant", run["psnr"], run["ssim"], run["bytes"]),
        (f"{dense_name}, float32", dense["dense"]["psnr"], dense["dense"]["ssim"], dense["bytes"]),
        ("bicubic", dense["bicubic"]["psnr"], dense["bicubic"]["ssim"], None),
    )
    scores = ImageScores("128 × 128 pixels, none of them trained or calibrated on", 5, 2, rows)
    source = "quality_condiquant/w2-condiquant.json (python -m benchmarks.quality.condiquant)"
    return dataclasses.replace(
        _facts("condiquant", config, model, scores, run, source),
        repo=f"user/{dense_name}-condiquant",
        fields=CardFields(f"user/{dense_name}", "apache-2.0", pipeline_tag="image-to-image"),
        loader="AutoModelForImageToImage",
        source="This is an example: there are no such repositories. Its figures are those of benchmarks/results/"
        f"{source}; the dense model is trained by python -m assets swin2sr.",
    )


CARDS: dict[str, Callable[[], Facts | None]] = {
    "arb": arb,
    "pbs2p": pbs2p,
    "adasvd": adasvd,
    "recalkv": recalkv,
    "condiquant": condiquant,
}


def documents() -> dict[Path, str]:
    """Return the cards whose figures were measured, and what each should read."""
    found = {ROOT / "model_cards" / f"{name}.md": facts() for name, facts in CARDS.items()}
    return {path: render(facts) for path, facts in found.items() if facts is not None}
