"""The commands that share models: ``push``, ``pull`` and ``card``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from hf_lowbit.cli.base import Debug, command, show

Folder = Annotated[Path, typer.Argument(metavar="PATH", help="Folder of a compressed model or pipeline.")]
Repo = Annotated[str, typer.Argument(metavar="USER/NAME", help="Repository on the Hub.")]
BaseModel = Annotated[
    str | None,
    typer.Option(
        "--base-model",
        metavar="ORG/MODEL",
        help="The dense model it was made from.",
        show_default="what `quantize` recorded",
    ),
]
License = Annotated[
    str | None,
    typer.Option(help="Licence of that model, such as apache-2.0.", show_default="that of the base model on the Hub"),
]
Language = Annotated[list[str] | None, typer.Option(metavar="CODE", help="Language, such as en; may be repeated.")]
Tag = Annotated[list[str] | None, typer.Option(metavar="WORD", help="A further tag; may be repeated.")]
Task = Annotated[
    str | None,
    typer.Option("--task", metavar="TASK", help="Task on the Hub.", show_default="that of the model's class"),
]
Results = Annotated[
    Path | None, typer.Option(metavar="FILE.json", help="What `hf-lowbit eval PATH --against DENSE --json` printed.")
]


def push(
    path: Folder,
    repo: Repo,
    base_model: BaseModel = None,
    license: License = None,
    language: Language = None,
    tag: Tag = None,
    task: Task = None,
    results: Results = None,
    card: Annotated[
        Path | None,
        typer.Option(metavar="FILE.md", help="A card of your own; begin with that of `hf-lowbit card`."),
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="Make the repository private, if it is made.")] = False,
    pr: Annotated[bool, typer.Option("--pr", help="Propose it as a pull request.")] = False,
    revision: Annotated[str | None, typer.Option(metavar="BRANCH", help="Branch, made if there is none.")] = None,
    replace: Annotated[bool, typer.Option("--replace", help="Replace another model in the repository.")] = False,
    message: Annotated[str | None, typer.Option(help="Message of the commit.")] = None,
    debug: Debug = False,
) -> None:
    """Publish a compressed model, so that anybody loads it with from_pretrained("user/name").

    First, here: every checksum and header is compared, and every file is searched for tokens and for places on this
    machine. Then one commit brings config, weights and a model card (made from what the run recorded; see
    `hf-lowbit card`), so nobody ever sees half a model. Last, the hashes of what the Hub holds are compared with the
    files here. Interrupted? The same command again sends only what is missing.

    Log in once with `hf auth login`, or set HF_TOKEN.

    Example:

    hf-lowbit push model-1bit me/model-1bit --base-model org/model --license apache-2.0

    With scores: hf-lowbit eval model-1bit --against org/model --json > scores.json, then --results scores.json
    """
    from hf_lowbit.hf.hub import push_folder
    from hf_lowbit.report.tables import size_text

    text = None if card is None else card.read_text(encoding="utf-8")
    if card is not None and any((base_model, license, language, tag, task, results)):
        raise ValueError("--card is the whole card; write base model, licence, tags and scores into that file")
    done = push_folder(
        path,
        repo,
        _fields(base_model, license, language, tag, task),
        results=_results(results),
        text=text,
        private=private or None,
        create_pr=pr,
        revision=revision,
        replace=replace,
        message=message,
    )
    for name in done.left_out:
        show(f"left out, hidden: {name}")
    for name in done.removed:
        show(f"removed there, of the model before: {name}")
    if done.kept:
        show(f"was there and stays: {', '.join(done.kept)}")
    if done.unchanged:
        show(f"nothing to do: {done.url} holds exactly this model (commit {done.commit[:10]})")
    else:
        size = size_text(done.size)
        show(f"{done.url}: {done.files} files, {size}, in commit {done.commit[:10]}; read back, every hash is right")


def pull(
    repo: Repo,
    out: Annotated[
        Path | None, typer.Argument(metavar="[OUT]", help="Folder to be made; by default called like the model.")
    ] = None,
    revision: Annotated[str | None, typer.Option(metavar="REVISION", help="Branch, tag or commit.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a model saved there before.")] = False,
    debug: Debug = False,
) -> None:
    """Download a compressed model and check it; OUT appears when everything is there and sound.

    Headers are looked at first, so what is not compressed by this package is not downloaded. Interrupted? The same
    command again goes on where it was. To load a model, from_pretrained("user/name") is enough; this is for a copy.

    Example:

    hf-lowbit pull me/model-1bit

    To look without downloading: hf-lowbit inspect me/model-1bit
    """
    from hf_lowbit.hf.hub import check_repo_id
    from hf_lowbit.hf.pull import pull as fetch

    target = fetch(repo, out or Path(check_repo_id(repo).rpartition("/")[2]), revision, overwrite)
    show(f"{repo} lies in {target.name}, every checksum is right")


def card(
    path: Folder,
    repo: Annotated[str, typer.Option("--repo", metavar="USER/NAME", help="Repository that the page names.")] = "",
    base_model: BaseModel = None,
    license: License = None,
    language: Language = None,
    tag: Tag = None,
    task: Task = None,
    results: Results = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE.md", help="Write it there.", show_default="print it")
    ] = None,
    debug: Debug = False,
) -> None:
    """Render the model card that a push would write; nothing is sent anywhere.

    Its figures are read, not given: sizes from the headers of the weight files, options and errors from what the run
    stored, scores from --results. Write it to a file, add to it, and give that to `hf-lowbit push --card`.

    Example:

    hf-lowbit card model-1bit --repo me/model-1bit --base-model org/model --license apache-2.0 --out card.md
    """
    from hf_lowbit.hf.hub import render_card

    if license is None:
        raise ValueError("--license is missing: a card says under which licence the base model stands")
    name = repo or f"user/{path.expanduser().resolve().name}"
    text = render_card(path, name, _fields(base_model, license, language, tag, task), _results(results))
    if out is None:
        typer.echo(text, nl=False)
    else:
        out.write_text(text, encoding="utf-8")
        show(f"written to {out}")


def _fields(
    base_model: str | None, license: str | None, language: list[str] | None, tag: list[str] | None, task: str | None
) -> Any:
    from hf_lowbit.hf.card import CardFields

    return CardFields(base_model, license, tuple(language or ()), tuple(tag or ()), task)


def _results(file: Path | None) -> Any:
    if file is None:
        return None
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"--results {file.name}: is not valid JSON") from error


def add() -> None:
    """Add the commands to the app."""
    for function in (push, pull, card):
        command()(function)
