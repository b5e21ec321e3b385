"""What each method compresses, to how many bits, with which data, where it sits in the field, and whom to cite.

The frame is organized after the 8 × 24 frame of *Low-bit Model Quantization for Deep Neural Networks: A Survey* (Liu
et al., arXiv 2505.05530): eight categories by core technique, three sub-categories each. The survey's own names could
not be read; names of sub-categories are ours, and so are those of five categories, as ``provenance`` says of each.
Number formats (non-uniform, logarithmic, codebooks, FP4) would make a ninth family; no method here needs it.

Low-rank methods are outside the frame: their category is None. All placements are this project's judgement. The page
``docs/methods.md`` is made by ``python -m hf_lowbit.methods --page``.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
import types
from collections.abc import Callable, Iterable, Mapping
from typing import Any

SURVEY = "2505.05530"
PROVENANCE = ("repo-history", "project", "survey")
FAMILIES = ("quantization", "pruning", "low_rank", "caching", "architecture")
COMPRESSES = ("weights", "activations", "kv_cache", "latents", "conv")
STAGES = ("ptq", "qat", "inference_time")
NEEDS = ("none", "calibration", "training")


@dataclasses.dataclass(frozen=True)
class Subcategory:
    """A sub-category: slug (stable), title, the category it belongs to, and where its name comes from."""

    slug: str
    title: str
    category: str
    provenance: str = "project"


@dataclasses.dataclass(frozen=True)
class Category:
    """A main category.

    Attributes:
        slug: stable name.
        title: for people; may be reworded.
        provenance: "repo-history" if the name is in the history of the survey's list of papers, "project" if it is
            ours, "survey" if it is the survey's.
        subcategories: slugs, in order.
        examples: methods of others that the list named under this heading.
    """

    slug: str
    title: str
    provenance: str
    subcategories: tuple[str, ...]
    examples: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class MethodInfo:
    """Record of a method.

    Attributes:
        slug: equal to ``quantization_config["method"]`` where there is one.
        title: short name.
        category, subcategory: primary place in the frame, None outside of it.
        also: secondary places, (category, sub-category).
        family: of :data:`FAMILIES`.
        compresses: of :data:`COMPRESSES`.
        weight_bits: bits of a stored code; what scales and bitmaps add is in the storage report of a model.
        act_bits: the same of activations, None if they are left alone.
        stage: of :data:`STAGES`.
        needs_data: of :data:`NEEDS`.
        arxiv, year, venue: of the paper.
        authors_short: for a table.
        repo: of the authors.
        bibtex: entry to cite.
        hf_entry: how it is reached.
        provenance: by field, who says so, where it is not the paper.
        aliases: other names that :func:`get` knows.
        note: what the fields cannot say.
        part_of: slug of the method that uses it, for one that cannot be asked for by itself.
    """

    slug: str
    title: str
    category: str | None
    subcategory: str | None
    also: tuple[tuple[str, str], ...]
    family: frozenset[str]
    compresses: frozenset[str]
    weight_bits: tuple[float, ...]
    act_bits: tuple[int, ...] | None
    stage: str
    needs_data: str
    arxiv: str | None
    year: int
    venue: str | None
    authors_short: str
    repo: str | None
    bibtex: str
    hf_entry: str
    provenance: Mapping[str, str] = dataclasses.field(default_factory=dict)
    aliases: tuple[str, ...] = ()
    note: str = ""
    part_of: str | None = None

    def __post_init__(self) -> None:
        # so that a record is the same whether it was written down or read from JSON
        set_ = object.__setattr__
        set_(self, "family", frozenset(self.family))
        set_(self, "compresses", frozenset(self.compresses))
        set_(self, "also", tuple((str(a), str(b)) for a, b in self.also))
        set_(self, "weight_bits", tuple(map(float, self.weight_bits)))
        set_(self, "act_bits", None if self.act_bits is None else tuple(self.act_bits))
        set_(self, "aliases", tuple(self.aliases))
        set_(self, "provenance", types.MappingProxyType(dict(self.provenance)))

    def to_json(self) -> dict[str, Any]:
        """Return the record as JSON types; ``MethodInfo(**record)`` undoes it."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        for name in ("family", "compresses"):
            values[name] = sorted(values[name])
        for name in ("weight_bits", "act_bits", "aliases"):
            values[name] = None if values[name] is None else list(values[name])
        values["also"] = [list(place) for place in self.also]
        values["provenance"] = dict(self.provenance)
        return values

    @property
    def places(self) -> tuple[tuple[str, str], ...]:
        """All places in the frame, the primary one first."""
        own = () if self.category is None or self.subcategory is None else ((self.category, self.subcategory),)
        return (*own, *self.also)


