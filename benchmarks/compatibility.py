"""Which methods work together in one model: every pair is tried on a tiny model of every kind.

    python -m benchmarks.compatibility            # try all and write the result file; some minutes
    python -m benchmarks.report                   # render docs/compatibility.md from it

A pair works if a recipe with both compresses the model, each of them gets layers (or, for what skips steps, the
sampler), the files are sound, and the loaded model gives the same numbers, bit for bit. Otherwise what is noted is the
sentence with which the package has refused. Random weights: nothing here says how good a combination is.
"""

from __future__ import annotations

import argparse
import dataclasses
import dis
import logging
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from torch import Tensor

import hf_lowbit
from benchmarks.common import write_result
from hf_lowbit import LowBitConfig, LowBitRecipe, RunOptions, packed_modules, registry
from hf_lowbit.errors import HfLowbitError
from hf_lowbit.report.verify import verify

RESULT = "compatibility"
STEPS = 6
_QUIET = RunOptions(progress=False, batch_size=4)
_FITS = {"iterations": 2, "quantiles": 5, "max_salient_per_block": 4}  # quick searches; what is stored is the same


@dataclasses.dataclass(frozen=True)
class Host:
    """A kind of model that methods meet in.

    Attributes:
        name: of the kind.
        part: pattern of the layers that the first method of a pair gets; the second gets the others.
        attention: pattern of its attention, for a method that takes keys and values.
        build: returns the dense model.
        run: ``(model) -> numbers`` that must be the same after loading.
        load: ``(folder) -> model``.
        data: what calibration is there: "tokens", "images" or "none".
        only: of pairs only those with a method of this unit are tried; None for all. A convolutional network has one
            linear layer, which two methods cannot share.
    """

    name: str
    part: str
    attention: str
    build: Callable[[], Any]
    run: Callable[[Any], Tensor]
    load: Callable[[Path], Any]
    data: str
    only: str | None = None


def _seeded(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(7))


def _tokens() -> Tensor:
    return torch.randint(3, 128, (8, 24), generator=torch.Generator().manual_seed(7))


def _language_model() -> Any:
    sizes = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, pad_token_id=0)
    return transformers.LlamaForCausalLM(config)


def _write(model: Any) -> Tensor:
    """Logits, and tokens that were generated with the model's own cache."""
    logits = model(_tokens()[:2]).logits
    options = {"do_sample": False, "min_new_tokens": 6, "max_new_tokens": 6}
    written = model.generate(_tokens()[:2], attention_mask=torch.ones(2, 24, dtype=torch.long), **options)
    return torch.cat([logits.flatten(), written.flatten().float()])


def _video_transformer() -> Any:
    return diffusers.WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, text_dim=16, freq_dim=16, ffn_dim=32, in_channels=4,
        out_channels=4, num_layers=2, rope_max_seq_len=32,
    )  # fmt: skip


def _sample(model: Any) -> Tensor:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    pipe = diffusers.WanPipeline(tokenizer=None, text_encoder=None, vae=None, transformer=model, scheduler=scheduler)
    pipe.set_progress_bar_config(disable=True)
    text, noise = _seeded(1, 4, 16), _seeded(1, 4, 2, 8, 8)
    sizes = {"height": 64, "width": 64, "num_frames": 5, "guidance_scale": 2.0, "num_inference_steps": STEPS}
    found = pipe(prompt_embeds=text, negative_prompt_embeds=-text, latents=noise, output_type="latent", **sizes)
    return torch.as_tensor(found.frames)


def _super_resolution() -> Any:
    sizes = {"embed_dim": 32, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4, "image_size": 16}
    return transformers.Swin2SRForImageSuperResolution(
        transformers.Swin2SRConfig(**sizes, mlp_ratio=2.0, upscale=2, upsampler="pixelshuffledirect")
    )


def _enlarge(model: Any) -> Tensor:
    found: Tensor = model(_seeded(2, 3, 16, 16).sigmoid()).reconstruction
    return found


