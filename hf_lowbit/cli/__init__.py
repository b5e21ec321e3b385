"""The command line, ``hf-lowbit``.

Heavy libraries are imported inside the commands, so that help is quick. What a user can get wrong ends in one red line
and exit code 2; the hidden ``--debug`` shows the traceback instead.
"""

from __future__ import annotations

import dataclasses
import logging
import shutil
from pathlib import Path
from typing import Annotated, Any

import typer

from hf_lowbit.cli import budget, sharing
from hf_lowbit.cli.base import (
    AsJson,
    BatchSize,
    Debug,
    Dense,
    Packed,
    Samples,
    Seed,
    SequenceLength,
    Skip,
    app,
    calibration_fields,
    command,
    require_model,
    show,
    show_json,
    show_tables,
)
from hf_lowbit.cli.budget import TargetBits, TargetBytes, show_plan, targets_of

DTYPES = ("auto", "float32", "bfloat16", "float16")


def _version(wanted: bool) -> None:
    if wanted:
        from hf_lowbit import __version__

        typer.echo(f"hf-lowbit {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")


@command()
def quantize(
    model: Dense,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to be made.")],
    method: Annotated[str | None, typer.Option(help="Name of a method, see `hf-lowbit methods`.")] = None,
    option: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="An option of the method; may be repeated.")
    ] = None,
    recipe: Annotated[
        Path | None, typer.Option(metavar="FILE.json", help="Config or recipe instead of a method.")
    ] = None,
    target_bits: TargetBits = None,
    target_bytes: TargetBytes = None,
    skip: Skip = None,
    calibration: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|FILE|FOLDER|none",
            help="What to calibrate on: c4 or wikitext2 (need a network), a text file or folder, images, or none.",
        ),
    ] = None,
    samples: Samples = None,
    sequence_length: SequenceLength = None,
    seed: Seed = None,
    batch_size: BatchSize = 4,
    dtype: Annotated[
        str, typer.Option(help="auto (as stored), float32, bfloat16 or float16: what is not packed.")
    ] = "auto",
    max_shard_size: Annotated[str, typer.Option(help="Largest weight file; KB, MB, GB or TB.")] = "5GB",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a model saved there before.")] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with an interrupted run of the same command.")
    ] = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Compress a dense model and save it.

    The model is calibrated and compressed block by block, so memory holds the packed part and one dense block.
    OUT appears when everything is written. What is finished is kept in a hidden folder beside it until then, so an
    interrupted run goes on with --resume and ends with the same bytes.

    Example:

    hf-lowbit quantize org/model model-1bit --method arb --calibration notes.txt

    Under a budget: --target-bits 2.5 instead of --method chooses what each layer gets; `hf-lowbit plan` only looks.

    Quicker: --samples 32 --sequence-length 512 --option iterations=3. Without data (much worse): --calibration none.

    In several processes: torchrun --nproc-per-node 2 -m hf_lowbit quantize ...; if one dies, all stop, and --resume
    goes on.
    """
    from hf_lowbit.cli.options import config_of
    from hf_lowbit.compress.team import Team, join, leave
    from hf_lowbit.config import RunOptions
    from hf_lowbit.hf.save import check_shard_size, check_target, save_model

    fields = calibration_fields(calibration, samples, sequence_length, seed)
    journal = out.expanduser().resolve().with_name(f".{out.name}.run")
    on_plan = None if as_json else show_plan
    run = RunOptions(batch_size=batch_size, journal=journal, resume=resume, on_plan=on_plan)
    config = config_of(method, option or [], recipe, skip or [], fields, run, targets_of(target_bits, target_bytes))
    if dtype not in DTYPES:
        raise ValueError(f"--dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    check_shard_size(max_shard_size)
    join()
    team = Team()
    target = check_target(out, overwrite) if team.leads else out.expanduser().resolve()
    if journal.exists() and not resume and team.leads:  # the others may be so late that the run has begun
        raise ValueError(f"{journal}: holds an unfinished run; go on with --resume, or remove this folder")
    if Path(model).exists() and Path(model).resolve() == target:
        raise ValueError(f"{out}: is the dense model itself; choose another folder")

    from hf_lowbit.hf.auto import auto_class, load_companion
    from hf_lowbit.hf.record import run_record
    from hf_lowbit.report.inspect import inspect as inspect_folder
    from hf_lowbit.report.tables import inspection_json, size_text

    require_model(model)
    auto = auto_class(model)
    companion = load_companion(model, auto)
    packed: Any = auto.from_pretrained(model, quantization_config=config, dtype=dtype)
    report = packed.hf_quantizer.report
    if team.leads:
        record = run_record(model, report.seconds)
        save_model(packed, out, companion, report.rows, overwrite, max_shard_size, record)
        shutil.rmtree(journal)
    leave()
    if not team.leads:
        return
    inspection = inspect_folder(out)
    if as_json:
        content: dict[str, Any] = {"seconds": report.seconds, "left_dense": report.dense}
        content |= {"plan": list(report.plan)} if report.plan else {}
        show_json({**content, **inspection_json(inspection, layers=False)})
        return
    show(report.summary())
    show(
        f"saved to {out}: {size_text(inspection.total_bytes)} on disk, "
        f"{inspection.bits_per_parameter:.3f} bits per parameter of the whole model"
    )


@command()
def inspect(
    path: Packed,
    as_json: AsJson = False,
    plot: Annotated[Path | None, typer.Option(metavar="FILE.png", help="Also draw it (needs matplotlib).")] = None,
    layers: Annotated[bool, typer.Option("--layers/--no-layers", help="List every packed layer.")] = False,
    revision: Annotated[str | None, typer.Option(metavar="REVISION", help="Of a repository on the Hub.")] = None,
    debug: Debug = False,
) -> None:
    """Show where the bytes of a compressed model are.

    Reads config.json and file headers only, so it is instant; of a model on the Hub, these few bytes are all that is
    fetched. The parts add up to the bytes on disk. Bits per weight count scales, bitmaps and padding; errors are
    squared and relative, as measured during calibration. Of a pipeline, every compressed model in it is shown; of a
    model whose cache holds latents, the ranks by layer, with the bytes that the cache takes per token.

    Example:

    hf-lowbit inspect model-1bit --layers
    """
    from hf_lowbit.report.headers import parts
    from hf_lowbit.report.inspect import inspect as inspect_folder
    from hf_lowbit.report.latents import cache_json, cache_table
    from hf_lowbit.report.plots import save_plot
    from hf_lowbit.report.tables import inspection_json, inspection_tables

    found = {part: inspect_folder(path, part, revision) for part in parts(path, revision)}
    if plot is not None:
        if len(found) > 1:
            raise ValueError(f"{path}: is a pipeline; draw one of its models, in the folders {', '.join(found)}")
        save_plot(next(iter(found.values())), plot)
    if as_json:
        content = {}
        for part, inspection in found.items():
            cache = cache_json(inspection)
            content[part] = {**inspection_json(inspection, layers), **({"cache": cache} if cache else {})}
        show_json(content[""] if "" in content else {"models": content})
        return
    for inspection in found.values():
        ranks = cache_table(inspection)
        show_tables([*inspection_tables(inspection, layers), *([ranks] if ranks else [])])
    if plot is not None:
        show(f"drawn in {plot}")


@command()
def verify(path: Packed, as_json: AsJson = False, debug: Debug = False) -> None:
    """Check a compressed model: config, headers, checksums, and every index, bitmap and scale.

    Exit code 0 for a sound model, 1 for a damaged one, 2 if it cannot be read as a compressed model at all.

    Example:

    hf-lowbit verify model-1bit
    """
    from hf_lowbit.report.headers import parts
    from hf_lowbit.report.verify import verify as verify_folder

    found = {part: verify_folder(path, part) for part in parts(path)}
    if as_json:
        content = {part: dataclasses.asdict(one) for part, one in found.items()}
        show_json(content[""] if "" in content else {"models": content})
    else:
        for one in found.values():
            for problem in one.problems:
                show(f"damaged: {problem}")
            state = "damaged" if one.problems else "sound"
            show(
                f"{one.name}: {state}; {one.modules} packed layers, {one.checksums} of {one.tensors} tensors "
                "compared with their checksums"
            )
    if any(one.problems for one in found.values()):
        raise typer.Exit(1)


@command(name="eval")
def evaluate(
    path: Packed,
    against: Annotated[str | None, typer.Option(metavar="DENSE", help="Model to compare with.")] = None,
    data: Annotated[
        str, typer.Option(metavar="NAME|FILE|FOLDER", help="Held-out text: wikitext2, c4, or your own; or images.")
    ] = "wikitext2",
    samples: Annotated[int, typer.Option(help="Sequences, from the start of the text; or images.")] = 8,
    sequence_length: Annotated[int, typer.Option(help="Tokens per sequence.")] = 512,
    batch_size: Annotated[int, typer.Option(help="Sequences per forward pass.")] = 4,
    speed: Annotated[bool, typer.Option("--speed/--no-speed", help="Measure decoding, in tokens per second.")] = True,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Measure perplexity, size and decoding speed, beside the dense model.

    Perplexity is exp of the mean negative log likelihood per token (lower is better, and comparable only on the same
    tokens). Speed is that of greedy generation of one sequence, the models taking turns; above × 1 is faster.

    Of a model that makes images larger, PSNR and SSIM of the luma are measured instead, on images of full resolution
    in --data: each is shrunk, enlarged by the models and by bicubic interpolation, and compared with itself.

    Example:

    hf-lowbit eval model-1bit --against org/model --data heldout.txt
    """
    from hf_lowbit.hf.auto import makes_images
    from hf_lowbit.report.evaluate import evaluate as measure
    from hf_lowbit.report.super_resolution import evaluate_images
    from hf_lowbit.report.tables import evaluation_table, image_table

    if makes_images(path):
        scores = evaluate_images(path, data, against, samples)
        if as_json:
            show_json(scores)
        else:
            show_tables([image_table(scores)])
        return
    result = measure(
        path,
        data,
        against,
        samples=samples,
        sequence_length=sequence_length,
        batch_size=batch_size,
        speed=speed,
    )
    if as_json:
        show_json(result)
    else:
        show_tables([evaluation_table(result)])


