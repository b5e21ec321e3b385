"""Read a long text with half the cache, or an eighth of it: bytes held and the text that follows, cache by cache.

``python -m examples.long_context`` fetches SmolLM2-135M-Instruct and Wikipedia text on first use, compresses the
projections of keys and values, reads one long article with the dense and the compressed model and lets both go on. The
cache of the article is then kept in a file and read back, which spares reading the article. ``--fast`` only shows that
everything works: few samples, a short text.
"""

import logging
import time
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

import assets
from examples.common import console, figures, parsed, parser_of
from hf_lowbit import ReCalKVConfig
from hf_lowbit.cache import ReCalKVCache, cache_bytes, load_cache, save_cache
from hf_lowbit.report.evaluate import heldout_tokens
from hf_lowbit.report.tables import size_text


def written(model: Any, tokenizer: Any, prompt: torch.Tensor, cache: Any = None) -> tuple[str, Any, float]:
    """Return what a model makes of a prompt, the cache that it then holds, and the seconds that took."""
    began = time.perf_counter()
    with torch.inference_mode():
        found = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            past_key_values=cache,
            max_new_tokens=24,
            do_sample=False,
            pad_token_id=tokenizer.eos_token_id,
            return_dict_in_generate=True,
        )
    text = " ".join(tokenizer.decode(found.sequences[0, prompt.shape[1] :], skip_special_tokens=True).split())
    return text, found.past_key_values, time.perf_counter() - began


def main() -> None:
    """Run the example."""
    quick = ("--fast", "few samples, a short text: does it work at all?")
    parser = parser_of(__doc__, "outputs/long_context", quick)
    parser.add_argument("--tokens", type=int, default=2048, help="length of the text (default 2048)")
    parser.add_argument("--ratio", type=float, default=0.5, help="share of the cache's width kept (default 0.5)")
    args = parsed(parser)
    logging.basicConfig(level=logging.WARNING)
    logging.getLogger("assets").setLevel(logging.INFO)
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()

    path = assets.smollm2()
    tokenizer = AutoTokenizer.from_pretrained(path)
    article = heldout_tokens(assets.wikipedia("heldout"), tokenizer, 1, 128 if args.fast else args.tokens)
    dense = AutoModelForCausalLM.from_pretrained(path)
    answers = {"dense": written(dense, tokenizer, article)}
    del dense

    # Latents of 4 bits are the model's own choice here, so its factors are rotated; other caches are for the asking.
    config = ReCalKVConfig(
        ratio=args.ratio,
        latent_bits=4,
        calibration=assets.wikipedia("calibration"),
        samples=4 if args.fast else 32,
        sequence_length=128 if args.fast else 512,
        gradient_samples=1 if args.fast else 16,
    )
    model = AutoModelForCausalLM.from_pretrained(path, quantization_config=config)
    answers["latents of 4 bits"] = written(model, tokenizer, article)  # nothing but the model has changed
    for name, bits in (("latents of 8 bits", 8), ("latents", None)):
        cache = ReCalKVCache.from_model(model, latent_bits=bits, recent_window=0)
        answers[name] = written(model, tokenizer, article, cache)

    title = f"cache after {article.shape[1]} tokens and 24 more"
    table = figures(title, "cache", "bytes held", "per token", "dense is larger by")
    before = cache_bytes(answers["dense"][1])["total"]
    for name, (_, cache, _) in answers.items():
        held, length = cache_bytes(cache)["total"], cache.get_seq_length()
        table.add_row(name, size_text(held), f"{held / length:,.0f}", f"{before / held:.2f}")
    console.print(table)
    for name, (text, _, _) in answers.items():
        console.print(f"\n[bold]{name}[/bold]: ", end="")
        console.print(text, markup=False)

    prefix = ReCalKVCache.from_model(model)
    with torch.inference_mode():
        model(article[:, :-1], past_key_values=prefix, logits_to_keep=1)
    file = args.out / "article.safetensors"
    save_cache(prefix, model, file)
    expected, _, seconds = written(model, tokenizer, article, prefix)
    again, _, _ = written(model, tokenizer, article, load_cache(model, file))
    if again != expected:
        raise RuntimeError("the cache changed on its way through the disk")
    console.print(f"\nThe article's cache is {size_text(file.stat().st_size)} in {file}. With it, the model took")
    console.print(
        f"{seconds:.1f} seconds to write 24 tokens, {answers['latents of 4 bits'][2]:.1f} without; the text that"
    )
    console.print("it wrote was the same with the cache from the file as with the one in memory.")


if __name__ == "__main__":
    main()