def _convolutions() -> Any:
    sizes = {"embedding_size": 16, "hidden_sizes": [32, 64], "depths": [2, 1], "num_labels": 5}
    return transformers.ResNetForImageClassification(transformers.ResNetConfig(layer_type="basic", **sizes))


def _classify(model: Any) -> Tensor:
    found: Tensor = model(_seeded(2, 3, 40, 40)).logits
    return found


HOSTS = (
    Host(
        "language model", "mlp", "self_attn", _language_model, _write,
        transformers.AutoModelForCausalLM.from_pretrained, "tokens",
    ),
    Host(
        "video transformer", "ffn", "attn1", _video_transformer, _sample,
        diffusers.WanTransformer3DModel.from_pretrained, "none",
    ),
    Host(
        "super-resolution model", "intermediate", "attention", _super_resolution, _enlarge,
        transformers.AutoModelForImageToImage.from_pretrained, "images",
    ),
    Host(
        "convolutional network", "encoder.stages.0", "encoder.stages.1", _convolutions, _classify,
        transformers.AutoModelForImageClassification.from_pretrained, "none", "conv2d",
    ),
)  # fmt: skip

# method -> further options that make it quick on tiny layers
OPTIONS: dict[str, dict[str, Any]] = {
    "adasvd": {"ratio": 0.6},
    "arb": _FITS,
    "bidrn": {},
    "condiquant": {"weight_bits": 4, "act_bits": 4, "cond_steps": 3, "dobi_candidates": 10},
    "dvd_quant": {"layers": "all"},
    "pbs2p": _FITS,
    "quantcache": {"num_inference_steps": STEPS, "intervals": (3, 3, 3), "deltas": (9.0, 9.0)},
    "recalkv": {"rank_multiple": 4},
}


def config_of(method: str, host: Host) -> LowBitConfig:
    """Return the config of a method for a kind of model, with the data that there is for such models."""
    record = registry.get(method)
    options = dict(OPTIONS[method])
    if record.needs == "tokens":
        own = {"calibration": _tokens(), "samples": 8, "sequence_length": 24}
        options |= own if host.data == "tokens" else {"calibration": None}
    elif record.needs == "images":
        known = host.data == "images"
        photos = [_seeded(3, 40, 40).sigmoid()]
        options |= {"calibration": photos, "samples": 4, "patch_size": 8} if known else {
            "calibration": None, "act_mode": "dynamic", "cond_strength": 0,
        }  # fmt: skip
    found: LowBitConfig = record.config(**options)
    return found


def recipe_of(methods: tuple[str, ...], host: Host) -> LowBitRecipe:
    """Return the recipe that gives one or two methods each a part of a model."""
    units = {name: registry.get(name).unit for name in methods}
    configs = {name: config_of(name, host) for name in methods}
    cache = next((configs[name] for name in methods if units[name] == "pipeline"), None)
    weights = [name for name in methods if units[name] != "pipeline"]
    if not weights:
        return LowBitRecipe({"*": configs[methods[0]]}, run=_QUIET)  # which is refused, and says how it is used
    weights.sort(key=lambda name: units[name] != "attention")  # it takes keys and values alone, so it is first
    first = host.attention if units[weights[0]] == "attention" else host.part
    patterns = ["*"] if len(weights) == 1 else [first, "*"]
    return LowBitRecipe({p: configs[name] for p, name in zip(patterns, weights, strict=True)}, cache=cache, run=_QUIET)


