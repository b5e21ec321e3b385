"""How good and how fast a model is: perplexity on held-out text, and tokens per second beside another model.

A perplexity means something only beside that of the dense model on the very same tokens, and a speed only beside the
dense model's in the same run, so both are reported with their ratio.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from tqdm.auto import tqdm
from transformers import AutoModelForSeq2SeqLM, GenerationConfig

from hf_lowbit.calibration.data import load_texts, tokenize
from hf_lowbit.config import DATASETS
from hf_lowbit.errors import CalibrationError, HfLowbitError
from hf_lowbit.hf.auto import auto_class, load_tokenizer
from hf_lowbit.report.headers import read_checkpoint
from hf_lowbit.report.inspect import bits_per_parameter

_PROMPT = "The history of the railway began when"


def perplexity(model: Any, tokens: Tensor, batch_size: int = 4, progress: bool = True) -> float:
    """Return exp of the mean negative log likelihood of every token but the first of each sequence.

    Args:
        model: a causal language model.
        tokens: (N, L), int64, ids below the size of the vocabulary; N · (L - 1) predictions are scored.
        batch_size: sequences per forward pass.
        progress: show a progress bar.

    Raises:
        ValueError: ``tokens`` or ``batch_size`` do not fit.
        HfLowbitError: the model's logits hold NaN.
    """
    if tokens.dim() != 2 or tokens.dtype != torch.int64 or tokens.shape[0] < 1 or tokens.shape[1] < 2:
        raise ValueError(f"tokens must be int64 (sequences, at least 2), got {tokens.dtype} {tuple(tokens.shape)}")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    vocabulary = model.get_input_embeddings().weight.shape[0]
    if int(tokens.min()) < 0 or int(tokens.max()) >= vocabulary:
        raise ValueError(
            f"token ids go from {int(tokens.min())} to {int(tokens.max())}; the model knows 0 to {vocabulary - 1}"
        )
    was_training = model.training
    model.eval()
    total = 0.0
    with torch.no_grad(), tqdm(total=len(tokens), desc="perplexity", unit="seq", disable=not progress) as bar:
        for batch in tokens.split(batch_size):
            ids = batch.to(model.device)
            logits = model(input_ids=ids, use_cache=False).logits
            for row, own in zip(logits, ids, strict=True):  # one at a time: float32 logits of a batch can be gigabytes
                loss = functional.cross_entropy(row[:-1].float(), own[1:], reduction="none")
                total += float(loss.sum(dtype=torch.float64))
            bar.update(len(batch))
    model.train(was_training)
    if math.isnan(total):
        raise HfLowbitError("the model's logits hold NaN, so there is no perplexity")
    return float(torch.tensor(total / (tokens.shape[0] * (tokens.shape[1] - 1)), dtype=torch.float64).exp())


def heldout_tokens(data: Any, tokenizer: Any, samples: int, length: int) -> Tensor:
    """Return the first ``samples`` consecutive windows of a held-out text, (samples, length), int64.

    Args:
        data: as for calibration: a dataset's name (its evaluation split), a text file or folder, or a list of strings.
        tokenizer: of the model.
        samples: number of windows.
        length: tokens in each.

    Raises:
        ValueError: ``samples`` or ``length`` are too small.
        CalibrationError: the source cannot be read, or is too short.
    """
    if samples < 1 or length < 2:
        raise ValueError(f"held-out text needs at least 1 sample of 2 tokens, got {samples} of {length}")
    stream = tokenize(load_texts(data, heldout=True), tokenizer)
    if len(stream) < samples * length:
        raise CalibrationError(
            f"the held-out text has {len(stream):,} tokens, too few for {samples} × {length}; "
            f"take at most {len(stream) // length} samples of this length, or more text"
        )
    return stream[: samples * length].view(samples, length)


def decode_speed(
    models: Mapping[str, Any], tokenizer: Any, new_tokens: int = 32, repeats: int = 3, prompt: str = _PROMPT
) -> dict[str, dict[str, float]]:
    """Measure greedy generation, one sequence at a time, of several models in turn.

    The models take turns in every round, so that a machine that slows down slows all of them; the median round counts.

    Args:
        models: by name; the first is what the others are compared with.
        tokenizer: for the prompt.
        new_tokens: tokens to generate, end-of-sequence or not.
        repeats: rounds, after one that is not counted.
        prompt: text to continue; reading it counts as well.

    Returns:
        For each name "tokens_per_second" and "ratio" to the first model (above 1 is faster).

    Raises:
        ValueError: no models, or numbers below 1.
    """
    if not models or new_tokens < 1 or repeats < 1:
        raise ValueError("speed needs at least one model, one token and one repeat")
    seconds: dict[str, list[float]] = {name: [] for name in models}
    settings = GenerationConfig(
        max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False, pad_token_id=tokenizer.eos_token_id
    )
    encoded = tokenizer(prompt, return_tensors="pt")
    for number in range(repeats + 1):
        for name, model in models.items():
            inputs = {key: encoded[key].to(model.device) for key in ("input_ids", "attention_mask")}
            _wait_for(model)
            began = time.perf_counter()
            with torch.no_grad():
                model.generate(**inputs, generation_config=settings)
            _wait_for(model)
            if number:
                seconds[name].append(time.perf_counter() - began)
    speeds = {name: new_tokens / statistics.median(times) for name, times in seconds.items()}
    first = next(iter(speeds.values()))
    return {name: {"tokens_per_second": speed, "ratio": speed / first} for name, speed in speeds.items()}


def _wait_for(model: Any) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)


def evaluate(
    path: str | Path,
    data: Any,
    against: str | Path | None = None,
    *,
    samples: int = 8,
    sequence_length: int = 512,
    batch_size: int = 4,
    speed: bool = True,
    new_tokens: int = 32,
    repeats: int = 3,
    progress: bool = True,
) -> dict[str, Any]:
    """Measure a model, compressed or dense, and another one beside it.

    Args:
        path: folder or Hub repository; its tokenizer is used for both models.
        data: held-out text, see :func:`heldout_tokens`.
        against: the model to compare with, usually the dense one, or None.
        samples: windows of text.
        sequence_length: tokens in each.
        batch_size: sequences per forward pass.
        speed: also measure decoding.
        new_tokens: tokens generated per measurement.
        repeats: measurements, of which the median counts.
        progress: show progress bars.

    Returns:
        JSON types: what was measured on, "models" (perplexity, bytes on disk, bits per parameter, tokens per second by
        name) and "ratios" of the first model to the other, empty without one.

    Raises:
        ValueError, HfLowbitError, OSError: a model or the text cannot be had; headers are read before weights.
    """
    places = [path] if against is None else [path, against]
    checkpoints = [read_checkpoint(place) for place in places]
    names = [checkpoint.name for checkpoint in checkpoints]
    if len(set(names)) < len(names):
        names = [f"{name} ({role})" for name, role in zip(names, ("model", "against"), strict=True)]
    if AutoModelForSeq2SeqLM in map(auto_class, places):
        raise ValueError("perplexity of running text is measured for decoders; this is an encoder-decoder")
    tokenizer = load_tokenizer(path)
    tokens = heldout_tokens(data, tokenizer, samples, sequence_length)
    rows: dict[str, dict[str, Any]] = {}
    models: dict[str, Any] = {}
    for name, place, checkpoint in zip(names, places, checkpoints, strict=True):
        models[name] = auto_class(place).from_pretrained(place)
        rows[name] = {
            "perplexity": perplexity(models[name], tokens, batch_size, progress),
            "bytes": checkpoint.total_bytes,
            "bits_per_parameter": bits_per_parameter(checkpoint),
            "tokens_per_second": None,
        }
    if speed:
        for name, row in decode_speed(dict(reversed(models.items())), tokenizer, new_tokens, repeats).items():
            rows[name]["tokens_per_second"] = row["tokens_per_second"]
    return {
        "data": _public_name(data),
        "samples": samples,
        "sequence_length": sequence_length,
        "models": rows,
        "ratios": {names[0]: _ratios(rows[names[0]], rows[names[1]])} if against is not None else {},
    }


def _ratios(own: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, float | None]:
    return {key: None if value is None else value / other[key] for key, value in own.items()}


def _public_name(data: Any) -> str:
    """Return what to call the text in a report, without saying where it lies."""
    if isinstance(data, (str, Path)):
        return str(data) if data in DATASETS else Path(data).name
    return "texts"
