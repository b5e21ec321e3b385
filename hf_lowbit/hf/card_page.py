"""The page of a model card: front matter and Markdown, from facts that were read; and the check of any such page.

Made by templates in ``model_cards/`` beside this file: ``card.md.jinja``, and for each method one with its limits and
one with the paper to cite. What is not known has no line. Strings of others are escaped for Markdown.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jinja2
import yaml
from huggingface_hub import EvalResult, ModelCardData

from hf_lowbit import registry
from hf_lowbit.hf.card import DATASETS, CardFields, Facts, ImageScores
from hf_lowbit.report.tables import error_text, size_text

TAG = "hf_lowbit"
TEMPLATES = Path(__file__).with_name("model_cards")
_MARKDOWN = re.compile(r"([\\`*_{}\[\]<>|#!~])")


def escaped(value: Any) -> str:
    """Return a string of somebody else as Markdown that shows it and does nothing more."""
    text = "".join(c if c.isprintable() else "�" for c in str(value))
    return _MARKDOWN.sub(r"\\\1", text.replace("&", "&amp;"))


def metadata(facts: Facts) -> ModelCardData:
    """Return the front matter of a card."""
    methods = registry.methods()
    results = None
    if isinstance(facts.scores, ImageScores):
        results = _image_results(facts.scores)
    elif facts.scores is not None:
        own, *dense = facts.scores.rows
        data = DATASETS.get(facts.scores.data)
        beside = f" (dense model: {dense[0][1]:.2f})" if dense else ""
        results = [
            EvalResult(
                task_type="text-generation",
                dataset_type=data or "text",
                dataset_name=f"{escaped(facts.scores.data)}, {facts.scores.samples} × {facts.scores.sequence_length}",
                metric_type="perplexity",
                metric_name=f"perplexity{beside}",
                metric_value=round(own[1], 4),
            )
        ]
    papers = [f"arxiv:{methods[name].paper}" for name in facts.methods if name in methods]
    tags = dict.fromkeys([TAG, "quantized", *facts.methods, *papers, *facts.fields.tags])
    optional: dict[str, Any] = {"datasets": list(facts.datasets), "language": list(facts.fields.language)}
    return ModelCardData(
        base_model=facts.fields.base_model,
        base_model_relation="quantized",
        library_name=facts.library,
        license=facts.fields.license,
        pipeline_tag=facts.fields.pipeline_tag,
        tags=list(tags),
        model_name=facts.repo.rpartition("/")[2],
        eval_results=results,
        **{key: value for key, value in optional.items() if value},
    )


def _image_results(scores: ImageScores) -> list[EvalResult]:
    """Return PSNR and SSIM of the compressed model, with those of the others in the name."""
    (_, *own), *others = scores.rows
    found = []
    for place, (metric, name, digits) in enumerate((("psnr", "PSNR of the luma, dB", 2), ("ssim", "SSIM", 4))):
        beside = ", ".join(f"{escaped(row[0])}: {row[1 + place]:.{digits}f}" for row in others)
        found.append(
            EvalResult(
                task_type="image-to-image",
                dataset_type="images",
                dataset_name=f"{escaped(scores.data)}, {scores.images} images, {scores.scale} times larger",
                metric_type=metric,
                metric_name=f"{name} ({beside})",
                metric_value=round(float(own[place] or 0), digits),
            )
        )
    return found


def render(facts: Facts) -> str:
    """Return a card: front matter and page.

    Raises:
        ValueError: a method is not registered, or the page is not a sound card; see :func:`check_card`.
    """
    known = registry.methods()
    if unknown := [name for name in facts.methods if name not in known]:
        raise ValueError(f"no such method: {', '.join(map(ascii, unknown))}")
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=False,  # noqa: S701  the page is Markdown; `finalize` escapes for that
        undefined=jinja2.StrictUndefined,
        finalize=lambda value: value if isinstance(value, (int, _Sound)) else escaped(value),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "sound": _Sound,
        "size": lambda size: _Sound(f"{size_text(size)} ({size:,} bytes)"),
        "error": lambda error: _Sound(error_text(error)),
        "number": lambda value, digits=2: _Sound(f"{value:,.{digits}f}"),
    }
    page = environment.get_template("card.md.jinja").render(
        facts=facts,
        fields=facts.fields,
        methods=[known[name] for name in facts.methods],
        recipe=_Sound(json.dumps(facts.recipe, indent=2, ensure_ascii=True).replace("`", "\\u0060")),
    )
    text = _marked(f"---\n{metadata(facts).to_yaml()}\n---\n\n{page}")
    check_card(text)
    return text


def _marked(text: str) -> str:
    """Return a rendered card with a last line by which it is known as long as nobody edits it."""
    return f"{text}\n<!-- rendered by hf-lowbit {hashlib.sha256(text.encode()).hexdigest()[:16]} -->\n"


def is_rendered(text: str) -> bool:
    """Return whether a card is as it was rendered, so that no words of anybody are lost with it."""
    rest, mark, _ = text.rpartition("\n<!-- rendered by hf-lowbit ")
    return bool(mark) and _marked(rest) == text


class _Sound(str):
    """Text that is put on a page as it is: made here, or checked."""


def check_card(text: str) -> dict[str, Any]:
    """Check a card as the Hub would, without asking it, and for what a compressed model must say.

    Args:
        text: the card, also one that was written by hand.

    Returns:
        Its front matter.

    Raises:
        ValueError: what is wrong with it.
    """
    match = re.match(r"---\n(.*?)\n---\n(.*)", text, flags=re.DOTALL)
    if match is None:
        raise ValueError("the card must begin with a front matter between two lines of ---")
    try:
        content = yaml.safe_load(match[1])
    except yaml.YAMLError as error:
        raise ValueError("the front matter of the card is not valid YAML") from error
    if not isinstance(content, dict):
        raise ValueError("the front matter of the card must be a mapping")
    base = content.get("base_model")
    CardFields(  # refuses what cannot be shown
        base if isinstance(base, str) else None,
        content.get("license"),
        tuple(_listed(content.get("language"))),
        (),
        content.get("pipeline_tag"),
    )
    tags = list(_listed(content.get("tags")))
    problems = [f"{name} is missing" for name in ("base_model", "license", "library_name") if not content.get(name)]
    problems += ["tags must be a list of words"] if not all(isinstance(tag, str) and tag for tag in tags) else []
    problems += [] if TAG in tags else [f"tags must name {TAG}"]
    problems += [] if content.get("base_model_relation") == "quantized" else ["base_model_relation must be quantized"]
    problems += [] if "import hf_lowbit" in match[2] else ["the page must say `import hf_lowbit`"]
    if problems:
        raise ValueError(f"the card: {'; '.join(problems)}")
    return content


def _listed(value: Any) -> Iterable[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]