def attempt(methods: tuple[str, ...], host: Host) -> str | None:
    """Try methods together on a kind of model.

    Returns:
        None if they work, else the sentence with which the package refuses.

    Raises:
        RuntimeError: they seem to work, but a method holds nothing, or the loaded model differs; or a refusal came too
            late, when the model had been changed.
        Exception: any other that the package did not raise itself.
    """
    torch.manual_seed(0)
    model = host.build().eval()
    before = _state(model)
    try:
        if registry.get(methods[0]).unit == "pipeline" and len(methods) == 1:
            hf_lowbit.apply_quantcache(model, config_of(methods[0], host))
            return _kept(methods, host, model)
        if len(methods) == 1 and registry.get(methods[0]).needs == "training" and host.name == HOSTS[-1].name:
            hf_lowbit.binarize_convs(model, config_of(methods[0], host))
            model.train()
            _classify(model).square().mean().backward()  # its shifts and slopes are of use only once they were trained
            torch.optim.SGD(model.parameters(), 1e-3).step()
            hf_lowbit.pack_convs(model.eval())
        else:
            hf_lowbit.quantize(model, recipe_of(methods, host))
    except (ValueError, TypeError, NotImplementedError, HfLowbitError) as error:
        if not raised_by_package(error):
            raise
        if _state(model) != before:
            raise RuntimeError(f"{' and '.join(methods)} in a {host.name}: refused after work was done") from error
        return str(error)
    return _kept(methods, host, model)


def raised_by_package(error: BaseException) -> bool:
    """Return whether a ``raise`` of the package is where an error comes from, and no slip in it or below it."""
    step = error.__traceback__
    while step is not None and step.tb_next is not None:
        step = step.tb_next
    if step is None or step.tb_frame.f_globals["__name__"].split(".")[0] != hf_lowbit.__name__:
        return False
    last = next(each for each in dis.get_instructions(step.tb_frame.f_code) if each.offset == step.tb_lasti)
    return last.opname == "RAISE_VARARGS"


def _state(model: Any) -> dict[str, Any]:
    """Classes of the modules, and the bytes of all tensors, of a tiny model."""
    tensors = {name: value.detach().cpu().numpy().tobytes() for name, value in model.state_dict().items()}
    return {**{f"{name}.": type(module) for name, module in model.named_modules()}, **tensors}


@torch.no_grad()
def _kept(methods: tuple[str, ...], host: Host, model: Any) -> None:
    """Save, check, load and compare a model in which methods seem to work."""
    what = f"{' and '.join(methods)} in a {host.name}"
    expected = host.run(model)
    report = getattr(model, "cache_report", None)
    held = {"quantcache"} if report is not None and report().computed < STEPS else set()
    if packed_modules(model):
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            problems = verify(folder).problems
            loaded = host.load(Path(folder))
            held |= {row["method"] for row in (model.hf_quantizer.quantization_config.modules or {}).values()}
            if problems or not torch.equal(host.run(loaded), expected):
                raise RuntimeError(f"{what}: the loaded model differs ({problems or 'other numbers'})")
    if held != set(methods):
        raise RuntimeError(f"{what}: {', '.join(sorted(set(methods) - held))} holds nothing")


def groups(host: Host) -> Iterator[tuple[str, ...]]:
    """Yield every method alone, then every pair, in the order of the registry."""
    names = list(registry.methods())
    yield from ((name,) for name in names)
    for i, one in enumerate(names):
        for other in names[i + 1 :]:
            if host.only is None or host.only in {registry.get(name).unit for name in (one, other)}:
                yield one, other


def quiet() -> None:
    """Show neither progress nor warnings of the libraries: all that counts is what comes back."""
    logging.disable(logging.WARNING)
    transformers.utils.logging.disable_progress_bar()
    diffusers.utils.logging.disable_progress_bar()


def main() -> int:
    """Try everything and write the result file."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    quiet()
    found: dict[str, dict[str, str | None]] = {}
    for host in HOSTS:
        found[host.name] = {" + ".join(methods): attempt(methods, host) for methods in groups(host)}
        works = sum(reason is None for reason in found[host.name].values())
        print(f"{host.name}: {works} of {len(found[host.name])} work", flush=True)
    write_result(RESULT, {"tries": found})
    return 0


if __name__ == "__main__":
    sys.exit(main())
