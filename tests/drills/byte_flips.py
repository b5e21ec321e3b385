"""Random bytes of a saved model are replaced by random others: each is found, or makes no difference at all.

A model is saved with ``save_model``: sharded weights, configs, tokenizer, report. For each flip the folder gets one
other byte, and tokenizer and model are loaded from it as a user would. Three outcomes are allowed: an error; a warning
that names the file; or a model that gives the same logits and generates the same text as the sound one. ``hf-lowbit
verify`` must find all that loading finds.

Most bytes are weights, where every flip is found the same way. So flips are drawn evenly from four places: weights,
headers of the weight files (their checksums included), JSON files of the model, and all other files.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import random
import shutil
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import assets
from hf_lowbit import ARBConfig, CheckpointError, RunOptions
from hf_lowbit.hf.save import save_model
from hf_lowbit.report.verify import verify
from tests.drills.process import check
from tests.tiny import VOCABULARY, tiny_model

PROMPT = "The capital of France is the city of"
NEW_TOKENS = 5
_WORDS = {"error": "errors", "warning": "warnings", "harmless": "without effect", "harmful": "harmful"}


@dataclasses.dataclass(frozen=True)
class Flip:
    """One byte of one file.

    Attributes:
        place: kind of place.
        file: name of the file.
        offset: of the byte.
        old: value of the byte.
        new: value it gets.
    """

    place: str
    file: str
    offset: int
    old: int
    new: int


class SavedModel:
    """A saved model and what it answers."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files = {file.name: file.read_bytes() for file in sorted(folder.iterdir())}
        self.expected = self.answer(folder)

    def answer(self, folder: Path) -> tuple[torch.Tensor, str]:
        """Load tokenizer and model; return logits of the prompt and the text that follows it."""
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(folder)
        inputs = tokenizer(PROMPT, return_tensors="pt", return_token_type_ids=False)
        torch.manual_seed(0)
        with torch.no_grad():
            tokens = model.generate(**inputs, max_new_tokens=NEW_TOKENS)
            return model(**inputs).logits, tokenizer.decode(tokens[0])

    def places(self) -> dict[str, list[tuple[str, int, int]]]:
        """Return the parts of files, as name, first byte and end, by kind of place."""
        found: dict[str, list[tuple[str, int, int]]] = {"weights": [], "headers": [], "model JSON": [], "other": []}
        for name, content in self.files.items():
            if name.endswith(".safetensors"):
                start = 8 + int.from_bytes(content[:8], "little")
                found["headers"].append((name, 0, start))
                found["weights"].append((name, start, len(content)))
            elif name.startswith(("config", "generation_config", "model.safetensors.index")):
                found["model JSON"].append((name, 0, len(content)))
            else:
                found["other"].append((name, 0, len(content)))
        return found

    def flip(self, rng: random.Random) -> Flip:
        """Draw a flip: a place, a byte of it, another value."""
        places = self.places()
        place = rng.choice(sorted(places))
        position = rng.randrange(sum(end - start for _, start, end in places[place]))
        for name, start, end in places[place]:
            if position < end - start:
                old = self.files[name][start + position]
                return Flip(place, name, start + position, old, rng.choice([b for b in range(256) if b != old]))
            position -= end - start
        raise AssertionError("drawn beyond the end")

    @contextlib.contextmanager
    def damaged(self, flip: Flip) -> Iterator[None]:
        """Damage the folder within a ``with`` statement."""
        path = self.folder / flip.file
        with open(path, "r+b") as file:
            file.seek(flip.offset)
            file.write(bytes([flip.new]))
        try:
            yield
        finally:
            path.write_bytes(self.files[flip.file])


