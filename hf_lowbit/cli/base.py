"""What all commands share: the app, how errors end, how results are shown."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

app = typer.Typer(
    name="hf-lowbit",
    help="Compress Hugging Face models to a sign bit per weight, look at what came out, and measure it.\n\n"
    "Start with: [bold]hf-lowbit methods[/bold], then hf-lowbit quantize --help",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    add_completion=False,
)

Debug = Annotated[bool, typer.Option("--debug", hidden=True, help="Show the traceback of an error.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON: sizes in bytes, shares and errors from 0 to 1.")]
Packed = Annotated[str, typer.Argument(metavar="PATH", help="Folder of a model, or its name on the Hub.")]
# Of the commands that run a compression.
Dense = Annotated[str, typer.Argument(metavar="MODEL", help="Dense model: a folder, or its name on the Hub.")]
Skip = Annotated[
    list[str] | None, typer.Option(metavar="PATTERN", help="Modules to leave dense, such as '*.down_proj'.")
]
Samples = Annotated[int | None, typer.Option(help="Calibration sequences.")]
SequenceLength = Annotated[int | None, typer.Option(help="Tokens per calibration sequence.")]
Seed = Annotated[int | None, typer.Option(help="Seed of the calibration sample.")]
BatchSize = Annotated[int, typer.Option(help="Calibration sequences per forward pass.")]


def command(**settings: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register a command whose expected errors end in one line."""

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(function)
        def run(*args: Any, **kwargs: Any) -> None:
            from hf_lowbit.errors import HfLowbitError

            try:
                function(*args, **kwargs)
            except BrokenPipeError:  # the reader of our output has gone, as with `| head`
                raise
            except (ValueError, HfLowbitError, OSError) as error:
                if kwargs.get("debug"):
                    raise
                line = " ".join(str(error).split())
                Console(stderr=True, soft_wrap=True, highlight=False).print(f"[red]error: {escape(line)}[/red]")
                raise typer.Exit(2) from error

        return app.command(**settings)(run)

    return decorate


def require_model(name: str) -> None:
    """Refuse what is visibly neither a folder nor a name on the Hub; transformers' own message is a page."""
    if not Path(name).is_dir() and (Path(name).exists() or name.count("/") > 1 or name.startswith((".", "~"))):
        raise ValueError(f"{name}: no such folder, and not the name of a model on the Hub")


def calibration_fields(
    calibration: str | None, samples: int | None, sequence_length: int | None, seed: int | None
) -> dict[str, Any]:
    """Return what was given of the calibration, as a config calls it; data called "none" is None."""
    given = {"samples": samples, "sequence_length": sequence_length, "seed": seed, "calibration": calibration}
    fields: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    if calibration == "none":
        fields["calibration"] = None
    return fields


def show(text: str) -> None:
    """Print a line as it is: no markup, no wrapping."""
    Console(soft_wrap=True, highlight=False, markup=False).print(text)


def show_json(content: Any) -> None:
    typer.echo(json.dumps(content, indent=2, ensure_ascii=False))


def show_tables(tables: list[Any]) -> None:
    console = Console(markup=False, emoji=False)  # names in a checkpoint are anybody's
    for table in tables:
        console.print(table)
        console.print()
