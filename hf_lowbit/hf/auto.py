"""Which of transformers' auto classes a model is loaded with, and what is saved beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_IMAGE_TO_IMAGE_MAPPING,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForImageToImage,
    AutoModelForSeq2SeqLM,
    AutoProcessor,
    AutoTokenizer,
)
from transformers.utils import IMAGE_PROCESSOR_NAME, cached_file

_AUTO = (
    (AutoModelForCausalLM, MODEL_FOR_CAUSAL_LM_MAPPING),
    (AutoModelForSeq2SeqLM, MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING),
    (AutoModelForImageTextToText, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING),
    (AutoModelForImageToImage, MODEL_FOR_IMAGE_TO_IMAGE_MAPPING),
)


def auto_class(path: str | Path) -> Any:
    """Return the auto class that writes text, or makes images, with a model.

    It is the one that the model's config names, or the first that knows it.

    Args:
        path: a folder, or the name of a repository on the Hub.

    Raises:
        ValueError: none of them knows the model.
    """
    config = AutoConfig.from_pretrained(path)
    known: list[tuple[Any, Any]] = [
        (auto, mapping[type(config)]) for auto, mapping in _AUTO if type(config) in mapping
    ]
    if not known:
        raise ValueError(f"{path}: {config.model_type!r} is not a kind of model that writes text or makes images")
    named = [auto for auto, kind in known if kind.__name__ in (config.architectures or [])]
    return named[0] if named else known[0][0]


def makes_images(path: str | Path) -> bool:
    """Return whether a model makes images of images."""
    return type(AutoConfig.from_pretrained(path)) in MODEL_FOR_IMAGE_TO_IMAGE_MAPPING


def load_tokenizer(path: str | Path) -> Any:
    """Return the tokenizer of a model.

    Raises:
        ValueError: it has none; what transformers says then is about libraries that would not help.
    """
    try:
        return AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: no tokenizer could be loaded; save the dense model's beside it") from error


def load_companion(path: str | Path, auto: Any) -> Any:
    """Return what is saved beside a model: its tokenizer, or for a model that sees images its processor.

    What prepares images for one that makes images is copied where it lies in a folder; None if there is nothing.
    """
    if auto is AutoModelForImageToImage:
        return _ImageSettings.of(path)
    return AutoProcessor.from_pretrained(path) if auto is AutoModelForImageTextToText else load_tokenizer(path)


class _ImageSettings:
    """The settings by which images are prepared, as they are; transformers' class for them asks for torchvision."""

    def __init__(self, text: str) -> None:
        self._text = text

    @classmethod
    def of(cls, path: str | Path) -> _ImageSettings | None:
        """Return the settings of a model, None if it has none."""
        file = cached_file(str(path), IMAGE_PROCESSOR_NAME, _raise_exceptions_for_missing_entries=False)
        return None if file is None else cls(Path(file).read_text(encoding="utf-8"))

    def save_pretrained(self, folder: str | Path) -> None:
        """Write them into a folder."""
        Path(folder, IMAGE_PROCESSOR_NAME).write_text(self._text, encoding="utf-8")
