"""The table of methods: one record each, registered by one explicit call.

A record ties a name to a config class and to a function of plain tensors. Nothing else in the package names a method.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable
from typing import Any

from hf_lowbit.config import LowBitConfig

# Written out, never discovered: an import error in a method must be seen, not swallowed by a walk.
METHOD_MODULES = (
    "hf_lowbit.methods.adasvd",
    "hf_lowbit.methods.arb",
    "hf_lowbit.methods.bidrn",
    "hf_lowbit.methods.condiquant",
    "hf_lowbit.methods.dvd_quant",
    "hf_lowbit.methods.pbs2p",
    "hf_lowbit.methods.quantcache",
    "hf_lowbit.methods.recalkv",
)

UNITS = ("linear", "conv2d", "attention", "pipeline")
DATA = ("none", "tokens", "prompts", "images", "training")


@dataclasses.dataclass(frozen=True)
class Projection:
    """The key or value projection of an attention layer, as a method of unit "attention" is told of it.

    Attributes:
        name: full name of the module.
        part: "key" or "value".
        heads: how many heads its rows are.
        shape: (out_features, in_features).
    """

    name: str
    part: str
    heads: int
    shape: tuple[int, int]

    @property
    def rows(self) -> int:
        """Rows of a head."""
        return self.shape[0] // self.heads


@dataclasses.dataclass
class LinearUnit:
    """What a method of unit "linear" or "attention" is given, one layer at a time.

    Attributes:
        name: full name of the module, for messages.
        weight: (out_features, in_features), floating; must not be modified.
        trace: rows (JSON types) that a method may append to, such as an error per iteration.
        projection: for unit "attention", what the layer is in its attention.
        changed: (out_features, in_features), set by methods that round another weight than the one they are given and
            will want it in ``finish``.
    """

    name: str
    weight: Any
    trace: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    projection: Projection | None = None
    changed: Any = None


@dataclasses.dataclass
class ModelUnit:
    """What a method that is calibrated on images is given when all layers are packed.

    Attributes:
        model: with its packed layers, in evaluation mode.
        dense: the model as it was, if the config's ``keeps_dense`` asks for it.
        batches: patches as the model receives them, (samples, channels, height, width) each.
        options: of the method.
        changed: ``LinearUnit.changed`` of the layers, by name, if the dense model is kept.
        blocks: names of the model's blocks, in order; empty where it has no list of them.
        run: ``(model, batch) -> images``, float.
    """

    model: Any
    dense: Any
    batches: list[Any]
    options: Any
    changed: dict[str, Any]
    blocks: tuple[str, ...]
    run: Callable[[Any, Any], Any]


@dataclasses.dataclass(frozen=True)
class BlockUnit:
    """A decoder block, as a method's ``plan`` is told of it.

    Attributes:
        name: full name of the block.
        weights: how many weights of it the method compresses, at least 1.
        shapes: (out_features, in_features) of each of its layers that the method compresses.
    """

    name: str
    weights: int
    shapes: tuple[tuple[int, int], ...] = ()


@dataclasses.dataclass(frozen=True)
class Method:
    """Record of a method.

    Attributes:
        name: slug, equal to ``method`` in the config.
        title: short human name.
        summary: one sentence on what it does.
        paper: arXiv identifier.
        config: config class.
        unit: what it works on, one of :data:`UNITS`.
        needs: data of its default options, one of :data:`DATA`.
        format: name of the storage format it returns.
        status: what works today, for the table of methods.
        compress: ``(unit, stats, options) -> Format``; stats is None in a run without data.
        plan: optional look at a whole stack of decoder blocks before the first of them is compressed, in runs with
            data: ``(blocks, options, similarity) -> {block name: number}``. ``similarity()`` runs the dense blocks
            and returns by name the mean cosine of each one's input and output; it costs a pass over the data, so it
            is for the method to call. The numbers are merged into ``layers``, a field that the config must have.
        leaves_dense: optional, for methods that cannot gain on every layer: ``(name, (out_features, in_features),
            options) -> reason or None``. A layer with a reason is not compressed and is listed as left dense. Asked
            after ``plan``.
        cannot_take: optional, of the same arguments and results: layers that the method would compress if it could.
            They stay dense, and the user is told. Asked before ``plan``.
        largest: ``(name, (out_features, in_features), options, dtype of the weight) -> spec``: of the largest form
            that a packed layer can take, by its shape alone; for methods that a budget may choose. Where ``needs`` is
            "none" the form is the same whatever the data are.
        allocate: for unit "attention", in runs with data, in place of ``plan``: ``(projections, options, measures) ->
            {projection name: number}``, merged into ``layers`` as well. ``measures`` looks at the dense blocks when it
            is asked, see :class:`hf_lowbit.compress.measures.StackMeasures`.
        check: for unit "attention": ``(projections, options) -> problems``, asked before any work.
        finish: for methods that need images, ``(model unit) -> {layer name: format}``: what is done with the whole
            model when all layers are packed; returns the layers that were packed anew.
        attach: optional run-time part, ``(model, options)``: prepares modules of a model that has packed layers for
            what else is stored in its files. Called on ``meta`` before a packed model is loaded.
        detach: ``(model)``, undoes ``attach`` where layers are dense again.
    """

    name: str
    title: str
    summary: str
    paper: str
    config: type[LowBitConfig]
    unit: str
    needs: str
    format: str
    status: str
    compress: Callable[..., Any]
    plan: Callable[..., Any] | None = None
    leaves_dense: Callable[[str, tuple[int, int], Any], str | None] | None = None
    cannot_take: Callable[[str, tuple[int, int], Any], str | None] | None = None
    largest: Callable[[str, tuple[int, int], Any, Any], Any] | None = None
    allocate: Callable[..., Any] | None = None
    check: Callable[..., list[str]] | None = None
    finish: Callable[[ModelUnit], dict[str, Any]] | None = None
    attach: Callable[..., Any] | None = None
    detach: Callable[..., Any] | None = None


_METHODS: dict[str, Method] = {}


def register(method: Method) -> None:
    """Add a method.

    Raises:
        ValueError: the name is taken, differs from the config's, or unit or data are unknown.
    """
    if method.name in _METHODS or method.name == "recipe":
        raise ValueError(f"method {method.name!r} is registered already")
    if method.name != method.config.method:
        raise ValueError(f"method {method.name!r} has a config of method {method.config.method!r}")
    if method.unit not in UNITS or method.needs not in DATA:
        raise ValueError(f"method {method.name!r}: unknown unit {method.unit!r} or data {method.needs!r}")
    _METHODS[method.name] = method


def methods() -> dict[str, Method]:
    """Return all methods by name, loading their modules on first use."""
    for module in METHOD_MODULES:
        importlib.import_module(module)
    return dict(sorted(_METHODS.items()))


def get(name: str) -> Method:
    """Return the record of a method; its name may be written with hyphens.

    Raises:
        ValueError: no such method; the message lists those there are.
    """
    found = methods()
    plain = name.replace("-", "_") if isinstance(name, str) else None
    if plain not in found:
        raise ValueError(f"unknown method {name!r}; known: {', '.join(found)}")
    return found[plain]


def method_info(name: str) -> Any:
    """Return what a method compresses, where it sits in the field and whom to cite: a record of ``methods.taxonomy``.

    Raises:
        KeyError: the method has no record; names that are close are listed.
    """
    return importlib.import_module("hf_lowbit.methods").get(name)


def config_class(name: Any) -> type[LowBitConfig]:
    """Return the config class of a method name found in a file; "recipe" is the composite."""
    from hf_lowbit.recipe import LowBitRecipe

    known: dict[str, type[LowBitConfig]] = {key: method.config for key, method in methods().items()}
    known[LowBitRecipe.method] = LowBitRecipe
    if not isinstance(name, str) or name not in known:
        raise ValueError(f"unknown method {name!r}; known: {', '.join(known)}")
    return known[name]
