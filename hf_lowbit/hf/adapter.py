"""What compression has left out, as an adapter: a LoRA whose product is the best approximation of the remainder.

A packed layer holds Ŵ in place of W. The adapter starts at the product of rank r that takes back most of ``W - Ŵ``, so
training goes on from a better model than with the usual start at zero; or it is used as it is. A model whose weights
make up for each other's errors (``dense_target`` above 0) is another matter: to take back a part of ``W - Ŵ`` undoes a
part of that, and may lead away from the dense model; a warning says so. The folder is one of
peft's (``adapter_config.json`` and ``adapter_model.safetensors``); peft is needed to load it, not to write it.

Differs from AdaSVD (arXiv 2502.01403), where the truncated part is lost.
"""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from hf_lowbit.calibration.capture import collect_stats, text_inputs
from hf_lowbit.calibration.stats import LinearStats
from hf_lowbit.compress import CheckpointSource
from hf_lowbit.errors import CheckpointError
from hf_lowbit.layers import PackedConv1D, PackedLinear, packed_modules
from hf_lowbit.numerics import low_rank
from hf_lowbit.recipe import rules_of

logger = logging.getLogger(__name__)
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# Second moments held at a time; layers beyond that wait for another pass over the calibration tokens.
MOMENT_BYTES = 2**31


def dense_weights(name: str | Path, prefix: str = "") -> CheckpointSource:
    """Return the weights of a dense model in safetensors files, to be read one by one.

    Args:
        name: its folder, or its name on the Hub.
        prefix: ``base_model_prefix`` of the model, which names in the files may have or lack.

    Raises:
        CheckpointError: there are no such files, or one cannot be read.
    """
    folder = Path(name)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        folder = Path(snapshot_download(str(name), allow_patterns=["*.safetensors"]))
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{name}: holds no safetensors files")
    return CheckpointSource(files, prefix)


def check_adapter_target(path: str | Path) -> None:
    """Say now whether an adapter can be written to ``path``, rather than after the models were loaded.

    Args:
        path: folder to be made, and those above it; an empty one may exist.

    Raises:
        ValueError: it is not empty or cannot be made.
    """
    target = Path(path)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"{path}: exists and is not empty; choose another folder")
    above = next(folder for folder in target.absolute().parents if folder.exists())
    if not above.is_dir():
        raise ValueError(f"{path}: cannot be made, since {above} is no folder")


def save_remainder(
    model: Any, dense: CheckpointSource, path: str | Path, rank: int = 16, tokens: Tensor | None = None
) -> dict[str, float]:
    """Write the remainder of all packed layers of a model as a LoRA adapter.

    Args:
        model: of transformers, compressed, in memory.
        dense: the weights it was compressed from.
        path: folder to be made; an empty one may exist.
        rank: of each update, at most; layers with a smaller side get that.
        tokens: (sequences, length), token ids that the packed model reads, so that what counts of the remainder is
            what its inputs meet; without them all directions count alike.

    Returns:
        By layer the share of the remainder that is still left: of its outputs with tokens, else of its weights.

    Raises:
        ValueError: the rank is below 1, the model has no packed layers, the folder is not empty or cannot be made, or
            ``tokens`` are not (sequences, length) of ids that the model knows.
        CheckpointError: dense weights are missing, all of which are named, or one is of another shape or not finite.
    """
    layers, target = packed_modules(model), Path(path)
    if type(rank) is not int or rank < 1:
        raise ValueError(f"rank must be an integer of at least 1, got {rank!r}")
    if not layers:
        raise ValueError(f"{type(model).__name__} has no packed layers, so nothing was left out")
    check_adapter_target(path)
    if tokens is not None:
        _check_tokens(tokens, model.get_input_embeddings().weight.shape[0])
    missing = [name for name in layers if dense.locate(f"{name}.weight") is None]
    if missing:
        raise CheckpointError(f"the dense checkpoint lacks {len(missing)} packed layers: {', '.join(missing[:10])}")
    stored = getattr(model.config, "quantization_config", None)
    if stored is not None and any("cross" in rule.streams for _, rule in rules_of(stored)):
        logger.warning(
            "the packed weights make up for each other's errors, which an adapter of the remainder undoes in part; "
            "compress with dense_target=0 for an adapter that brings the model nearer to the dense one"
        )
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    left: dict[str, float] = {}
    for names in _portions(layers, tokens is not None):
        moments = _second_moments(model, {name: layers[name] for name in names}, tokens)
        for name in names:
            remainder = _remainder(name, layers[name], dense)
            moment = moments.get(name)
            ranks[name] = min(rank, *remainder.shape)
            up, down = low_rank.balance(*low_rank.truncate(remainder, moment, ranks[name]))
            whole = low_rank.output_error(remainder, moment, torch.zeros_like(up), down)
            left[name] = low_rank.output_error(remainder, moment, up, down) / whole if whole else 0.0
            dtype = layers[name].weight.dtype
            tensors[f"base_model.model.{name}.lora_A.weight"] = down.to(dtype).contiguous()
            tensors[f"base_model.model.{name}.lora_B.weight"] = up.to(dtype).contiguous()
    _write(target, tensors, _config(rank, ranks))
    return left


