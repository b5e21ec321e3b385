"""A run with a budget chooses among the candidates of its rules, layer by layer, before the first is compressed.

How it chooses: every candidate is tried on every layer of the dense model, one block in memory at a time, and what it
loses is measured. The least sum of these errors that the budget allows is found exactly
(:mod:`hf_lowbit.numerics.allocation`). What a layer takes is known from its shape; where it depends on the data (how
many columns are salient) the most that it can take counts, so that nothing that happens later exceeds the budget.

The error of a calibrated run is a prediction of how much the loss of a token rises: ``½ Σ_r γ_r (R S Rᵀ)_rr`` with the
residual R, the mean S of x xᵀ over the layer's inputs, and the curvature γ of the loss along the layer's outputs
(``StackMeasures.sensitivity``). So errors of different layers add up. It leaves out how errors of several layers
interact, is too small where they are large, and does not see the rounding of activations. A run without data has
only the weights: the error is ``‖R‖²/‖W‖²``, and all layers count alike.

Source: the quadratic model of the loss is that of optimal brain surgeon and K-FAC (arXiv 1503.05671), here with the
output's matrix made diagonal, so that memory holds a vector for each layer.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from hf_lowbit import registry
from hf_lowbit.budget import is_calibrated, settings_text
from hf_lowbit.calibration.stats import LinearStats
from hf_lowbit.compress.measures import StackMeasures
from hf_lowbit.config import LowBitConfig
from hf_lowbit.errors import CalibrationError, CheckpointError, UnsupportedModelError
from hf_lowbit.formats import FORMATS, Spec
from hf_lowbit.layers import dense_weight
from hf_lowbit.numerics.allocation import allocate, needed_library
from hf_lowbit.recipe import LowBitRecipe, rules_of

if TYPE_CHECKING:
    from hf_lowbit.compress.engine import Run

logger = logging.getLogger(__name__)
# Sequences and tokens of each that gradients are taken of: enough to order layers, and memory keeps their states.
GRADIENT_SAMPLES, GRADIENT_LENGTH = 16, 512
# Name under which the journal keeps what was chosen; no block is called so.
JOURNAL = "budget"
_SHARD = 5 * 10**9
Row = dict[str, Any]


def without_choice(config: LowBitConfig) -> LowBitConfig:
    """Return a config with the first candidate of every rule, by which layers are found before one is chosen."""
    if not isinstance(config, LowBitRecipe) or not config.is_open:
        return config

    def first(own: Any) -> Any:
        takes_all = (one for one in own if registry.get(one.method).cannot_take is None)
        return next(takes_all, own[0])

    rules = tuple((pattern, first(own) if isinstance(own, tuple) else own) for pattern, own in config.rules)
    return dataclasses.replace(config, rules=rules, target_bits_per_weight=None, target_bytes=None, plan=None)


class Budget:
    """What a run may choose from, and how much room there is.

    Attributes:
        candidates: of each layer that has several, in model order: those that can take it.
        sizes: the most bytes that each of these can take.
        room: bytes that the chosen ones may take together.
        plan: rows of the choice, once it is made; see :mod:`hf_lowbit.budget`.
    """

    def __init__(self, run: Run) -> None:
        """Find the candidates of every layer; those that none can take are left dense.

        Raises:
            ValueError: the budget is below what the smallest candidates take, a rule plans sizes of its own, or SciPy
                is not installed.
            UnsupportedModelError: a calibrated run of an encoder and a decoder.
        """
        config = run.config
        if not isinstance(config, LowBitRecipe):
            raise TypeError("only a recipe has candidates")
        try:
            needed_library()
        except ImportError as error:
            raise ValueError(str(error)) from error
        if len(run.stacks) > 1:
            raise UnsupportedModelError(
                f"{type(run.model).__name__} is an encoder and a decoder, where a budget can only be kept without "
                "data: set calibration=None in every candidate"
            )
        self._run, self._recipe = run, config
        settled = {id(one): _settled(one) for _, one in rules_of(config)}
        self._rules = tuple(
            (pattern, tuple(settled[id(one)] for one in own) if isinstance(own, tuple) else own)
            for pattern, own in config.rules
        )
        among = {
            id(old): new
            for (_, own), (_, new) in zip(config.rules, self._rules, strict=True)
            if isinstance(own, tuple)
            for old in own
        }
        self.candidates: dict[str, list[LowBitConfig]] = {}
        self.sizes: dict[str, list[int]] = {}
        self.plan: tuple[Row, ...] = ()
        self._header = 0  # bytes of a header for each entry of a tensor
        fixed = self._fixed_bytes() if config.target_bytes is not None else 0
        dense = 0  # weights that a rule covers and that stay as they are
        for name in list(run.targets.methods):
            taken, left = self._look_at(name, among)
            fixed, dense = fixed + taken, dense + left
        weights = sum(math.prod(run.weights.shape_of(name)) for name in run.targets.methods) - dense
        if config.target_bits_per_weight is not None:
            total = math.floor(config.target_bits_per_weight * weights / 8)
        else:
            total = int(config.target_bytes or 0)
        self.room = total - fixed
        least = sum(min(own) for own in self.sizes.values())
        if least > self.room:
            raise ValueError(self._refusal(fixed + least, weights))

    def _look_at(self, name: str, among: dict[int, tuple[LowBitConfig, ...]]) -> tuple[int, int]:
        """List the candidates of a layer; return the bytes of one without, and its weights if it stays dense."""
        run, methods = self._run, self._run.targets.methods
        own = among.get(id(methods[name]))
        if own is None and run.reason_to_leave(name, methods[name]):
            return self._dense_bytes(name), math.prod(run.weights.shape_of(name))
        if own is None:
            return self._bytes(name, methods[name]), 0
        reasons = {id(one): run.reason_to_leave(name, one, wanted=True) for one in own}
        fitting = [one for one in own if reasons[id(one)] is None]
        if not fitting:
            del methods[name]
            run.targets.dense[name] = str(reasons[id(own[0])])
            return self._dense_bytes(name), 0
        methods[name] = fitting[0]
        self.candidates[name], self.sizes[name] = fitting, [self._bytes(name, one) for one in fitting]
        return 0, 0

    def _bytes(self, name: str, rule: LowBitConfig) -> int:
        """Return the most bytes of a packed layer, with those of its headers where files are counted."""
        method = registry.get(rule.method)
        plans = is_calibrated(rule) and getattr(rule, "importance", "uniform") != "uniform"
        if method.largest is None:
            raise ValueError(
                f"{name}: beside a budget, {rule.method} cannot be used: its size is not known from a shape"
            )
        if plans and getattr(rule, "layers", None) is None:
            raise ValueError(
                f"{name}: {rule.method} plans sizes itself; beside a budget, give it importance='uniform'"
            )
        dense: Any = self._run.weights.dtype_of(name)
        spec: Spec = method.largest(name, self._run.weights.shape_of(name), rule, dense)
        form = FORMATS[method.format]
        tensors = [f"{name}.weight_{part}" for part in form.shapes(spec)]
        return form.bytes_of(spec) + sum(map(self._header_bytes, tensors))

    def _dense_bytes(self, name: str) -> int:
        """Return the bytes of a weight that stays dense after all, where files are counted."""
        if self._recipe.target_bytes is None:
            return 0
        return math.prod(self._run.weights.shape_of(name)) * int(self._run.weights.dtype_of(name).itemsize)

    def _header_bytes(self, tensor: str) -> int:
        """Return the most that files say of one tensor: entry of a header, checksum, under two names."""
        return self._header * (2 * len(tensor) + 300)

    def _fixed_bytes(self) -> int:
        """Return the bytes of the weight files beside packed layers: dense tensors, stubs, headers."""
        run = self._run
        tensors: dict[int, Tensor] = {}
        names: list[str] = []
        for name, tensor in run.model.state_dict(keep_vars=True).items():
            names.append(name)
            tensors[id(tensor)] = tensor
        found = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        for name in run.targets.methods:
            size = run.weights.dtype_of(name).itemsize
            found -= (math.prod(run.weights.shape_of(name)) - 1) * size  # a stub is left
        self._header = 1 + found // _SHARD  # every file holds all checksums
        return found + 4096 + sum(map(self._header_bytes, names))

    def _refusal(self, least: int, weights: int) -> str:
        if self._recipe.target_bytes is not None:
            return (
                f"target_bytes={self._recipe.target_bytes} cannot be met: with the smallest candidate of every layer "
                f"the weight files may take {least} bytes, which is the nearest target"
            )
        bits = math.ceil(8000 * least / weights) / 1000
        return (
            f"target_bits_per_weight={self._recipe.target_bits_per_weight:g} cannot be met: the smallest candidates "
            f"of all layers may take {least} bytes, so {bits:g} is the nearest target"
        )

    # The choice --------------------------------------------------------------------------------------------------

    def decide(self) -> None:
        """Choose, and put the choice into the run's config and targets.

        Raises:
            CheckpointError: the journal's choice does not fit the run.
            CalibrationError: an error or a gradient is not finite.
        """
        run, names = self._run, list(self.candidates)
        recorded = None if run.journal is None else run.journal.plans.get(JOURNAL)
        if recorded is not None:
            chosen, sizes, errors = self._recorded(recorded)
        else:
            sizes, wrong = self._measured()
            picks = allocate([sizes[name] for name in names], [wrong[name] for name in names], self.room)
            chosen = dict(zip(names, picks, strict=True))
            errors = {name: wrong[name][chosen[name]] for name in names}
            if run.journal is not None and run.team.leads:
                own = {name: sizes[name][chosen[name]] for name in names}
                run.journal.append_plan(JOURNAL, {"choice": dict(chosen), "bytes": dict(own), "error": dict(errors)})
        taken = {name: sizes[name][chosen[name]] for name in names}
        self._adopt({name: self.candidates[name][chosen[name]] for name in names}, taken, errors)
        shown = sum(row["bytes"] for row in self.plan)
        logger.info("budget: %d layers take at most %d of %d bytes", len(names), shown, self.room)
        if run.options.on_plan is not None and run.team.leads:
            run.options.on_plan(self.plan)

    def _recorded(self, plan: Any) -> tuple[dict[str, int], dict[str, list[int]], dict[str, float]]:
        """Return choice, sizes and errors as the journal has them."""
        names = list(self.candidates)
        parts = [plan.get(part, {}) for part in ("choice", "bytes", "error")]
        fits = all(set(part) == set(names) for part in parts) and all(
            type(parts[0][name]) is int
            and 0 <= parts[0][name] < len(self.candidates[name])
            and 0 <= parts[1][name] <= self.sizes[name][parts[0][name]]
            for name in names
        )
        if not fits or sum(parts[1].values()) > self.room:
            raise CheckpointError("the journal's choice under the budget does not fit this run")
        sizes = {name: [int(parts[1][name])] * len(self.candidates[name]) for name in names}
        return parts[0], sizes, parts[2]

    def _adopt(self, chosen: dict[str, LowBitConfig], sizes: dict[str, int], errors: dict[str, float]) -> None:
        run = self._run
        run.targets.methods.update(chosen)
        rules = []
        for pattern, own in self._rules:
            for one in own if isinstance(own, tuple) else ():
                names = [name for name, rule in chosen.items() if rule is one]
                rules += [("|".join(names), one)] if names else []
            rules += [] if isinstance(own, tuple) else [(pattern, own)]
        known = {pattern for pattern, _ in rules} | set(self._recipe.skip)
        optional = tuple(pattern for pattern in self._recipe.optional if pattern in known)
        self.plan = self._rows(chosen, sizes, errors)
        run.config = dataclasses.replace(self._recipe, rules=tuple(rules), plan=self.plan, optional=optional)

    def _rows(
        self, chosen: dict[str, LowBitConfig], sizes: dict[str, int], errors: dict[str, float]
    ) -> tuple[Row, ...]:
        """Return the plan: a row for each kind of layer and choice."""
        groups: dict[tuple[str, int], list[str]] = {}
        for name, rule in chosen.items():
            groups.setdefault((_kind(name), id(rule)), []).append(name)
        kinds = list(dict.fromkeys(kind for kind, _ in groups))
        ordered = sorted(groups.values(), key=lambda own: (kinds.index(_kind(own[0])), -sum(sizes[n] for n in own)))
        rows = []
        for names in ordered:
            rule, weights = chosen[names[0]], sum(math.prod(self._run.weights.shape_of(name)) for name in names)
            rows.append(
                {
                    "layers": _kind(names[0]),
                    "number": len(names),
                    "method": rule.method,
                    "settings": settings_text(rule, self.candidates[names[0]])[:500],
                    "weights": weights,
                    "bytes": sum(sizes[name] for name in names),
                    "error": float(f"{sum(errors[name] for name in names):.6g}"),
                }
            )
        return tuple(rows)

    # Errors ------------------------------------------------------------------------------------------------------

    def _measured(self) -> tuple[dict[str, list[int]], dict[str, list[float]]]:
        """Try every candidate on every layer of the dense model; return by layer their bytes and errors."""
        run, sizes, errors = self._run, dict[str, list[int]](), dict[str, list[float]]()
        progress = run.options.progress and run.team.leads
        with tqdm(total=len(self.candidates), desc="choosing", unit="layer", disable=not progress) as bar:
            for name, weight, stats, curvature in self._dense_layers():
                found = self._tried(name, weight, stats, curvature)
                bad = [error for _, error in found if not math.isfinite(error)]
                if bad:
                    raise CalibrationError(f"{name}: the error of a candidate is not finite")
                sizes[name], errors[name] = [size for size, _ in found], [error for _, error in found]
                bar.update()
        return sizes, errors

    def _dense_layers(self) -> Iterator[tuple[str, Tensor, LinearStats | None, Tensor | None]]:
        """Yield name, dense weight, inputs and curvature of every layer with candidates."""
        run, names = self._run, list(self.candidates)
        if not run.calibrated:
            for name in names:
                deferred = run.weights.materialize([name])
                yield name, dense_weight(run.model.get_submodule(name)), None, None
                run.weights.put_off(deferred)
            return
        device = next(iter(run.model.parameters())).device
        measures = StackMeasures(run, run.stacks[0], [batch.to(device) for batch in run.batches])
        curvature = measures.sensitivity(names, GRADIENT_SAMPLES, GRADIENT_LENGTH)
        for name, weight, stats in measures.dense_inputs(names):
            yield name, weight, stats, curvature[name]

    def _tried(
        self, name: str, weight: Tensor, stats: LinearStats | None, curvature: Tensor | None
    ) -> list[tuple[int, float]]:
        """Return bytes and error of every candidate of a layer; processes and threads share the candidates."""
        run, own = self._run, self.candidates[name]
        table = torch.zeros((len(own), 2), dtype=torch.float64)
        if curvature is not None and stats is None:  # an expert that no token reaches: nothing is known against it
            return [(size, 0.0) for size in self.sizes[name]]
        mean = None if stats is None else (stats.total / max(stats.tokens, 1)).float()

        def try_one(number: int) -> None:
            rule = own[number]
            method = registry.get(rule.method)
            with torch.no_grad():
                unit = registry.LinearUnit(name=name, weight=weight)
                packed = method.compress(unit, stats if is_calibrated(rule) else None, rule)
                # of a form that does not depend on data the bytes are known now, and may be fewer
                spared = self._bytes_spared(name, number, packed.nbytes) if method.needs == "none" else 0
                table[number, 0] = self.sizes[name][number] - spared
                table[number, 1] = _error(weight, packed.unpack(), mean, curvature)

        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        failure: Exception | None = None
        try:
            with ThreadPoolExecutor(max_workers=threads if weight.device.type == "cpu" else 1) as pool:
                for _ in pool.map(try_one, run.team.share(range(len(own)))):
                    pass
        except Exception as error:  # the other processes wait for the sum below
            failure = error
            table.fill_(math.nan)
        finally:
            torch.set_num_threads(threads)
        table = run.team.total(table)
        if failure is not None:
            raise failure
        return [(int(size) if math.isfinite(size) else 0, float(error)) for size, error in table.tolist()]

    def _bytes_spared(self, name: str, number: int, real: int) -> int:
        rule = self.candidates[name][number]
        largest: Any = registry.get(rule.method).largest
        spec = largest(name, self._run.weights.shape_of(name), rule, self._run.weights.dtype_of(name))
        return max(0, FORMATS[registry.get(rule.method).format].bytes_of(spec) - real)


def _kind(name: str) -> str:
    """Return the last part of a layer's name that is no number."""
    return next((part for part in reversed(name.split(".")) if not part.isdigit()), name)


def _settled(config: LowBitConfig) -> LowBitConfig:
    """Return a candidate whose method does not plan sizes of its own: the budget does."""
    has_plan = registry.get(config.method).plan is not None
    return dataclasses.replace(config, importance="uniform") if has_plan else config  # type: ignore[call-arg]


def _error(weight: Tensor, approximation: Tensor, mean: Tensor | None, curvature: Tensor | None) -> float:
    """Return what a layer loses, see the module's text; 0 for a weight of zeros."""
    weight = weight.float()
    residual = weight - approximation.to(weight.device)
    if mean is None or curvature is None:
        parts = [float(part.square().sum(dtype=torch.float64)) for part in (residual, weight)]
        return parts[0] / parts[1] if parts[1] else 0.0
    rows = ((residual @ mean.to(weight.device)) * residual).sum(1, dtype=torch.float64).clamp(min=0)
    return 0.5 * float(rows.cpu() @ curvature)
