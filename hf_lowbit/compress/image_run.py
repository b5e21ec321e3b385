"""A run that is calibrated on images: the whole model at once.

Models that make images larger have some million parameters at most, in structures as different as their papers, so
nothing is gained by going block by block: the dense model runs once over the patches while the inputs of all layers
are gathered, all layers are packed, and the method finishes the model as a whole. It works on every model with linear
layers that takes a batch of images as its first argument. Several processes share patches and layers; what finishes
the model as a whole each does alone, with the same result.
"""

from __future__ import annotations

import copy
import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hf_lowbit import registry
from hf_lowbit.calibration import capture
from hf_lowbit.calibration.images import calibration_patches, multiple_of, scale_of
from hf_lowbit.calibration.stats import LinearStats
from hf_lowbit.compress.outcome import relative_errors
from hf_lowbit.config import CalibrationRecord
from hf_lowbit.errors import UnsupportedModelError
from hf_lowbit.image_config import ImageConfig
from hf_lowbit.layers import PackedLinear, dense_weight
from hf_lowbit.recipe import rules_of

if TYPE_CHECKING:
    from hf_lowbit.compress.engine import Run

logger = logging.getLogger(__name__)


def draw_patches(run: Run, config: ImageConfig) -> tuple[list[Tensor], CalibrationRecord]:
    """Return calibration patches in batches, with the record to save; the same in all processes.

    Raises:
        ValueError: there are fewer batches than processes.
        UnsupportedModelError: the model does not take RGB images.
        CalibrationError: there are no images.
    """
    channels = getattr(getattr(run.model, "config", None), "num_channels", 3)
    if channels != 3:
        raise UnsupportedModelError(
            f"{type(run.model).__name__} takes images of {channels} channels; RGB is supported"
        )
    patches, record = calibration_patches(config, scale_of(run.model), multiple_of(run.model))
    batches = list(patches.split(run.options.batch_size))
    run.team.refuse_few(len(batches))
    return batches, record


def run_on_images(run: Run) -> None:
    """Compress all targets of a run, and let their methods finish the model."""
    names = run.leave_dense(list(run.targets.methods))
    run.weights.materialize(names)
    parameter = next(run.model.parameters())
    run.batches = [batch.to(parameter.device, parameter.dtype) for batch in run.batches]
    rules = [rule for _, rule in rules_of(run.config) if isinstance(rule, ImageConfig) and rule.needs == "images"]
    dense = _copied(run.model) if any(rule.keeps_dense for rule in rules) else None
    changed: dict[str, Any] | None = None if dense is None else {}
    stats: dict[str, LinearStats] = {}
    for stage in _stages(run, names, any(rule.sequential for rule in rules)):
        stats |= _gathered(run, stage, max((rule.rows_kept for rule in rules), default=0))
        run.compress_layers(stage, stats, journal=False, changed=changed)
    for rule in rules:
        method = registry.get(rule.method)
        if method.finish is None:
            continue
        own = [name for name in names if run.targets.methods[name] is rule]
        kept = {name: weight for name, weight in (changed or {}).items() if name in own}
        unit = registry.ModelUnit(run.model, dense, run.batches, rule, kept, _blocks(run.model), image_of)
        _take_over(run, method.finish(unit), dense, stats)


def image_of(model: Any, batch: Tensor) -> Tensor:
    """Run a model on a batch of images and return the images it makes.

    Raises:
        UnsupportedModelError: it returns neither a tensor nor an output whose first is one.
    """
    output = model(batch)
    found = output if isinstance(output, Tensor) else getattr(output, "reconstruction", None)
    if found is None:
        found = output[0] if isinstance(output, (tuple, dict)) and len(output) else None
    if not isinstance(found, Tensor):
        raise UnsupportedModelError(f"{type(model).__name__} returns {type(output).__name__}, not images")
    return found


def _copied(model: nn.Module) -> nn.Module:
    """Return a copy of a dense model, without the quantizer that is at work on it."""
    quantizer = getattr(model, "hf_quantizer", None)
    return copy.deepcopy(model, {id(quantizer): None}).requires_grad_(False)


def _stages(run: Run, names: list[str], sequential: bool) -> list[list[str]]:
    """Return the layers that are packed together, in order: all, unless each is to see the packed ones before it."""
    if not sequential or not names:
        return [names]
    layers = {name: run.model.get_submodule(name) for name in names}
    with torch.no_grad():
        return capture.stages(run.model, run.batches[0], capture.BlockCall((), {}), layers)


def _gathered(run: Run, names: list[str], rows: int) -> dict[str, LinearStats]:
    """Run the model and return what layers receive.

    Raises:
        CalibrationError: inputs hold NaN or infinity; layer and sample are named.
    """
    layers = {name: run.model.get_submodule(name) for name in names}
    keep = -(-rows // len(run.batches))
    own = run.team.share(run.batches)
    calls = [capture.BlockCall((), {})] * len(own)
    # Swin models flatten windows into the leading dimension
    with capture.collect_stats(layers, [len(batch) for batch in own], keep) as stats:
        capture.run_until(run.model, own, calls, None)
    found = {name: stats[name] for name in names if name in stats}
    run.team.add_up(found)
    return found


def _blocks(model: nn.Module) -> tuple[str, ...]:
    """Return the names of a model's blocks, none if it has no one list of them."""
    try:
        return tuple(name for stack in capture.find_stacks(model) for name in stack)
    except UnsupportedModelError:
        return ()


def _take_over(run: Run, layers: dict[str, Any], dense: Any, stats: dict[str, LinearStats]) -> None:
    """Put layers into the model that a method has packed anew, with what is stated of them."""
    for name, packed in layers.items():
        packed.validate(name)
        layer = run.model.get_submodule(name)
        run.model.set_submodule(name, PackedLinear.replacing(layer, packed.to(packed.packed.device)))
        errors = relative_errors(dense_weight(dense.get_submodule(name)), packed.unpack(), stats.get(name))
        run.rows[name].update(errors)
        error = errors["output_error"]
        run.table[name]["error"] = None if error is None else round(error, 6)
    if layers and run.options.report is not None:
        lines = [json.dumps(run.rows[name]) + "\n" for name in run.rows]
        Path(run.options.report).write_text("".join(lines), encoding="utf-8")