@command()
def generate(
    path: Packed,
    prompt: Annotated[str, typer.Option(help="Text to answer or to continue.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens to write.")] = 64,
    chat: Annotated[
        bool | None,
        typer.Option(
            "--chat/--raw",
            help="As a chat message, or as text to continue.",
            show_default="chat if the model has a template",
        ),
    ] = None,
    debug: Debug = False,
) -> None:
    """Let a model, compressed or dense, write text (greedy, so the same every time).

    Example:

    hf-lowbit generate model-1bit --prompt "The capital of France is" --raw --max-new-tokens 20
    """
    from transformers import GenerationConfig, TextStreamer

    from hf_lowbit.hf.auto import auto_class, load_tokenizer

    require_model(path)
    tokenizer = load_tokenizer(path)
    has_template = bool(tokenizer.chat_template)
    inputs: Any
    if chat and not has_template:
        raise ValueError(f"{path}: the tokenizer has no chat template; use --raw")
    if has_template and chat is not False:
        messages = [{"role": "user", "content": prompt}]
        inputs = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    else:
        inputs = tokenizer(prompt, return_tensors="pt")
    model: Any = auto_class(path).from_pretrained(path)
    stored = model.generation_config
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=stored.eos_token_id,
        pad_token_id=stored.pad_token_id if stored.pad_token_id is not None else tokenizer.eos_token_id,
    )
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    model.generate(**inputs.to(model.device), generation_config=settings, streamer=streamer)