_FRAME: tuple[tuple[str, str, str, dict[str, str], tuple[str, ...]], ...] = (
    (
        "training", "project", "Gradient estimation and quantization-aware training",
        {
            "surrogate_gradient": "Surrogate gradients",
            "learned_quantizer_parameters": "Learned quantizer parameters",
            "distillation_and_schedule": "Distillation and schedules",
        }, (),
    ),
    (
        "calibration", "project", "Post-training parameter search and reconstruction",
        {
            "range_and_scale_search": "Search of ranges and scales",
            "rounding_and_reconstruction": "Rounding and reconstruction",
            "second_order_compensation": "Second-order compensation",
        }, (),
    ),
    (
        "redistribution", "project", "Reshaping weights or activations before quantizing",
        {
            "scaling_and_shift": "Scaling and shift",
            "rotation": "Rotation",
            "conditioning_and_splitting": "Conditioning and splitting",
        }, (),
    ),
    (
        "mixed_precision", "project", "Bit allocation",
        {
            "sensitivity_metric": "By a measure of sensitivity",
            "search_based": "By search",
            "input_or_time_adaptive": "By input or time step",
        }, (),
    ),
    (
        "extreme_low_bit", "project", "Binary, ternary and sub-2-bit",
        {
            "binary_networks": "Binary networks",
            "binary_ptq": "Binarization after training",
            "ternary_and_multi_binary": "Ternary and several binary planes",
        }, (),
    ),
    (
        "stochastic", "repo-history", "Stochastic quantization",
        {
            "noise_injection": "Noise injection",
            "random_dropping": "Random dropping",
            "soft_discrete_search": "Soft search of discrete values",
        }, ("Degree-Quant", "Quant-Noise", "QDrop", "SLB", "NWQ", "Bit-Shrinking"),
    ),
    (
        "data_free", "repo-history", "Zero-shot and data-free quantization",
        {
            "synthetic_data": "Synthetic data",
            "statistics_from_weights": "Statistics from weights",
            "online_statistics": "Statistics gathered while running",
        },
        ("ZeroQ", "DSG", "ZAQ", "HAST", "AdaDFQ", "GENIE", "PSAQ-ViT", "REx", "TexQ", "ZeroQuant", "Norm Tweaking",
         "PowerQuant"),
    ),
    (
        "diffusion", "repo-history", "Diffusion-model quantization",
        {
            "timestep_calibration": "Calibration over time steps",
            "error_correction": "Correction of quantization noise",
            "cache_and_quantization": "Caching and quantization",
        }, ("TFMQ-DM", "PTQ4DM", "PTQD", "Q-DM", "Q-Diffusion"),
    ),
)  # fmt: skip

CATEGORIES: Mapping[str, Category] = types.MappingProxyType(
    {slug: Category(slug, title, source, tuple(subs), examples) for slug, source, title, subs, examples in _FRAME}
)
SUBCATEGORIES: Mapping[str, Subcategory] = types.MappingProxyType(
    {sub: Subcategory(sub, title, slug) for slug, _, _, subs, _ in _FRAME for sub, title in subs.items()}
)
_METHODS: dict[str, MethodInfo] = {}
METHODS: Mapping[str, MethodInfo] = types.MappingProxyType(_METHODS)


def problems(info: MethodInfo) -> list[str]:
    """Return what is wrong with a record, empty if nothing is."""
    found = []
    if not re.fullmatch(r"[a-z0-9_]+", info.slug):
        found.append(f"slug {info.slug!r} must be of a-z, 0-9 and _")
    for category, sub in info.places:
        if sub not in SUBCATEGORIES or SUBCATEGORIES[sub].category != category:
            found.append(f"{category}/{sub} is no place in the frame")
    if (info.category is None) != (info.subcategory is None):
        found.append("category and subcategory must be given together")
    if (info.category is None) != (info.family == {"low_rank"}):
        found.append("category must be None for low-rank methods, and only for these")
    allowed: tuple[tuple[str, Iterable[str], tuple[str, ...]], ...] = (
        ("family", info.family, FAMILIES),
        ("compresses", info.compresses, COMPRESSES),
        ("stage", (info.stage,), STAGES),
        ("needs_data", (info.needs_data,), NEEDS),
    )
    for name, values, known in allowed:
        found += [f"{name} {value!r} is none of {', '.join(known)}" for value in values if value not in known]
        found += [] if tuple(values) else [f"{name} is empty"]
    if not info.bibtex.startswith("@") or info.bibtex.count("{") != info.bibtex.count("}"):
        found.append("bibtex must be one entry with balanced braces")
    return found


