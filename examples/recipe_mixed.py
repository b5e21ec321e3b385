"""Compress one model with several methods at once: one recipe, one set of files, and it comes back the same.

``python -m examples.recipe_mixed`` takes the real SmolLM2-135M-Instruct and Wikipedia articles: a cache of latents in
every attention, low-rank factors of 8 bits in the last blocks, signs in two layers of block 1, one of them pruned to
6 of 8, and integers of 4 bits elsewhere. It prints the plan, what each method holds, and perplexity beside the dense
model. ``--tiny`` takes a model of random weights: seconds, and no figure of meaning.
"""

import logging
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging as transformers_logging

import assets
from examples.common import console, figures, parsed, parser_of
from hf_lowbit import AdaSVDConfig, ARBConfig, DVDQuantConfig, LowBitRecipe, PBS2PConfig, ReCalKVConfig
from hf_lowbit.compress.targets import plan_run
from hf_lowbit.hf.save import save_model
from hf_lowbit.report.evaluate import heldout_tokens, perplexity
from hf_lowbit.report.inspect import inspect
from hf_lowbit.report.tables import shares_of, shares_table, size_text

PROMPT = "The capital of France is"


def recipe_for(blocks: int, data: dict[str, Any], **quick: Any) -> LowBitRecipe:
    """Return the recipe; the first pattern that matches a layer has it, so the special comes before the general.

    Args:
        blocks: of the model.
        data: options of calibration, which all rules share.
        quick: options that make the fits of signs shorter.
    """
    last = "|".join(f"layers.{i}.mlp" for i in range(blocks - max(1, blocks // 10), blocks))
    return LowBitRecipe(
        {
            "*.self_attn": ReCalKVConfig(**data, ratio=0.75),  # keys and values alone; the rules below have the rest
            last: AdaSVDConfig(**data, ratio=0.8, factors="int8"),
            f"layers.{blocks // 2}.mlp.gate_proj": PBS2PConfig(**data, n=6, **quick),
            f"layers.{blocks // 2}.mlp.up_proj": ARBConfig(**data, **quick),
            "*.cross_attn": ARBConfig(**data, **quick),  # this model has none; the same recipe serves those that do
            "*": DVDQuantConfig(preset="weights", layers="all", **data),  # integers of 4 bits
        },
        optional=["*.cross_attn"],
    )


def plan(dense: Path, recipe: LowBitRecipe) -> Table:
    """Return which rule gets which layers, decided without weights; a misspelt pattern is an error here already."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(dense))
    _, targets = plan_run(model, recipe, calibrated=True)
    table = Table(title="the plan: the first rule that matches a layer has it", title_justify="left")
    for name in ("rule", "method", "layers", "such as"):
        table.add_column(name, overflow="fold")
    for pattern, rule in recipe.rules:
        own = [name for name, config in targets.methods.items() if config is rule]
        table.add_row(pattern, rule.method, str(len(own)), own[0] if own else "none, which is allowed here")
    return table


def tiny_model(folder: Path) -> None:
    """Save a model of random weights, with the tokenizer of the real one, which tells its size."""
    torch.manual_seed(0)
    AutoTokenizer.from_pretrained(assets.smollm2()).save_pretrained(folder)
    sizes = {"vocab_size": 49152, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3}
    config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, bos_token_id=1, eos_token_id=2)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)


def written(model: Any, tokenizer: Any) -> str:
    """Return what the model makes of :data:`PROMPT`, always taking the likeliest token."""
    inputs = tokenizer(PROMPT, return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=16, do_sample=False, pad_token_id=tokenizer.eos_token_id)[0]
    return " ".join(tokenizer.decode(ids, skip_special_tokens=True).split())


def main() -> None:
    """Compress, save, load, compare, measure.

    Raises:
        RuntimeError: the loaded model is not exactly the one that was saved.
    """
    parser = parser_of(__doc__, "outputs/recipe_mixed", ("--tiny", "a model of random weights and hardly any data"))
    parser.add_argument("--samples", type=int, default=32, help="calibration sequences of 512 tokens")
    arguments = parsed(parser)
    if arguments.samples < 4:
        parser.error(f"--samples must be at least 4, got {arguments.samples}")
    logging.getLogger("hf_lowbit").setLevel(logging.ERROR)
    transformers_logging.disable_progress_bar()
    dense_path = arguments.out / "dense" if arguments.tiny else assets.smollm2()
    if arguments.tiny:
        tiny_model(dense_path)
    tokenizer = AutoTokenizer.from_pretrained(dense_path)
    samples, length = (4, 32) if arguments.tiny else (arguments.samples, 512)
    data = {"calibration": assets.wikipedia("calibration"), "samples": samples, "sequence_length": length}
    quick = {"iterations": 1, "quantiles": 5} if arguments.tiny else {}
    dense = AutoModelForCausalLM.from_pretrained(dense_path)
    recipe = recipe_for(dense.config.num_hidden_layers, data, **quick)
    console.print(plan(dense_path, recipe))

    model = AutoModelForCausalLM.from_pretrained(dense_path, quantization_config=recipe)
    target = arguments.out / "packed"
    save_model(model, target, tokenizer, model.hf_quantizer.report.rows, overwrite=True)
    loaded = AutoModelForCausalLM.from_pretrained(target)  # checksums of every tensor are compared
    text = heldout_tokens(assets.wikipedia("heldout"), tokenizer, 2 if arguments.tiny else 24, length)
    with torch.inference_mode():
        same = torch.equal(model(text[:1]).logits, loaded(text[:1]).logits)
    if not same or written(model, tokenizer) != written(loaded, tokenizer):
        raise RuntimeError("the model changed on its way through the disk")
    console.print("the loaded model gives the same logits, bit for bit, and the same tokens")

    found = inspect(target)
    console.print(shares_table(shares_of(found)))
    title = f"held-out perplexity on {len(text)} x {length} tokens"
    table = figures(title, "model", "perplexity", "weight files", "bits per packed weight")
    weights = sum(file.stat().st_size for file in dense_path.glob("*.safetensors"))
    table.add_row("dense", f"{perplexity(dense, text, progress=False):.2f}", size_text(weights), "16.00")
    bits = f"{found.bits_per_weight:.2f}"
    stored = found.total_bytes - sum(found.other_files.values())
    table.add_row("mixed", f"{perplexity(loaded, text, progress=False):.2f}", size_text(stored), bits)
    console.print(table)
    console.print(f"dense: {written(dense, tokenizer)}")
    console.print(f"mixed: {written(loaded, tokenizer)}")


if __name__ == "__main__":
    main()
