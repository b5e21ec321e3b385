"""What is true of a compressed model, for its card: from the headers of its files and the records of its run.

Figures are read, never given: sizes come from the headers of the weight files, errors and options from what the run
stored, scores from a result of ``hf-lowbit eval --json`` that was measured on these very bytes. Fields that only a
person can fill in (base model, licence, ...) are refused unless they look as such fields do.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hf_lowbit.config import CalibrationRecord, LowBitConfig
from hf_lowbit.errors import CheckpointError
from hf_lowbit.hf.record import REPOSITORY, read_record
from hf_lowbit.image_config import WITH_DATA, ImageConfig
from hf_lowbit.recipe import rules_of
from hf_lowbit.report.headers import parts
from hf_lowbit.report.inspect import Inspection, inspect
from hf_lowbit.report.latents import cache_json
from hf_lowbit.report.tables import Share, kinds_of, mean, shares_of

DATASETS = {"c4": "allenai/c4", "wikitext2": "Salesforce/wikitext"}
_PRIVATE = {
    "dataset": "a dataset",
    "text file": "a text file",
    "text folder": "a folder of texts",
    "texts": "texts",
    "tokens": "token ids",
    "image file": "an image",
    "image folder": "a folder of images",
    "images": "images",
}
_FIELDS = {
    "base_model": (REPOSITORY, "the name of a model on the Hub, such as org/model"),
    "license": (re.compile(r"[a-z0-9][a-z0-9.+-]{0,60}"), "an identifier of the Hub, such as apache-2.0"),
    "pipeline_tag": (re.compile(r"[a-z0-9][a-z0-9-]{0,60}"), "a task of the Hub, such as text-generation"),
    "language": (re.compile(r"[a-z]{2,3}(-[A-Za-z0-9]{2,8})?"), "codes of languages, such as en"),
    "tags": (re.compile(r"[A-Za-z0-9][\w.:/+-]{0,60}"), "words of letters, digits and .:/+-"),
}


@dataclasses.dataclass(frozen=True)
class CardFields:
    """What only a person can say about a model.

    Attributes:
        base_model: the dense model on the Hub; None takes it from the record of the run.
        license: of the base model, which the compressed one inherits.
        language: codes.
        tags: further ones.
        pipeline_tag: the task; None takes that of the model's class where it is clear.
    """

    base_model: str | None = None
    license: str | None = None
    language: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    pipeline_tag: str | None = None

    def __post_init__(self) -> None:
        problems = []
        for name, (pattern, what) in _FIELDS.items():
            value = getattr(self, name)
            given = value if isinstance(value, (tuple, list)) else () if value is None else (value,)
            wrong = [one for one in given if not isinstance(one, str) or not pattern.fullmatch(one) or ".." in one]
            problems += [f"{name} must be {what}, got {ascii(one)[:80]}" for one in wrong]
        if problems:
            raise ValueError("; ".join(problems))


@dataclasses.dataclass(frozen=True)
class Scores:
    """Perplexities of the compressed model and of the dense one beside it.

    Attributes:
        data: name of the text.
        samples: sequences of it.
        sequence_length: tokens in each.
        rows: (name, perplexity, bytes or None, tokens per second or None), the compressed model first.
    """

    data: str
    samples: int
    sequence_length: int
    rows: tuple[tuple[str, float, int | None, float | None], ...]


@dataclasses.dataclass(frozen=True)
class ImageScores:
    """What a model that makes images larger does to held-out ones, with the dense model and bicubic beside it.

    Attributes:
        data: name of the images.
        images: how many.
        scale: how many times larger.
        rows: (name, PSNR in dB, SSIM, bytes or None), the compressed model first.
    """

    data: str
    images: int
    scale: int
    rows: tuple[tuple[str, float, float, int | None], ...]


@dataclasses.dataclass(frozen=True)
class ModelFacts:
    """Sizes and errors of one compressed model; what is not known is None, and the card then lacks the line.

    Attributes:
        part: its folder in a pipeline, else "".
        layers: packed ones.
        bits_per_weight: of packed layers, everything counted.
        bits_per_parameter: of the whole model.
        packed_share: of the parameters, 0 to 1.
        parameters: of the dense model.
        stored_bytes: of the weight files.
        total_bytes: of all files.
        kinds: (kind of layer, number of such, bits per weight, mean output error).
        dense: (why layers were left dense, how many).
        cache: of a model whose cache holds latents: bits, bytes per token, and those of the dense model.
        shares: what each method holds, where there are several methods or forms of one.
        target: the budget that layers were chosen under, in words.
        plan: what was chosen: rows of :mod:`hf_lowbit.budget`.
    """

    part: str = ""
    layers: int | None = None
    bits_per_weight: float | None = None
    bits_per_parameter: float | None = None
    packed_share: float | None = None
    parameters: int | None = None
    stored_bytes: int | None = None
    total_bytes: int | None = None
    kinds: tuple[tuple[str, int | None, float | None, float | None], ...] = ()
    dense: tuple[tuple[str, int], ...] = ()
    cache: Mapping[str, Any] | None = None
    shares: tuple[Share, ...] = ()
    target: str | None = None
    plan: tuple[Mapping[str, Any], ...] = ()


@dataclasses.dataclass(frozen=True)
class Facts:
    """All that a card says; made by :func:`facts_of`, or from result files by a benchmark.

    Attributes:
        repo: name of the repository, user/name.
        fields: with base model and licence.
        library: "transformers" or "diffusers".
        loader: class that loads it.
        tokenizer: repository that holds a tokenizer for it.
        methods: names of the methods, as registered.
        models: one, or several of a pipeline.
        recipe: options of the run as JSON types.
        calibration: in words, one per rule of a recipe.
        datasets: on the Hub, that were calibrated on.
        run: record of the run.
        scores: None where nothing was measured.
        source: how the figures were taken, where that is not the folder itself.
    """

    repo: str
    fields: CardFields
    library: str
    loader: str
    tokenizer: str
    methods: tuple[str, ...]
    models: tuple[ModelFacts, ...]
    recipe: Mapping[str, Any]
    calibration: tuple[str, ...] = ()
    datasets: tuple[str, ...] = ()
    run: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    scores: Scores | ImageScores | None = None
    source: str | None = None


# Facts ---------------------------------------------------------------------------------------------------------------


def facts_of(
    folder: Path,
    repo: str,
    fields: CardFields,
    results: Mapping[str, Any] | None = None,
    models: Mapping[str, Inspection] | None = None,
) -> Facts:
    """Gather what a card says of a saved model or pipeline.

    Args:
        folder: that holds it.
        repo: name it gets on the Hub.
        fields: what only a person can say; the record of the run completes the base model.
        results: what ``hf-lowbit eval --json`` printed of this folder, or None.
        models: what is in it, where it is known already.

    Raises:
        ValueError: there is no base model or licence, or ``results`` are none or of another model.
        CheckpointError: the folder or the record in it is damaged.
    """
    found = dict(models or {part: inspect(folder, part) for part in parts(folder)})
    record = read_record(folder)
    fields = dataclasses.replace(fields, base_model=fields.base_model or record.get("base_model"))
    missing = [
        f"{name} is not known; give --{name.replace('_', '-')}"
        for name in ("base_model", "license")
        if getattr(fields, name) is None
    ]
    if missing:
        raise ValueError(f"{folder.name}: {'; '.join(missing)}")
    library, loader, task = _loader(folder)
    fields = dataclasses.replace(fields, pipeline_tag=fields.pipeline_tag or task)
    configs = [inspection.config for inspection in found.values()]
    rules = [rule for config in configs for _, rule in rules_of(config)]
    caches = {cache.method for config in configs if (cache := getattr(config, "cache", None)) is not None}
    data = [rule.calibration for rule in rules if isinstance(rule, WITH_DATA)]
    names = [one.name if isinstance(one, CalibrationRecord) else one for one in data]
    return Facts(
        repo=repo,
        fields=fields,
        library=library,
        loader=loader,
        tokenizer=repo if (folder / "tokenizer_config.json").is_file() else str(fields.base_model),
        methods=tuple(sorted({module.method for one in found.values() for module in one.modules} | caches)),
        models=tuple(model_facts(inspection, part) for part, inspection in found.items()),
        recipe=_recipe(found),
        calibration=tuple(dict.fromkeys(calibration_text(rule) for rule in rules)),
        datasets=tuple(dict.fromkeys(DATASETS[name] for name in names if name in DATASETS)),
        run=record,
        scores=None if results is None else read_scores(results, found),
    )


def model_facts(inspection: Inspection, part: str = "") -> ModelFacts:
    """Return the figures of one compressed model, from its headers."""
    kinds = []
    for kind, modules in kinds_of(inspection.modules).items():
        bits = 8 * sum(module.bytes for module in modules) / sum(module.weights for module in modules)
        kinds.append((kind, len(modules), bits, mean(module.error for module in modules)))
    reasons: dict[str, int] = {}
    for reason in (inspection.config.left_dense or {}).values():
        reasons[reason] = reasons.get(reason, 0) + 1
    shares = tuple(shares_of(inspection))
    return ModelFacts(
        part=part,
        layers=len(inspection.modules),
        bits_per_weight=inspection.bits_per_weight,
        bits_per_parameter=inspection.bits_per_parameter,
        packed_share=inspection.packed_share,
        parameters=inspection.parameters,
        stored_bytes=inspection.packed_bytes + sum(g.bytes for g in inspection.groups) + inspection.header_bytes,
        total_bytes=inspection.total_bytes - inspection.other_files.get("README.md", 0),
        kinds=tuple(kinds),
        target=_target(inspection.config),
        plan=tuple(getattr(inspection.config, "plan", None) or ()),
        dense=tuple(reasons.items()),
        cache=cache_json(inspection),
        shares=shares if len(shares) > 1 else (),
    )


def _target(config: LowBitConfig) -> str | None:
    """Return in words what budget a recipe kept."""
    bits, size = getattr(config, "target_bits_per_weight", None), getattr(config, "target_bytes", None)
    if bits is not None:
        return f"at most {bits:g} bits per packed weight"
    return None if size is None else f"at most {size:,} bytes of weight files"


def _loader(folder: Path) -> tuple[str, str, str | None]:
    """Return library, class that loads the folder, and task where the class tells it."""
    if (folder / "model_index.json").is_file():
        return "diffusers", "DiffusionPipeline", None
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if "_diffusers_version" in config:
        name = config.get("_class_name")
        if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z_]\w{0,99}", name):
            raise CheckpointError(f"config.json of {folder.name}: _class_name is not the name of a class")
        return "diffusers", name, None
    from hf_lowbit.hf.auto import auto_class

    try:
        auto = auto_class(folder).__name__
    except ValueError:  # a model that writes no text, such as a text encoder
        return "transformers", "AutoModel", None
    tasks = {
        "AutoModelForCausalLM": "text-generation",
        "AutoModelForImageTextToText": "image-text-to-text",
        "AutoModelForImageToImage": "image-to-image",
    }
    return "transformers", auto, tasks.get(auto)


def _recipe(models: Mapping[str, Inspection]) -> dict[str, Any]:
    """Return the options of the run, without what has one entry per layer; that is in config.json."""

    def short(config: LowBitConfig) -> dict[str, Any]:
        left_out = ("modules", "left_dense", "plan")
        content = {key: value for key, value in config.to_dict().items() if key not in left_out}
        rules = content.get("rules", [{"config": content}])
        for rule in rules:
            rule["config"] = {k: v for k, v in rule["config"].items() if k != "layers" or not v}
            names = rule.get("pattern", "").split("|")
            if len(names) > 4:  # what a budget has chosen, name by name
                rule["pattern"] = f"{'|'.join(names[:2])}| ... {len(names) - 2} more"
        return content if "rules" in content else rules[0]["config"]

    found = {part: short(inspection.config) for part, inspection in models.items()}
    return found[""] if list(found) == [""] else found


def calibration_text(rule: LowBitConfig) -> str:
    """Return in words what a rule was calibrated on."""
    if not isinstance(rule, WITH_DATA) or rule.calibration is None:
        return f"{rule.method}: no data was used."
    record = rule.calibration
    if not isinstance(record, CalibrationRecord):
        record = CalibrationRecord("dataset", str(record))
    known = [f"the public dataset {record.name}" if record.name else f"{_PRIVATE[record.kind]}, not published"]
    if isinstance(rule, ImageConfig):
        known += [f"{rule.samples} patches of {rule.patch_size} pixels, seed {rule.seed}"]
    elif record.kind != "tokens":
        known += [f"up to {rule.samples} sequences of {rule.sequence_length} tokens, seed {rule.seed}"]
    what, ids = ("pixels", "of them") if isinstance(rule, ImageConfig) else ("tokens", "of their ids")
    known += [f"{record.tokens:,} {what} were used"] if record.tokens is not None else []
    known += [f"SHA-256 {ids} {record.sha256}"] if record.sha256 else []
    return f"{rule.method}: {'; '.join(known)}."


def _image_scores(results: Mapping[str, Any]) -> ImageScores | None:
    """Return scores of images, None if the result is none of them; see :func:`read_scores`."""
    rows = [
        (str(name), float(row["psnr"]), float(row["ssim"]), None if row["bytes"] is None else int(row["bytes"]))
        for name, row in results["models"].items()
    ]
    sound = 2 <= len(rows) <= 3 and all(0 < row[1] < 1000 and -1 <= row[2] <= 1 for row in rows) and rows[0][3]
    found = ImageScores(str(results["data"]), int(results["images"]), int(results["scale"]), tuple(rows))
    return found if sound else None


def read_scores(results: Mapping[str, Any], models: Mapping[str, Inspection]) -> Scores | ImageScores:
    """Read a result of ``hf-lowbit eval --json``.

    Raises:
        ValueError: it is none, or was measured on other bytes than these.
    """
    scores: Scores | ImageScores | None
    try:
        if "scale" in results:
            scores = _image_scores(results)
        else:
            scores = _text_scores(results)
    except (KeyError, TypeError, ValueError, AttributeError):
        scores = None
    if scores is None:
        raise ValueError("results must be what `hf-lowbit eval PATH --against DENSE --json` printed")
    sizes = {facts.total_bytes or 0 for facts in map(model_facts, models.values())}
    measured = scores.rows[0][3] if isinstance(scores, ImageScores) else scores.rows[0][2]
    if measured not in sizes:
        raise ValueError(
            f"results: were measured on a model of {measured:,} bytes, this one has "
            f"{', '.join(f'{size:,}' for size in sorted(sizes))}; measure it with `hf-lowbit eval`"
        )
    return scores


def _text_scores(results: Mapping[str, Any]) -> Scores | None:
    """Return perplexities, None if the result is none of them; see :func:`read_scores`."""
    rows = []
    for name, row in results["models"].items():
        speed = row.get("tokens_per_second")
        rows.append((str(name), float(row["perplexity"]), int(row["bytes"]), None if speed is None else float(speed)))
    found = Scores(str(results["data"]), int(results["samples"]), int(results["sequence_length"]), tuple(rows[:2]))
    sound = len(rows) in (1, 2) and all(1 <= row[1] < float("inf") for row in rows)
    return found if sound else None