def _check_tokens(tokens: Any, known: int) -> None:
    fitting = isinstance(tokens, Tensor) and tokens.dim() == 2 and tokens.numel() > 0
    if not fitting or tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool:
        found = f"{tuple(tokens.shape)} of {tokens.dtype}" if isinstance(tokens, Tensor) else type(tokens).__name__
        raise ValueError(f"tokens must be (sequences, length), integers, at least one, got {found}")
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= known:
        raise ValueError(f"tokens: ids go from {low} to {high}; the model knows 0 to {known - 1}")


def _portions(layers: Mapping[str, PackedLinear], gathering: bool) -> Iterator[list[str]]:
    """Yield names of layers whose second moments fit into memory together; all of them if there are none."""
    found: list[str] = []
    size = 0
    for name, layer in layers.items():
        own = 8 * layer.in_features**2 if gathering else 0
        if found and size + own > MOMENT_BYTES:
            yield found
            found, size = [], 0
        found.append(name)
        size += own
    yield found


def _second_moments(model: Any, layers: dict[str, nn.Module], tokens: Tensor | None) -> dict[str, Tensor]:
    """Return second moments of what layers receive; of those that receive nothing, and without tokens, none."""
    if tokens is None:
        return {}
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stats: dict[str, LinearStats] = stack.enter_context(collect_stats(layers))
        for batch in tokens.split(4):
            model(**text_inputs(model, batch.to(model.device)))
    return {name: one.second_moment(torch.float64) for name, one in stats.items() if one.tokens}


def _remainder(name: str, layer: PackedLinear, dense: CheckpointSource) -> Tensor:
    packed = layer.packed.unpack().double()
    weight = dense.read(f"{name}.weight", torch.float64).to(packed.device)
    if isinstance(layer, PackedConv1D):  # stored the other way round
        weight = weight.T
    if weight.shape != packed.shape:
        raise CheckpointError(f"{name}: dense weight is {tuple(weight.shape)}, packed as {tuple(packed.shape)}")
    if not bool(torch.isfinite(weight).all()):
        raise CheckpointError(f"{name}: dense weight holds NaN or infinity")
    return weight - packed


def _config(rank: int, ranks: Mapping[str, int]) -> dict[str, Any]:
    """Return the config of the adapter; it names no path. With alpha equal to the rank, updates are not scaled."""
    smaller = {name: own for name, own in ranks.items() if own != rank}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": smaller,
        "alpha_pattern": smaller,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": False,
        "target_modules": list(ranks),
    }


def _write(target: Path, tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    """Write the folder so that it is complete or not there."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as folder:
        partial = Path(folder) / "adapter"
        partial.mkdir()
        save_file({name: tensor.cpu() for name, tensor in tensors.items()}, partial / WEIGHTS, {"format": "pt"})
        (partial / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        if target.exists():
            target.rmdir()
        shutil.move(partial, target)