@command()
def adapter(
    path: Packed,
    dense: Annotated[str, typer.Argument(metavar="DENSE", help="The dense model it was made from: folder or name.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to be made.")],
    rank: Annotated[int, typer.Option(min=1, help="Rank of each layer's update.")] = 16,
    data: Annotated[
        str | None, typer.Option(metavar="FILE|FOLDER", help="Text whose outputs count; without, weights do.")
    ] = None,
    samples: Annotated[int, typer.Option(help="Sequences of that text, from its start.")] = 32,
    sequence_length: Annotated[int, typer.Option(help="Tokens per sequence.")] = 512,
    debug: Debug = False,
) -> None:
    """Write what compression has left out as a LoRA adapter for peft, to use or to train on from.

    Each update is the best of its rank for the difference between the dense weight and the packed one.

    Example:

    hf-lowbit adapter model-low-rank org/model adapter --rank 16 --data notes.txt
    """
    from hf_lowbit.hf.adapter import check_adapter_target, dense_weights, save_remainder
    from hf_lowbit.hf.auto import auto_class, load_tokenizer
    from hf_lowbit.report.evaluate import heldout_tokens
    from hf_lowbit.report.tables import error_text, mean

    check_adapter_target(out)
    tokens = None if data is None else heldout_tokens(data, load_tokenizer(path), samples, sequence_length)
    model: Any = auto_class(path).from_pretrained(path)
    left = save_remainder(model, dense_weights(dense, model.base_model_prefix), out, rank, tokens)
    kind, share = "weights" if tokens is None else "outputs", error_text(mean(left.values()))
    show(f"saved to {out}: of what {len(left)} layers had lost of their {kind}, {share} is left")


@command()
def methods(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="Method whose options to list.")] = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """List the compression methods, or the options of one with defaults and allowed values.

    Example:

    hf-lowbit methods arb
    """
    from hf_lowbit import registry
    from hf_lowbit.report import tables

    if name is None:
        found = registry.methods()
        if as_json:
            show_json(tables.methods_json(found))
        else:
            show_tables([tables.methods_table(found)])
        return
    method = registry.get(name)
    if as_json:
        show_json(tables.options_json(method))
    else:
        show_tables([tables.options_table(method)])


@command()
def bench(
    path: Annotated[
        str | None, typer.Argument(metavar="[PATH]", help="Compressed model; a typical layer without.")
    ] = None,
    only_list: Annotated[
        bool, typer.Option("--list", help="Only say which kernel would run, and why not another one.")
    ] = False,
    device: Annotated[str, typer.Option(help="With --list: cpu, cuda, ...")] = "cpu",
    debug: Debug = False,
) -> None:
    """Measure products with packed layers beside dense ones, or list which kernel runs and why.

    Example:

    hf-lowbit bench model-1bit --list
    """
    from hf_lowbit.report.bench import kernel_table, speed_table

    show_tables([kernel_table(path, device) if only_list else speed_table(path)])


@command(name="env")
def environment(as_json: AsJson = False, debug: Debug = False) -> None:
    """Show versions, processor, devices, and which kernel each op takes here and why: for a bug report.

    It holds no path, no name of you or of this machine, no token and no environment variable.

    Example:

    hf-lowbit env --json
    """
    from hf_lowbit.report.environment import environment as look
    from hf_lowbit.report.environment import environment_tables

    found = look()
    if as_json:
        show_json(found)
    else:
        show_tables(environment_tables(found))
        show("paste this into a bug report")


budget.add()
sharing.add()


def main() -> None:
    """Run the command line."""
    app()