def register(info: MethodInfo, replace: bool = False) -> None:
    """Add the record of a method; the frame stays as it is.

    Raises:
        ValueError: the record is not sound, or the slug is taken and ``replace`` is not set.
    """
    if found := problems(info):
        raise ValueError(f"record {info.slug!r}: {'; '.join(found)}")
    if info.slug in _METHODS and not replace:
        raise ValueError(f"method {info.slug!r} has a record already; pass replace=True to replace it")
    _METHODS[info.slug] = info


def _plain(name: str) -> str:
    """Return letters and digits of a name alone, so that "DVD-Quant" and "dvd_quant" are the same."""
    return re.sub(r"[^a-z0-9]", "", name.lower().replace("²", "2"))


def get(slug: str) -> MethodInfo:
    """Return a record by slug, title or alias; case, hyphens and underscores do not count.

    Raises:
        KeyError: there is none; names that are close are listed.
        TypeError: not a string.
    """
    names = {_plain(name): info for info in _METHODS.values() for name in (info.slug, info.title, *info.aliases)}
    if not isinstance(slug, str):
        raise TypeError(f"a method's name must be a string, got {type(slug).__name__}")
    found = names.get(_plain(slug))
    if found is None:
        close = difflib.get_close_matches(_plain(slug), names, n=3)
        meant = sorted({names[name].slug for name in close} or set(_METHODS))
        raise KeyError(f"no method {slug!r}; {'did you mean' if close else 'known'}: {', '.join(meant)}")
    return found


def _refuse_unknown(name: str, value: str | None, known: Iterable[str]) -> None:
    if value is not None and not (isinstance(value, str) and value in known):
        raise ValueError(f"unknown {name} {value!r}; known: {', '.join(known)}")


def find(
    *,
    category: str | None = None,
    subcategory: str | None = None,
    compresses: str | None = None,
    family: str | None = None,
    max_weight_bits: float | None = None,
    needs_data: str | None = None,
    primary_only: bool = False,
) -> list[MethodInfo]:
    """Return the records that match all that is given, sorted by slug.

    Args:
        category: slug; secondary places count, unless ``primary_only``.
        subcategory: the same.
        compresses: one of :data:`COMPRESSES`.
        family: one of :data:`FAMILIES`.
        max_weight_bits: methods that store weights in at most so many bits.
        needs_data: one of :data:`NEEDS`.
        primary_only: look at the primary place alone.

    Raises:
        ValueError: a value that is in none of the tables, or bits that are no number.
    """
    _refuse_unknown("category", category, CATEGORIES)
    _refuse_unknown("subcategory", subcategory, SUBCATEGORIES)
    _refuse_unknown("compresses", compresses, COMPRESSES)
    _refuse_unknown("family", family, FAMILIES)
    _refuse_unknown("needs_data", needs_data, NEEDS)

    if max_weight_bits is not None and not (isinstance(max_weight_bits, (int, float)) and max_weight_bits > 0):
        raise ValueError(f"max_weight_bits must be a number above 0, got {max_weight_bits!r}")

    def fits(info: MethodInfo) -> bool:
        places = info.places[: 1 if info.category else 0] if primary_only else info.places
        return (
            (category is None or category in {place[0] for place in places})
            and (subcategory is None or subcategory in {place[1] for place in places})
            and (compresses is None or compresses in info.compresses)
            and (family is None or family in info.family)
            and (max_weight_bits is None or (bool(info.weight_bits) and min(info.weight_bits) <= max_weight_bits))
            and (needs_data is None or needs_data == info.needs_data)
        )

    return sorted(filter(fits, _METHODS.values()), key=lambda info: info.slug)


def bibtex(*slugs: str) -> str:
    """Return the entries to cite, each once, in the order asked for; of all methods if none is named."""
    infos = [get(slug) for slug in slugs] or [_METHODS[slug] for slug in sorted(_METHODS)]
    return "\n".join(dict.fromkeys(info.bibtex for info in infos))


