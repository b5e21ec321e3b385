"""Compress a small real model to about a bit per weight, save it, load it back, measure it and let it write.

``python -m examples.demo`` fetches SmolLM2-135M-Instruct and Wikipedia text on first use, then compresses the model
three times: plain rounding to one bit, a baseline in the style of BiLLM, and ARB-LLM_RC. ``--fast`` only shows that
everything works: its figures are those of a run with hardly any data.
"""

import logging
import time
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.utils import logging as transformers_logging

import assets
from examples.common import console, figures, parsed, parser_of
from hf_lowbit import ARBConfig
from hf_lowbit.hf.save import save_model
from hf_lowbit.report.evaluate import heldout_tokens, perplexity
from hf_lowbit.report.inspect import inspect
from hf_lowbit.report.tables import error_text, kinds_of, mean, size_text

PROMPT = "The Romans built roads because"
QUICK = {"iterations": 1, "quantiles": 5, "max_salient_per_block": 5}


def configs(samples: int, sequence_length: int, fast: bool) -> dict[str, ARBConfig]:
    """Return the three runs by the name of their folder."""
    options: dict[str, Any] = {
        "calibration": assets.wikipedia("calibration"),
        "samples": samples,
        "sequence_length": sequence_length,
        **(QUICK if fast else {}),
    }
    return {
        "rounding": ARBConfig(variant="rtn", calibration=None),
        "billm": ARBConfig(variant="billm", **options),
        "arb-rc": ARBConfig(variant="rc", **options),
    }


def compress(dense: Path, config: ARBConfig, target: Path, probe: torch.Tensor) -> tuple[Any, dict[str, Any]]:
    """Compress, save, load from disk again; return the loaded model and what there is to say about it.

    Raises:
        RuntimeError: the loaded model does not give exactly the same logits.
    """
    began = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(dense, quantization_config=config)
    seconds = time.perf_counter() - began
    rows = model.hf_quantizer.report.rows
    with torch.inference_mode():
        before = model(probe).logits
    save_model(model, target, AutoTokenizer.from_pretrained(dense), rows, overwrite=True)
    del model
    loaded = AutoModelForCausalLM.from_pretrained(target)
    with torch.inference_mode():
        if not torch.equal(before, loaded(probe).logits):
            raise RuntimeError(f"{target.name}: the model changed on its way through the disk")
    return loaded, {"seconds": seconds, "rows": rows, "inspection": inspect(target)}


def continuation(model: Any, tokenizer: Any, count: int = 24) -> str:
    """Return what the model makes of :data:`PROMPT`, always taking the likeliest token."""
    inputs = tokenizer(PROMPT, return_tensors="pt")
    settings = GenerationConfig(max_new_tokens=count, do_sample=False, pad_token_id=tokenizer.eos_token_id)
    with torch.inference_mode():
        ids = model.generate(**inputs, generation_config=settings)[0]
    return " ".join(tokenizer.decode(ids, skip_special_tokens=True).split())


def result_table(results: dict[str, dict[str, Any]], dense_bytes: int, dense_perplexity: float) -> Table:
    """Return quality beside size, dense model first."""
    title = "held-out perplexity; bits per weight of the packed layers"
    table = figures(title, "model", "perplexity", "bits per weight", "on disk", "seconds")
    table.add_row("dense, bfloat16", f"{dense_perplexity:.2f}", "16", size_text(dense_bytes), "")
    titles = {"rounding": "plain 1-bit rounding", "billm": "BiLLM-style", "arb-rc": "ARB-LLM_RC"}
    for name, row in results.items():
        made = row["inspection"]
        numbers = (f"{row['perplexity']:,.2f}", f"{made.bits_per_weight:.3f}", size_text(made.total_bytes))
        table.add_row(titles[name], *numbers, f"{row['seconds']:.0f}")
    return table


def error_table(results: dict[str, dict[str, Any]]) -> Table:
    """Return mean squared relative errors of the outputs, by kind of layer; of the weights without calibration."""
    table = figures("mean error by kind of layer: of outputs, (of weights)", "layers", *results)
    errors: dict[str, dict[str, tuple[float | None, float | None]]] = {}
    for name, result in results.items():
        rows = {row["module"]: row for row in result["rows"]}
        for kind, modules in kinds_of(result["inspection"].modules).items():
            own = [rows[module.name] for module in modules]
            outputs, weights = (mean(row[key] for row in own) for key in ("output_error", "weight_error"))
            errors.setdefault(kind, {})[name] = (outputs, weights)
    for kind, by_name in errors.items():
        texts = [f"{error_text(outputs)} ({error_text(weights)})" for outputs, weights in by_name.values()]
        table.add_row(kind, *texts)
    return table


def main() -> None:
    """Run the demo."""
    parser = parser_of(__doc__, "outputs/demo", ("--fast", "few samples, few iterations: does it work at all?"))
    parser.add_argument("--samples", type=int, default=32, help="calibration sequences (default 32)")
    parser.add_argument("--sequence-length", type=int, default=512, help="tokens in each (default 512)")
    args = parsed(parser)
    samples, length = (4, 128) if args.fast else (args.samples, args.sequence_length)
    logging.basicConfig(level=logging.WARNING)
    logging.getLogger("assets").setLevel(logging.INFO)
    transformers_logging.disable_progress_bar()

    dense_path = assets.smollm2()
    tokenizer = AutoTokenizer.from_pretrained(dense_path)
    text = heldout_tokens(assets.wikipedia("heldout"), tokenizer, 2 if args.fast else 8, 128 if args.fast else 512)
    dense = AutoModelForCausalLM.from_pretrained(dense_path)
    dense_perplexity, dense_text = perplexity(dense, text), continuation(dense, tokenizer)
    del dense
    results: dict[str, dict[str, Any]] = {}
    for name, config in configs(samples, length, args.fast).items():
        console.print(f"[bold]{name}[/bold]")
        model, result = compress(dense_path, config, args.out / name, text[:1, :32])
        results[name] = {**result, "perplexity": perplexity(model, text)}
        if name == "arb-rc":
            written = continuation(model, tokenizer)
    dense_bytes = sum(file.stat().st_size for file in dense_path.iterdir())
    console.print("\nEvery model gave the same logits, bit for bit, before it was saved and after it was loaded.\n")
    console.print(result_table(results, dense_bytes, dense_perplexity), error_table(results))
    for name, words in (("dense", dense_text), ("ARB-LLM_RC", written)):
        console.print(f"\n[bold]{name}[/bold]: ", end="")
        console.print(words, markup=False)
    best = args.out / "arb-rc"
    console.print(f"\nThe compressed model lies in {best}. Next:", markup=False)
    console.print(
        f"  hf-lowbit inspect {best}\n  hf-lowbit generate {best} --prompt 'Why is the sky blue?'", markup=False
    )


if __name__ == "__main__":
    main()
