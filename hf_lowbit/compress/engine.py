"""The compression run: block by block, each calibrated on what the already compressed blocks before it produce.

For one block: load its weights, run it to gather statistics of each linear layer's inputs, replace the layers by
packed ones, run it again to make the next block's inputs. Memory holds the packed part, one dense block and its
activations.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import psutil
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from hf_lowbit import registry
from hf_lowbit.calibration import capture
from hf_lowbit.calibration.data import calibration_tokens
from hf_lowbit.calibration.stats import LinearStats
from hf_lowbit.compress.journal import Journal, run_identity
from hf_lowbit.compress.source import CheckpointSource
from hf_lowbit.compress.targets import Targets, plan_run
from hf_lowbit.config import CalibratedConfig, CalibrationRecord, LowBitConfig
from hf_lowbit.formats import Format
from hf_lowbit.layers import PackedLinear
from hf_lowbit.recipe import LowBitRecipe, rules_of

logger = logging.getLogger(__name__)


@dataclasses.dataclass
class RunReport:
    """What a run did.

    Attributes:
        rows: one per layer, as written to ``RunOptions.report``.
        dense: reason for every linear-like module left dense.
        seconds: duration of the run.
    """

    rows: list[dict[str, Any]]
    dense: dict[str, str]
    seconds: float

    def summary(self) -> str:
        """Return one line: what was packed, what was left dense and why, bits per weight."""
        weights = sum(row["weights"] for row in self.rows)
        stored = sum(row["bytes"] for row in self.rows)
        reasons: dict[str, int] = {}
        for reason in self.dense.values():
            reasons[reason] = reasons.get(reason, 0) + 1
        left = ", ".join(f"{count} × {reason}" for reason, count in reasons.items()) or "none"
        return (
            f"packed {len(self.rows)} layers at {8 * stored / weights:.3f} bits per weight in {self.seconds:.0f} s; "
            f"left dense: {left}"
        )


class Run:
    """One compression of one model in place. Use :func:`compress_model`."""

    def __init__(
        self, model: nn.Module, config: LowBitConfig, targets: Targets, source: CheckpointSource | None
    ) -> None:
        self.model, self.config, self.targets, self.source = model, config, targets, source
        self.options = config.run
        self.rows: list[dict[str, Any]] = []
        self.table: dict[str, dict[str, Any]] = {}
        self.journal: Journal | None = None
        self.bar: Any = None

    def deferred(self, name: str) -> bool:
        """Return whether a layer's dense weight is still in the checkpoint (the model holds a stub)."""
        return self.source is not None and self.linear(name).weight.dim() == 1

    def linear(self, name: str) -> nn.Linear:
        """Return a target layer."""
        return cast(nn.Linear, self.model.get_submodule(name))

    def stored_weight(self, name: str) -> Tensor:
        """Read the dense weight of a deferred layer."""
        if self.source is None:
            raise ValueError(f"{name}: there is no checkpoint to read it from")
        return self.source.read(f"{name}.weight", self.linear(name).weight.dtype)

    def materialize(self, names: list[str]) -> None:
        """Read the dense weights of deferred layers."""
        for name in filter(self.deferred, names):
            linear = self.linear(name)
            linear.weight = nn.Parameter(self.stored_weight(name).to(linear.weight.device), requires_grad=False)

    def check_weights(self) -> None:
        """Refuse a model with non-finite or misshapen weights before the long work starts.

        Raises:
            ValueError: names every module concerned.
        """
        problems = []
        for name in self.targets.methods:
            linear = self.linear(name)
            weight = self.stored_weight(name) if self.deferred(name) else linear.weight
            if tuple(weight.shape) != (linear.out_features, linear.in_features):
                problems.append(f"{name}: weight has shape {tuple(weight.shape)}")
            elif not bool(torch.isfinite(weight).all()):
                problems.append(f"{name}: weight holds NaN or infinity")
        if problems:
            raise ValueError("; ".join(problems))

    def compress_layers(self, names: list[str], stats: dict[str, LinearStats | None]) -> None:
        """Replace layers by their packed form and record them, in order.

        Each layer is computed on one thread and several layers at a time: the many small operations of a fit do not
        profit from more threads, and the result does not depend on how many there are.
        """
        threads = torch.get_num_threads()
        on_cpu = self.linear(names[0]).weight.device.type == "cpu" if names else True
        torch.set_num_threads(1)
        try:
            with ThreadPoolExecutor(max_workers=threads if on_cpu else 1) as pool:
                futures = [pool.submit(self._pack, name, stats[name]) for name in names]
                for name, future in zip(names, futures, strict=True):
                    packed, row = future.result()
                    self._place(name, packed, row)
        finally:
            torch.set_num_threads(threads)
        if self.journal is not None:
            layers = {name: cast(PackedLinear, self.model.get_submodule(name)).packed for name in names}
            self.journal.append(layers, self.rows[-len(names) :], {name: self.table[name] for name in names})

    def restored(self, names: list[str]) -> bool:
        """Take layers from the journal if they are finished; the dense weights are not read then."""
        if self.journal is None or not all(name in self.journal for name in names):
            return False
        for name in names:
            self._place(name, self.journal.packed(name), self.journal.rows[name])
        return True

    def _pack(self, name: str, stats: LinearStats | None) -> tuple[Format, dict[str, Any]]:
        """Compute the packed form of one layer and its row for the report."""
        began = time.perf_counter()
        options = self.targets.methods[name]
        with torch.no_grad():
            unit = registry.LinearUnit(name=name, weight=self.linear(name).weight.detach())
            packed = registry.get(options.method).compress(unit, stats, options)
            packed.validate(name)
            errors = relative_errors(unit.weight, packed.unpack(), stats)
        return packed, {
            "module": name,
            "method": options.method,
            "format": packed.name,
            **errors,
            "bits_per_weight": packed.bits_per_weight,
            "bytes": packed.nbytes,
            "weights": packed.spec.out_features * packed.spec.in_features,
            "calibration_tokens": None if stats is None else stats.tokens,
            "seconds": round(time.perf_counter() - began, 3),
            "trace": unit.trace,
        }

    def _place(self, name: str, packed: Format, row: dict[str, Any]) -> None:
        """Put a packed layer into the model, freeing the dense one, and write its row."""
        linear = self.linear(name)
        self.model.set_submodule(name, PackedLinear(packed, linear.bias, linear.weight.dtype))
        error = row["output_error"]
        self.table[name] = {
            "method": row["method"],
            "format": row["format"],
            "spec": packed.spec.to_json(),
            "error": None if error is None else round(error, 6),
        }
        row.setdefault("resident_bytes", psutil.Process().memory_info().rss)
        self.rows.append(row)
        if self.options.report is not None:
            with open(self.options.report, "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        shown = row["weight_error"] if error is None else error
        self.bar.set_postfix_str(
            f"{_short(name)} error {shown:.4f}, {row['seconds']:.1f} s, {row['resident_bytes'] / 2**30:.2f} GiB", False
        )
        self.bar.update()

    def without_data(self) -> None:
        """Compress every target from its weights alone."""
        names = [name for name in self.targets.methods if not self.restored([name])]
        step = torch.get_num_threads()  # as many dense layers in memory as are worked on
        for start in range(0, len(names), step):
            self.materialize(names[start : start + step])
            self.compress_layers(names[start : start + step], dict.fromkeys(names))

    def block_by_block(self, blocks: dict[str, nn.Module], tokens: Tensor) -> None:
        """Compress the targets of each block, in order, on the outputs of the compressed blocks before it."""
        device = next(iter(self.model.parameters())).device
        batches = [batch.to(device) for batch in tokens.split(self.options.batch_size)]
        modules = list(blocks.values())
        inputs = capture.first_block_inputs(self.model, modules, batches)
        hidden = [states for states, _ in inputs]
        first_calls = [call for _, call in inputs]
        calls: list[list[capture.BlockCall]] | None = None
        for i, (prefix, block) in enumerate(blocks.items()):
            names = [name for name in self.targets.methods if name.startswith(f"{prefix}.")]
            done = self.restored(names)
            if not done:
                self.materialize(names)
            if calls is None:  # the first block's output tells what blocks return, which the recording pass must mimic
                probe = next(iter(capture.run_block(block, hidden[:1], first_calls[:1])))
                wrap = capture.output_wrapper(probe)
                with torch.no_grad():
                    calls = [capture.block_calls(self.model, modules, batch, wrap) for batch in batches]
            own = [call[i] for call in calls]
            if not done:
                self._compress_block(block, names, hidden, own)
            hidden = [capture.hidden_of(output) for output in capture.run_block(block, hidden, own)]

    def _compress_block(
        self, block: nn.Module, names: list[str], hidden: list[Tensor], calls: list[capture.BlockCall]
    ) -> None:
        linears = {name: self.linear(name) for name in names}
        needy = {name: m for name, m in linears.items() if self.targets.methods[name].needs != "none"}
        with capture.collect_stats(needy, [len(states) for states in hidden]) as stats:
            if needy:
                for _ in capture.run_block(block, hidden, calls):
                    pass
        # a layer that no token reached gets empty statistics, which raise, naming it, when a method asks for them
        found = {name: stats.get(name) or LinearStats(name, linears[name].in_features) for name in needy}
        self.compress_layers(names, {name: found.get(name) for name in names})


def _short(name: str) -> str:
    """Return block number and last part of a module name, enough to follow a run."""
    parts = name.split(".")
    number = next((part for part in parts if part.isdigit()), "")
    return f"{number}.{parts[-1]}" if number else parts[-1]


def relative_errors(weight: Tensor, approximation: Tensor, stats: LinearStats | None) -> dict[str, float | None]:
    """Squared relative errors of a layer.

    Args:
        weight: (n, m), the original.
        approximation: (n, m).
        stats: of the layer's inputs, or None.

    Returns:
        ``weight_error`` ‖W-Q‖²/‖W‖² and ``output_error`` Tr(R S Rᵀ)/Tr(W S Wᵀ) with R = W - Q; the latter None without
        statistics. After compensation the former may rise; the latter is the one to watch. 0 for a zero denominator.
    """
    weight = weight.float()
    residual = weight - approximation

    def ratio(moment: Tensor | None) -> float:
        parts = [
            float(((m if moment is None else m @ moment) * m).sum(dtype=torch.float64)) for m in (residual, weight)
        ]
        return parts[0] / parts[1] if parts[1] else 0.0

    return {"weight_error": ratio(None), "output_error": None if stats is None else ratio(stats.second_moment())}


def check_calibration(config: LowBitConfig) -> CalibratedConfig | None:
    """Return the config that names the calibration data of a run, None if it needs none.

    Raises:
        ValueError: rules of a recipe ask for different data.
    """
    needy = [rule for _, rule in rules_of(config) if rule.needs != "none" and isinstance(rule, CalibratedConfig)]
    if not needy:
        return None
    first = needy[0]
    for other in needy[1:]:
        for field in ("calibration", "samples", "sequence_length", "seed"):
            if getattr(other, field) != getattr(first, field):
                raise ValueError(f"all rules of a recipe share one calibration; {field} differs between them")
    return first


def compress_model(
    model: nn.Module, config: LowBitConfig, source: CheckpointSource | None = None, tokenizer: Any = None
) -> tuple[LowBitConfig, RunReport]:
    """Compress a model in place. A run that fails half-way leaves the model half compressed: load it again.

    Args:
        model: a decoder with finite weights; layers whose weight is a stub of one element are read from ``source``.
        config: a method's config or a recipe.
        source: checkpoint that still holds deferred weights.
        tokenizer: for calibration text, unless ``config.run`` has one.

    Returns:
        The config to save (module table and calibration record filled in) and the report of the run.

    Raises:
        ValueError, CalibrationError, UnsupportedModelError: before the long work, naming what is wrong.
    """
    began = time.perf_counter()
    calibrated = check_calibration(config)
    blocks, targets = plan_run(model, config, calibrated is not None)
    run = Run(model, config, targets, source)
    if targets.unwanted:
        listed = "; ".join(f"{name}: {reason}" for name, reason in targets.unwanted.items())
        logger.warning("%d layers stay dense although nothing skips them (%s)", len(targets.unwanted), listed)
    run.check_weights()
    record: CalibrationRecord | None = None
    was_training = model.training
    model.eval()
    if calibrated is not None:
        embeddings = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
        tokens, record = calibration_tokens(calibrated, config.run.tokenizer or tokenizer, embeddings)
    if config.run.journal is not None:
        if source is None:
            raise ValueError("a journal needs a dense checkpoint in safetensors files, to know it again")
        identity = run_identity(config.to_dict(), None if record is None else record.sha256, source.files)
        run.journal = Journal(Path(config.run.journal), identity, config.run.resume)
    if config.run.report is not None:
        Path(config.run.report).write_text("", encoding="utf-8")
    run.bar = tqdm(total=len(targets.methods), desc="compressing", unit="layer", disable=not config.run.progress)
    try:
        with torch.no_grad():
            if blocks is None:
                run.without_data()
            else:
                run.block_by_block(blocks, tokens)
    finally:
        run.bar.close()
    model.train(was_training)
    report = RunReport(run.rows, targets.dense, time.perf_counter() - began)
    logger.info(report.summary())
    return _finished(config, run.table, targets.dense, record), report


def _finished(
    config: LowBitConfig, table: dict[str, Any], dense: dict[str, str], record: CalibrationRecord | None
) -> LowBitConfig:
    """Return the config as it is saved: with the tables of the run, and with a record instead of the data."""

    def recorded(rule: Any) -> Any:
        known = isinstance(rule, CalibratedConfig) and rule.needs != "none"
        return dataclasses.replace(rule, calibration=record) if known else rule

    if isinstance(config, LowBitRecipe):
        rules = tuple((pattern, recorded(rule)) for pattern, rule in config.rules)
        return dataclasses.replace(config, rules=rules, modules=table, left_dense=dense)
    return dataclasses.replace(recorded(config), modules=table, left_dense=dense)