def bits_text(info: MethodInfo) -> str:
    """Return the bits of a method as a table shows them, such as "W2-4 A2-4"."""

    def span(values: Iterable[float]) -> str:
        low, high = min(values), max(values)
        return f"{low:g}" if low == high else f"{low:g}-{high:g}"

    parts = [f"W{span(info.weight_bits)}"] if info.weight_bits else []
    parts += [f"A{span(info.act_bits)}"] if info.act_bits else []
    return " ".join(parts) or "–"


def _row(info: MethodInfo) -> dict[str, str]:
    place = "–" if info.category is None else f"{info.category} / {info.subcategory}"
    data = {"none": "none", "calibration": "calibration data", "training": "training"}[info.needs_data]
    return {
        "method": f"{info.title} (`{info.slug}`)",
        "compresses": ", ".join(sorted(info.compresses)),
        "bits": bits_text(info) + (f"; {info.note}" if info.note else ""),
        "data": data,
        "stage": info.stage,
        "place": place,
        "also": ", ".join(f"{a} / {b}" for a, b in info.also) or "–",
        "paper": f"[{info.arxiv}](https://arxiv.org/abs/{info.arxiv})" if info.arxiv else "–",
        "venue": info.venue or "–",
        "authors": info.authors_short,
        "reached by": info.hf_entry,
    }


def markdown_table(rows: list[dict[str, str]]) -> str:
    """Return rows with the same keys as a Markdown table."""
    keys = list(rows[0])
    lines = [keys, ["---"] * len(keys), *([row[key] for key in keys] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def _markdown() -> str:
    """Return the page of all methods."""
    inside = [info for info in find() if info.category is not None]
    outside = [info for info in find() if info.category is None]
    frame = [
        {
            "category": f"{category.title} (`{category.slug}`)",
            "name from": category.provenance,
            "sub-categories": ", ".join(f"{SUBCATEGORIES[s].title} (`{s}`)" for s in category.subcategories),
            "methods here": ", ".join(info.slug for info in find(category=category.slug)) or "–",
            "examples of others": ", ".join(category.examples) or "–",
        }
        for category in CATEGORIES.values()
    ]
    return (
        "# Methods and where they sit in the field\n\n"
        "<!-- made by python -m hf_lowbit.methods --page; do not edit -->\n\n"
        "Organized after the survey's 8 × 24 frame (*Low-bit Model Quantization for Deep Neural Networks: A Survey*, "
        f"[arXiv {SURVEY}](https://arxiv.org/abs/{SURVEY})): eight categories with three sub-categories each. Names "
        "of sub-categories are ours, and so are those of five categories; the other three are headings in the history "
        "of the survey's list of papers. The survey's own names could not be read. All placements are this project's "
        "judgement.\n\n## In the frame\n\n"
        + markdown_table([_row(info) for info in inside])
        + "\n## Outside the taxonomy\n\nThe survey is about quantization; low-rank methods have no place in it.\n\n"
        + markdown_table([_row(info) for info in outside])
        + "\n## The frame\n\n"
        + markdown_table(frame)
        + "\n## Notes\n\n"
        "* Bits are those of a stored code; what scales, bitmaps and masks add depends on sizes, and the storage "
        "report of a model (`hf-lowbit inspect`) counts it.\n"
        "* Number formats (non-uniform, logarithmic, codebooks, FP4 and MXFP4) are a plausible ninth family. The "
        "frame has eight, and no method here needs it.\n"
        "* Venues change between versions of a paper; the records say who states them "
        "(`hf_lowbit.methods.get(NAME).provenance`).\n"
        "\n## Citations\n\n```bibtex\n" + bibtex() + "```\n"
    )


def as_table(fmt: str = "markdown") -> Any:
    """Return all records.

    Args:
        fmt: "markdown" for the page, "json" for a text from which ``MethodInfo(**record)`` makes them again, "rows"
            for a list of dicts of strings.

    Raises:
        ValueError: another format.
    """
    makers: dict[str, Callable[[], Any]] = {
        "markdown": _markdown,
        "json": lambda: json.dumps([info.to_json() for info in find()], indent=2, ensure_ascii=False) + "\n",
        "rows": lambda: [_row(info) for info in find()],
    }
    if not isinstance(fmt, str) or fmt not in makers:
        raise ValueError(f"fmt must be one of {', '.join(makers)}, got {fmt!r}")
    return makers[fmt]()
