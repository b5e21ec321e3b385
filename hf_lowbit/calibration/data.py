"""Token sequences for calibration and evaluation: from a named dataset, text files, strings or ready token ids.

Everything ends as one tensor (samples, sequence_length), int64. Sampling is deterministic: the same data, seed and
sizes give the same tokens on every machine.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_lowbit.config import DATASETS, CalibrationRecord, calibration_kind
from hf_lowbit.errors import CalibrationError

# name -> (repository, configuration, split for calibration, split for evaluation, text column)
_SOURCES = {
    "c4": ("allenai/c4", "en", "train", "validation", "text"),
    "wikitext2": ("Salesforce/wikitext", "wikitext-2-raw-v1", "train", "test", "text"),
}
# Taken from the start of a dataset: about two million tokens, eight times what the largest published run used.
_DATASET_CHARACTERS = 8_000_000
_TEXT_SUFFIXES = (".txt", ".md", ".text")


def load_texts(data: Any, heldout: bool = False) -> list[str]:
    """Return the documents of a text source.

    Args:
        data: a name in ``DATASETS``, a text file (documents separated by blank lines), a folder of text files (one
            document each, sorted by name), or a list of strings.
        heldout: for a dataset, take the split meant for evaluation.

    Raises:
        CalibrationError: the source is missing, unreadable or empty, or a dataset cannot be had.
    """
    if isinstance(data, (list, tuple)):
        texts = [text for text in data if text.strip()]
        where = "the list of texts"
    elif data in DATASETS:
        texts, where = _dataset_texts(data, heldout), f"dataset {data!r}"
    else:
        path = Path(data)
        where = f"text {path.name!r}"
        if path.is_dir():
            files = sorted(file for file in path.rglob("*") if file.suffix in _TEXT_SUFFIXES and file.is_file())
            texts = [_read(file) for file in files]
        elif path.is_file():
            texts = _read(path).split("\n\n")
        else:
            raise CalibrationError(
                f"text source {str(data)!r} is neither a file or folder nor a known dataset ({', '.join(DATASETS)})"
            )
        texts = [text for text in texts if text.strip()]
    if not texts:
        raise CalibrationError(f"{where} is empty")
    return texts


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CalibrationError(f"cannot read {path.name!r} as UTF-8 text: {error}") from error


def _dataset_texts(name: str, heldout: bool) -> list[str]:
    repository, configuration, train, test, column = _SOURCES[name]
    try:
        import datasets
    except ImportError as error:
        raise CalibrationError(
            f"dataset {name!r} needs the `datasets` package (pip install 'hf-lowbit[eval]'); "
            "a text file or a list of strings works without it"
        ) from error
    try:
        rows: Iterable[Any] = datasets.load_dataset(
            repository, configuration, split=test if heldout else train, streaming=True
        )
        texts, characters = [], 0
        for row in rows:
            texts.append(row[column])
            characters += len(row[column])
            if characters > _DATASET_CHARACTERS:
                break
        return texts
    except Exception as error:  # network, hub and parser errors have no common base
        raise CalibrationError(
            f"dataset {name!r} could not be loaded ({type(error).__name__}); without a network, pass a text file, "
            "a folder or a list of strings instead"
        ) from error


def tokenize(texts: Sequence[str], tokenizer: Any) -> Tensor:
    """Return all texts as one stream of token ids, (tokens,), int64, documents in order."""
    encoded = tokenizer(["\n\n".join(texts)], add_special_tokens=False, verbose=False)["input_ids"][0]
    return torch.as_tensor(encoded, dtype=torch.int64)


def sample_sequences(stream: Tensor, samples: int, length: int, seed: int) -> Tensor:
    """Cut sequences out of a token stream.

    The stream is cut into consecutive windows and ``samples`` of them are drawn without replacement, in stream order.
    If there are fewer windows than samples, all of them are used together with random overlapping ones.

    Args:
        stream: (tokens,), int64.
        samples: number of sequences.
        length: tokens in each.
        seed: of the draw.

    Returns:
        (samples, length), int64.

    Raises:
        CalibrationError: the stream is shorter than one sequence.
    """
    if len(stream) < length:
        raise CalibrationError(f"the text has {len(stream)} tokens, too few for one sequence of {length}")
    generator = torch.Generator().manual_seed(seed)
    windows = len(stream) // length
    if windows >= samples:
        starts = torch.randperm(windows, generator=generator)[:samples].sort().values * length
    else:
        extra = torch.randint(len(stream) - length + 1, (samples - windows,), generator=generator)
        starts = torch.cat([torch.arange(windows) * length, extra])
    return torch.stack([stream[start : start + length] for start in starts.tolist()])


def calibration_tokens(config: Any, tokenizer: Any, vocab_size: int) -> tuple[Tensor, CalibrationRecord]:
    """Return the calibration sequences of a config, and the record that is saved in its place.

    Args:
        config: a ``CalibratedConfig`` with data.
        tokenizer: for text sources; may be None for token ids.
        vocab_size: ids must be below it.

    Returns:
        (samples, length), int64, and a record with the hash of exactly these ids.

    Raises:
        CalibrationError: no data, too little of it, no tokenizer, or ids outside the vocabulary.
    """
    data = config.calibration
    if data is None or isinstance(data, CalibrationRecord):
        raise CalibrationError("this config names no calibration data; a stored config only records what was used")
    kind = calibration_kind(data)
    if kind == "tokens":
        tokens = _ready_tokens(data, config.samples)
    else:
        if tokenizer is None:
            raise CalibrationError("calibration text needs a tokenizer; pass RunOptions(tokenizer=...) or token ids")
        stream = tokenize(load_texts(data), tokenizer)
        tokens = sample_sequences(stream, config.samples, config.sequence_length, config.seed)
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= vocab_size:
        raise CalibrationError(f"calibration token ids go from {low} to {high}; the model knows 0 to {vocab_size - 1}")
    digest = hashlib.sha256(tokens.numpy().astype("<i8").tobytes()).hexdigest()
    name = data if kind == "dataset" else None
    return tokens, CalibrationRecord(kind=kind, name=name, sha256=digest, tokens=tokens.numel())


def _ready_tokens(data: Any, samples: int) -> Tensor:
    """Stack token ids given as (sequences, length) or as a list of equally long sequences."""
    try:
        rows = [torch.as_tensor(row) for row in data]
    except (TypeError, ValueError, RuntimeError) as error:
        raise CalibrationError(f"calibration token ids are not numeric sequences: {error}") from error
    if not rows:
        raise CalibrationError("the list of calibration token ids is empty")
    rows = [row[0] if row.dim() == 2 and len(row) == 1 else row for row in rows]  # as tokenizers return them
    if any(row.dim() != 1 for row in rows):
        raise CalibrationError("calibration token ids must be sequences of ids: (sequences, length)")
    if any(not len(row) for row in rows):
        raise CalibrationError("a calibration sequence is empty")
    if any(row.is_floating_point() or row.dtype == torch.bool for row in rows):
        raise CalibrationError("calibration token ids must be integers")
    lengths = sorted({len(row) for row in rows})
    if len(lengths) > 1:
        raise CalibrationError(
            f"calibration sequences must be equally long, got lengths {lengths[0]} to {lengths[-1]}"
        )
    if lengths[0] < 2:
        raise CalibrationError(f"calibration sequences need at least 2 tokens, got {lengths[0]}")
    return torch.stack(rows[:samples]).to(torch.int64)
