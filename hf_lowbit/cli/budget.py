"""Budgets on the command line: the options of ``quantize``, the plan as a table, and ``plan``, which only looks."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from hf_lowbit.cli.base import (
    AsJson,
    BatchSize,
    Debug,
    Dense,
    Samples,
    Seed,
    SequenceLength,
    Skip,
    calibration_fields,
    command,
    require_model,
    show,
    show_json,
    show_tables,
)

TargetBits = Annotated[
    float | None,
    typer.Option(
        metavar="BITS",
        help="Budget instead of a method: most bits stored for a weight of the compressed layers, all counted.",
    ),
]
TargetBytes = Annotated[
    int | None, typer.Option(metavar="BYTES", help="Budget instead of a method: most bytes of the weight files.")
]


class _Seen(Exception):
    """Ends a run when its plan is made."""


def targets_of(bits: float | None, size: int | None) -> dict[str, Any]:
    """Return what was given of a budget, as a recipe calls it."""
    given = {"target_bits_per_weight": bits, "target_bytes": size}
    return {name: value for name, value in given.items() if value is not None}


def show_plan(plan: tuple[dict[str, Any], ...]) -> None:
    """Show what was chosen, before it is done."""
    from hf_lowbit.report.tables import plan_table

    show_tables([plan_table(plan)])


def plan(
    model: Dense,
    recipe: Annotated[
        Path | None,
        typer.Option(metavar="FILE.json", help="Recipe with candidates; without, integers of 2 to 8 bits."),
    ] = None,
    target_bits: TargetBits = None,
    target_bytes: TargetBytes = None,
    skip: Skip = None,
    calibration: Annotated[
        str | None,
        typer.Option(metavar="NAME|FILE|FOLDER|none", help="Text to measure on; none: by the weights alone."),
    ] = None,
    samples: Samples = None,
    sequence_length: SequenceLength = None,
    seed: Seed = None,
    batch_size: BatchSize = 4,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Show what a budget would choose for each layer, and compress nothing.

    Every candidate is tried on every layer, which takes about as long as a run for each of them.

    Example:

    hf-lowbit plan org/model --target-bits 2.5 --calibration notes.txt
    """
    from hf_lowbit.cli.options import config_of
    from hf_lowbit.config import RunOptions
    from hf_lowbit.hf.auto import auto_class
    from hf_lowbit.recipe import LowBitRecipe

    fields = calibration_fields(calibration, samples, sequence_length, seed)
    found: list[dict[str, Any]] = []

    def keep(rows: tuple[dict[str, Any], ...]) -> None:
        found.extend(rows)
        raise _Seen

    run = RunOptions(batch_size=batch_size, on_plan=keep)
    targets = targets_of(target_bits, target_bytes)
    if recipe is None and not targets:
        raise ValueError("give --target-bits or --target-bytes, or a recipe with candidates")
    config = config_of(None, [], recipe, skip or [], fields, run, targets)
    if not (isinstance(config, LowBitRecipe) and config.is_open):
        raise ValueError("the recipe leaves nothing to choose: give a rule several configs, and a target")
    require_model(model)
    try:
        auto_class(model).from_pretrained(model, quantization_config=config, dtype="auto")
    except _Seen:
        pass
    if as_json:
        show_json({"plan": found})
    else:
        show_plan(tuple(found))
        show("nothing was compressed; `hf-lowbit quantize` with the same options does it")


def add() -> None:
    """Put the command into the app, after those that came before."""
    command()(plan)
