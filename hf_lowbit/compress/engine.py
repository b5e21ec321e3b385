"""The compression run: block by block, each calibrated on what the already compressed blocks before it produce.

For one block: load its weights, run it to gather statistics of each linear layer's inputs, replace the layers by
packed ones, run it again to make the next block's inputs. Memory holds the packed part, one dense block and its
activations. A run without data takes the layers in the order in which they come.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Generator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from hf_lowbit import registry
from hf_lowbit.calibration import capture
from hf_lowbit.calibration.data import calibration_tokens
from hf_lowbit.calibration.stats import LinearStats, PairedStats
from hf_lowbit.compress import observation
from hf_lowbit.compress.agreement import check_calibration
from hf_lowbit.compress.budget import Budget, without_choice
from hf_lowbit.compress.dense import DenseWeights
from hf_lowbit.compress.image_run import draw_patches, run_on_images
from hf_lowbit.compress.journal import LINES, Journal, run_identity
from hf_lowbit.compress.measures import StackMeasures
from hf_lowbit.compress.memory import give_back_memory, keep_memory_in_pieces
from hf_lowbit.compress.outcome import RunReport, finished_config, relative_errors
from hf_lowbit.compress.planning import plan_stack
from hf_lowbit.compress.projections import is_for_attention, projection_of
from hf_lowbit.compress.runtime import attach_runtime
from hf_lowbit.compress.source import CheckpointSource
from hf_lowbit.compress.targets import plan_run
from hf_lowbit.compress.team import Result, Team
from hf_lowbit.config import CalibratedConfig, CalibrationRecord, LowBitConfig
from hf_lowbit.errors import CheckpointError, UnsupportedModelError
from hf_lowbit.experts import fused_name, put_together
from hf_lowbit.formats import Format
from hf_lowbit.image_config import ImageConfig
from hf_lowbit.layers import PackedLinear, dense_weight, features
from hf_lowbit.recipe import LowBitRecipe

logger = logging.getLogger(__name__)


class Run:
    """One compression of one model in place: everything is checked when it is made, the work is done afterwards.

    The model may be on ``meta`` at first; see :class:`~hf_lowbit.compress.intake.Intake` for how weights arrive.

    Attributes:
        targets: what is compressed, and by which method.
        weights: the dense weights, where they lie.
        calibrated: whether the run needs data.
        report: of the run, when it is finished.
    """

    def __init__(
        self, model: nn.Module, config: LowBitConfig, source: CheckpointSource | None = None, tokenizer: Any = None
    ) -> None:
        """Check and prepare.

        Args:
            model: a model with finite weights, in memory or on ``meta``.
            config: a method's config or a recipe.
            source: the dense checkpoint, if weights are read from it.
            tokenizer: for calibration text, unless ``config.run`` has one.

        Raises:
            ValueError, CalibrationError, UnsupportedModelError: before the long work, naming what is wrong.
        """
        self.model, self.config, self.options = model, config, config.run
        self.weights = DenseWeights(model, source)
        self.began = time.perf_counter()
        self.team = Team()
        keep_memory_in_pieces()
        calibrated = check_calibration(config)
        self.calibrated = calibrated is not None
        self.on_images = isinstance(calibrated, ImageConfig)  # the whole model at once, so it need have no blocks
        self.stacks, self.targets = plan_run(model, without_choice(config), self.calibrated and not self.on_images)
        self.budget = Budget(self) if isinstance(config, LowBitRecipe) and config.is_open else None
        if self.targets.unwanted:
            listed = "; ".join(f"{name}: {reason}" for name, reason in self.targets.unwanted.items())
            logger.warning("%d layers stay dense although nothing skips them (%s)", len(self.targets.unwanted), listed)
        self._refuse_idle_run()
        self.weights.take_apart_experts(self.targets.methods)
        self.weights.check(self.targets.methods)
        self.record: CalibrationRecord | None = None
        self.batches: list[Tensor] = []
        if isinstance(calibrated, ImageConfig):
            self.batches, self.record = draw_patches(self, calibrated)
        elif calibrated is not None:
            self._draw(calibrated, tokenizer)
        self.changed: dict[str, Any] | None = None  # see compress_layers
        self.gradients: dict[str, Tensor] = {}  # of the loss with respect to outputs, see LowBitConfig.streams
        self.owner: dict[str, int] = {}  # rank of the process that packs a layer
        self.idle: set[str] = set()  # experts that no calibration token reached
        self.rows: dict[str, dict[str, Any]] = {}
        self.table: dict[str, dict[str, Any]] = {}
        self.journal = self._open_journal()
        if self.options.report is not None and self.team.leads:
            Path(self.options.report).write_text("", encoding="utf-8")
        self.bar: Any = None
        self.report: RunReport | None = None

    def _refuse_idle_run(self) -> None:
        """Refuse a run in which every method would gain nothing on every layer.

        Raises:
            UnsupportedModelError: says why.
        """
        reasons: dict[str, None] = dict.fromkeys(self.targets.unwanted.values())
        for name in self.targets.methods:
            reason = self.reason_to_leave(name, self.targets.methods[name])
            if reason is None:
                return
            reasons[reason] = None
        raise UnsupportedModelError(f"no layer would be compressed, all stay dense ({'; '.join(reasons)})")

    @property
    def deferred(self) -> bool:
        """Whether weights are put off while a model is loaded: what is done with them is not known then."""
        return self.calibrated or self.budget is not None

    def reason_to_leave(self, name: str, options: LowBitConfig, wanted: bool = False) -> str | None:
        """Return why a method gains nothing on a layer, or if ``wanted`` cannot take it; asked by shape alone."""
        method = registry.get(options.method)
        asked = [method.leaves_dense, *([method.cannot_take] if wanted else [])]
        reasons = (
            reason_for(name, self.weights.shape_of(name), options) for reason_for in asked if reason_for is not None
        )
        return next((reason for reason in reasons if reason is not None), None)

    def _draw(self, calibrated: CalibratedConfig, tokenizer: Any) -> None:
        """Draw the calibration tokens, and take the share of this process."""
        embeddings = self.model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
        tokens, self.record = calibration_tokens(calibrated, self.options.tokenizer or tokenizer, embeddings)
        batches = tokens.split(self.options.batch_size)
        self.team.refuse_few(len(batches))
        self.batches = self.team.share(batches)

    def _open_journal(self) -> Journal | None:
        """Open the journal; the leading process is first, since it may have to make or mend it."""
        if self.options.journal is None:
            return None
        source = self.weights.source
        if source is None or not source.files:
            raise ValueError("a journal needs a dense checkpoint in safetensors files, to know it again")
        tokens_hash = None if self.record is None else self.record.sha256
        identity = run_identity(self.config.to_dict(), tokens_hash, source.files)
        folder = Path(self.options.journal)
        if self.team.leads:
            journal = Journal(folder, identity, self.options.resume)
        self.team.wait()
        if not self.team.leads:
            if not (folder / LINES).is_file():
                raise ValueError(f"{folder}: all processes must see this folder, and this one does not")
            journal = Journal(folder, identity, resume=True)
        return journal

    # Layers ------------------------------------------------------------------------------------------------------

    @property
    def at_once(self) -> int:
        """How many layers are worked on at a time, by all processes together.

        Of several processes, each gets about two, so that one large layer is not waited for.
        """
        layers = self.team.smallest(torch.get_num_threads()) * self.team.size
        return layers if self.team.size == 1 else 2 * layers

    def leave_dense(self, names: list[str]) -> list[str]:
        """Leave those layers dense on which their method would gain nothing, with their weights; return the others.

        Experts of which none is packed go back into the one parameter that they come from.
        """
        methods = self.targets.methods
        reasons = {name: reason for name in names if (reason := self.reason_to_leave(name, methods[name]))}
        self.weights.materialize(list(reasons))
        for name, reason in reasons.items():
            del self.targets.methods[name]
            self.targets.dense[name] = reason
            logger.info("%s stays dense: %s", name, reason)
        for parameter in dict.fromkeys(filter(None, map(fused_name, reasons))):
            if not any(fused_name(name) == parameter for name in self.targets.methods):
                owner, _, leaf = parameter.rpartition(".")
                put_together(self.model.get_submodule(owner), leaf)
                own = [name for name in self.targets.dense if fused_name(name) == parameter]
                self.targets.dense[parameter] = self.targets.dense[own[0]]
                for name in own:
                    del self.targets.dense[name]
        return [name for name in names if name not in reasons]

    def compress_layers(
        self,
        names: list[str],
        stats: Mapping[str, LinearStats | PairedStats],
        journal: bool = True,
        changed: dict[str, Any] | None = None,
    ) -> None:
        """Replace layers by their packed form and record them, in order.

        Args:
            names: of the layers.
            stats: of their inputs.
            journal: whether they are finished, so that a later run need not do them again.
            changed: gets the weights that a method has rounded in place of those it was given.
        """
        self.changed = changed
        packed = self._replace(names, stats)
        if journal:
            self._record(packed)

    def _record(self, layers: dict[str, Format]) -> None:
        """Put packed layers into the journal: each process writes a file of those that it packed."""
        if self.journal is None:
            return
        shares = [[name for name in layers if self.owner[name] == rank] for rank in range(self.team.size)]
        shares = [share for share in shares if share]
        own = next((i for i, share in enumerate(shares) if self.owner[share[0]] == self.team.rank), None)
        digest, failure = None, None
        try:
            if own is not None:
                digest = self.journal.store({name: layers[name] for name in shares[own]}, own)
        except Exception as error:  # a full disk, say
            failure = error
        digests = filter(None, self.team.gather(digest, failure))
        self.journal.append(
            [
                {"sha256": digest, "rows": [self.rows[name] for name in share], "modules": self._table_of(share)}
                for share, digest in zip(shares, digests, strict=True)
            ],
            write=self.team.leads,
        )
        for name in layers:  # from now on it is pages of the journal: memory holds one block, not all that is packed
            layer: Any = self.model.get_submodule(name)
            if layer.weight.device.type == "cpu":
                kept = self.journal.packed(name)
                self.model.set_submodule(name, type(layer)(kept, layer.bias, layer.weight.dtype))

    def _replace(self, names: list[str], stats: Mapping[str, LinearStats | PairedStats]) -> dict[str, Format]:
        """Replace layers by their packed form, which is returned.

        Each layer is computed on one thread and several layers at a time: the many small operations of a fit do not
        profit from more threads, and the result does not depend on how many there are.
        """
        if not names:
            return {}
        threads = torch.get_num_threads()
        weight: Any = self.model.get_submodule(names[0]).weight
        sizes = {name: math.prod(features(self.model.get_submodule(name))) for name in names}
        self.owner |= self.team.owners(sizes)
        mine = [name for name in names if self.owner[name] == self.team.rank]
        own: dict[str, Result] = {}
        failure: Exception | None = None
        torch.set_num_threads(1)
        try:
            with ThreadPoolExecutor(max_workers=threads if weight.device.type == "cpu" else 1) as pool:
                futures = {name: pool.submit(self._pack, name, stats.get(name)) for name in mine}
                own = {name: future.result() for name, future in futures.items()}
        except Exception as error:  # the other processes must hear of it before it is raised
            failure = error
        finally:
            torch.set_num_threads(threads)
        packed = self.team.exchange(names, own, failure)
        for name, (layer, row, changed) in packed.items():
            self._place(name, layer, row)
            if self.changed is not None and changed is not None:
                self.changed[name] = changed
        give_back_memory()
        return {name: layer for name, (layer, _, _) in packed.items()}

    def _table_of(self, names: list[str]) -> dict[str, dict[str, Any]]:
        return {name: self.table[name] for name in names}

    def restored(self, names: list[str]) -> bool:
        """Take layers from the journal if they are finished; the dense weights are not read then."""
        if self.journal is None or not all(name in self.journal for name in names):
            return False
        for name in names:
            packed = self.journal.packed(name)
            shape = (packed.spec.out_features, packed.spec.in_features)
            if shape != features(self.model.get_submodule(name)):
                raise CheckpointError(
                    f"{self.journal.folder.name}: {name} is recorded as {shape[0]} x {shape[1]}, which is not its size"
                )
            self._place(name, packed, self.journal.rows[name])
        return True

    def _pack(self, name: str, stats: LinearStats | PairedStats | None) -> Result:
        """Compute the packed form of one layer, its row for the report, and the changed weight if that is kept."""
        began = time.perf_counter()
        options = self.targets.methods[name]
        with torch.no_grad():
            weight = dense_weight(self.model.get_submodule(name))
            projection = projection_of(self.model, name) if is_for_attention(options) else None
            if isinstance(stats, PairedStats):
                stats.gradients = self.gradients.get(name)
            unit = registry.LinearUnit(name=name, weight=weight, projection=projection)
            packed = registry.get(options.method).compress(unit, stats, options)
            packed.validate(name)
            errors = relative_errors(unit.weight, packed.unpack(), stats)
        row = {
            "module": name,
            "method": options.method,
            "format": packed.name,
            **errors,
            "bits_per_weight": packed.bits_per_weight,
            "bytes": packed.nbytes,
            "weights": packed.spec.out_features * packed.spec.in_features,
            "calibration_tokens": (0 if name in self.idle else None) if stats is None else stats.tokens,
            "seconds": round(time.perf_counter() - began, 3),
            "resident_bytes": psutil.Process().memory_info().rss,
            "trace": unit.trace,
        }
        return packed, row, None if self.changed is None else unit.changed

    def _place(self, name: str, packed: Format, row: dict[str, Any]) -> None:
        """Put a packed layer into the model, freeing the dense one, and write its row."""
        dense: Any = self.model.get_submodule(name)
        device = dense.weight.device
        if device.type != "meta":
            packed = packed.to(device)
        self.model.set_submodule(name, PackedLinear.replacing(dense, packed))
        error = row["output_error"]
        self.table[name] = {
            "method": row["method"],
            "format": row["format"],
            "spec": packed.spec.to_json(),
            "error": None if error is None else round(error, 6),
        }
        self.rows[name] = row
        if self.options.report is not None and self.team.leads:
            with open(self.options.report, "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        shown = row["weight_error"] if error is None else error
        memory = psutil.Process().memory_info().rss / 2**30
        bar = self.progress()
        bar.set_postfix_str(f"{_short(name)} error {shown:.4f}, {row['seconds']:.1f} s, {memory:.2f} GiB", False)
        bar.update()

    def progress(self) -> Any:
        """Return the progress bar, which starts with the first layer."""
        if self.bar is None:
            shown = self.options.progress and self.team.leads
            total = len(self.targets.methods)
            self.bar = tqdm(total=total, desc="compressing", unit="layer", disable=not shown)
        return self.bar

    # The work ----------------------------------------------------------------------------------------------------

    def complete(self) -> LowBitConfig:
        """Compress all that is not compressed yet.

        Returns:
            The config to save, with module table and calibration record filled in.
        """
        was_training = self.model.training
        self.model.eval()
        try:
            with torch.no_grad():
                if self.budget is not None:
                    self.budget.decide()
                if self.on_images:
                    run_on_images(self)
                for stack in self.stacks:
                    self.block_by_block(stack)
                self.without_data([name for name in self.targets.methods if name not in self.rows])
                attach_runtime(self.model, self.config)
        finally:
            if self.bar is not None:
                self.bar.close()
        self.model.train(was_training)
        if not self.targets.methods:
            reasons = "; ".join(dict.fromkeys(self.targets.dense.values()))
            raise UnsupportedModelError(f"no layer was compressed, all stay dense ({reasons})")
        rows = [self.rows[name] for name in self.targets.methods]
        plan = () if self.budget is None else self.budget.plan
        self.report = RunReport(rows, self.targets.dense, time.perf_counter() - self.began, plan)
        logger.info(self.report.summary())
        return finished_config(
            self.config, self._table_of(list(self.targets.methods)), self.targets.dense, self.record
        )

    def without_data(self, names: list[str]) -> None:
        """Compress layers from their weights alone, as many at a time as are worked on at once."""
        left = [name for name in self.leave_dense(names) if not self.restored([name])]
        step = self.at_once if left else 1
        for start in range(0, len(left), step):
            self.weights.materialize(left[start : start + step])
            self.compress_layers(left[start : start + step], {})

    def block_by_block(self, stack: dict[str, nn.Module]) -> None:
        """Compress the targets of each block, in order, on the outputs of the compressed blocks before it."""
        device = next(iter(self.model.parameters())).device
        measures = StackMeasures(self, stack, [batch.to(device) for batch in self.batches])
        plan_stack(self, stack, measures)
        inside = [n for n in self.targets.methods if any(n.startswith(f"{prefix}.") for prefix in stack)]
        wanted = {stream for name in inside for stream in self.targets.methods[name].streams}
        wanted |= {"dense"} if "cross" in wanted else set()
        if self.journal is None or not all(name in self.journal for name in inside):
            self.gradients = measures.wanted_gradients(inside)
        # hidden states before the next block, in the model compressed so far and in the dense one
        states: dict[str, list[Tensor]] = {
            stream: measures.hidden for stream in ("compressed", "dense") if stream in wanted
        }
        for i, (prefix, block) in enumerate(stack.items()):
            names = self.leave_dense([name for name in self.targets.methods if name.startswith(f"{prefix}.")])
            done = "dense" not in states and self.restored(names)
            if not done:
                self.weights.materialize(names)
            own = [call[i] for call in measures.calls(block)]
            reference = observation.of_dense_block(self, block, names, states, own)
            if not (done or self.restored(names)):
                self._compress_block(block, names, states.get("compressed", []), own, reference)
            self.gradients = {name: found for name, found in self.gradients.items() if name not in names}
            if "compressed" in states:
                outputs = capture.run_block(block, states["compressed"], own)
                states["compressed"] = [capture.hidden_of(output) for output in outputs]

    def dense_blocks(self, stack: Mapping[str, nn.Module]) -> Generator[nn.Module, None, None]:
        """Yield the blocks of a stack with their dense weights, which go again before the next block's are read."""
        for prefix, block in stack.items():
            names = [name for name in self.targets.methods if name.startswith(f"{prefix}.")]
            deferred = self.weights.materialize(names)
            try:
                yield block
            finally:
                self.weights.put_off(deferred)

    def _compress_block(
        self,
        block: nn.Module,
        names: list[str],
        hidden: list[Tensor],
        calls: list[capture.BlockCall],
        reference: observation.Reference,
    ) -> None:
        """Compress the layers of a block: at once, or in the order in which they run where a method asks for it."""
        stages = observation.stages(self, block, names, hidden, calls)
        if len(stages) == 1:
            self.compress_layers(names, observation.of_block(self, block, names, hidden, calls, reference, None))
            return
        packed: dict[str, Format] = {}
        for stage in stages:
            last = None if fused_name(stage[-1]) else self.model.get_submodule(stage[-1])
            packed |= self._replace(stage, observation.of_block(self, block, stage, hidden, calls, reference, last))
        self._record({name: packed[name] for name in names})  # as a whole: a run that goes on begins with a block


def _short(name: str) -> str:
    """Return block number and last parts of a module name, enough to follow a run."""
    parts = name.split(".")
    numbers = [part for part in parts[:-1] if part.isdigit()]
    last = ".".join(parts[-2:]) if parts[-1].isdigit() else parts[-1]
    return f"{numbers[0]}.{last}" if numbers else last


def compress_model(model: nn.Module, config: LowBitConfig, tokenizer: Any = None) -> tuple[LowBitConfig, RunReport]:
    """Compress a model that is in memory, in place. A run that fails half-way leaves it half compressed.

    Returns:
        The config to save and the report of the run.

    Raises:
        ValueError, CalibrationError, UnsupportedModelError: before the long work, naming what is wrong.
    """
    absent = next((name for name, parameter in model.named_parameters() if parameter.is_meta), None)
    if absent is not None:
        raise ValueError(
            f"{absent} is on the meta device, without values: load the model first, or give quantization_config to "
            "from_pretrained"
        )
    run = Run(model, config, tokenizer=tokenizer)
    finished = run.complete()
    if run.report is None:
        raise AssertionError("a completed run has a report")
    return finished, run.report