class _Warnings(logging.Handler):
    """Keeps the texts of warnings."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


@contextlib.contextmanager
def all_warnings() -> Iterator[list[str]]:
    """Collect what is warned of within a ``with`` statement, by whatever way."""
    handler = _Warnings()
    loggers = [logging.getLogger(name) for name in ("hf_lowbit", "transformers")]
    for logger in loggers:
        logger.addHandler(handler)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield handler.texts
        handler.texts.extend(str(warning.message) for warning in caught)
    finally:
        for logger in loggers:
            logger.removeHandler(handler)


def outcome(model: SavedModel, flip: Flip) -> tuple[str, str]:
    """Load a damaged model.

    Returns:
        "error", "warning", "harmless" or "harmful", and the message or what differs.
    """
    with all_warnings() as texts:
        try:
            logits, text = model.answer(model.folder)
        except Exception as error:  # whichever library notices first
            return "error", f"{type(error).__name__}: {error}"
    named = [message for message in texts if flip.file in message]
    if named:
        return "warning", named[0]
    same = [torch.equal(logits, model.expected[0]), text == model.expected[1]]
    return ("harmless", "") if all(same) else ("harmful", f"same logits: {same[0]}, same text: {same[1]}")


def found_by_verify(folder: Path) -> bool:
    """Return whether ``hf-lowbit verify`` finds something wrong."""
    try:
        return bool(verify(folder).problems)
    except (CheckpointError, ValueError):
        return True


def flip_bytes(model: SavedModel, flips: int, seed: int) -> dict[str, Any]:
    """Flip bytes one at a time.

    Returns:
        Counts of outcomes by place, how many verify finds, and what must not be: harmful ones, and those that
        loading finds and verify does not.
    """
    rng = random.Random(seed)
    counts: dict[str, Counter[str]] = {place: Counter() for place in model.places()}
    verified: Counter[str] = Counter()
    harmful, disagreeing = [], []
    for _ in range(flips):
        flip = model.flip(rng)
        with model.damaged(flip):
            kind, message = outcome(model, flip)
            seen = found_by_verify(model.folder)
        counts[flip.place][kind] += 1
        verified[kind] += seen
        if kind == "harmful":
            harmful.append({**dataclasses.asdict(flip), "message": message})
        elif kind != "harmless" and not seen:
            disagreeing.append({**dataclasses.asdict(flip), "message": message[:300]})
    return {
        "flips": flips,
        "outcomes": {place: dict(sorted(kinds.items())) for place, kinds in counts.items()},
        "found by verify": dict(sorted(verified.items())),
        "harmful": harmful,
        "found on load and not by verify": disagreeing,
    }


def save_tiny(folder: Path) -> Path:
    """Save a tiny compressed model in shards, with a tokenizer."""
    words = {word: i for i, word in enumerate(["[UNK]", *PROMPT.split(), *(f"w{i}" for i in range(VOCABULARY))])}
    tokenizer = Tokenizer(models.WordLevel({word: i for word, i in words.items() if i < VOCABULARY}, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    tiny_model().save_pretrained(folder / "dense")
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]")
    wrapped.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    return _compressed(folder, wrapped, "60KB", max_salient_per_block=6, block_size=32)


def save_real(folder: Path) -> Path:
    """Save compressed SmolLM2-135M in shards."""
    source = assets.smollm2()
    shutil.copytree(source, folder / "dense")
    return _compressed(folder, AutoTokenizer.from_pretrained(source), "20MB")


def _compressed(folder: Path, tokenizer: Any, shard: str, **options: Any) -> Path:
    config = ARBConfig(variant="rtn", calibration=None, run=RunOptions(progress=False), **options)
    model = AutoModelForCausalLM.from_pretrained(folder / "dense", quantization_config=config)
    return save_model(model, folder / "packed", tokenizer, model.hf_quantizer.report.rows, max_shard_size=shard)


def drill(small: bool = False) -> dict[str, Any]:
    """Flip, and compare with the requirements."""
    models: list[tuple[str, Callable[[Path], Path], int]] = [("a tiny model", save_tiny, 12 if small else 200)]
    if not small:
        models.append(("SmolLM2-135M", save_real, 200))
    figures: dict[str, Any] = {"checks": [], "problems": []}
    for number, (name, save, flips) in enumerate(models):
        with tempfile.TemporaryDirectory() as folder:
            found = figures[name] = flip_bytes(SavedModel(save(Path(folder))), flips, number)
        counts = Counter[str]()
        for kinds in found["outcomes"].values():
            counts.update(kinds)
        told = ", ".join(f"{counts[kind]} {word}" for kind, word in _WORDS.items())
        requirement = f"{name}, {flips} bytes flipped: each found on load or without any effect"
        figures["checks"].append(check(requirement, told, not found["harmful"]))
        missed, seen = len(found["found on load and not by verify"]), sum(found["found by verify"].values())
        requirement = f"{name}: what loading finds, hf-lowbit verify finds"
        figures["checks"].append(check(requirement, f"{seen} found, {missed} missed", not missed))
        figures["problems"] += [*found["harmful"], *found["found on load and not by verify"]]
    return figures
