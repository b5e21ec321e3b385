"""Which of transformers' auto classes a model is loaded with, and what is saved beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    AutoProcessor,
    AutoTokenizer,
)

_AUTO = (
    (AutoModelForCausalLM, MODEL_FOR_CAUSAL_LM_MAPPING),
    (AutoModelForSeq2SeqLM, MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING),
    (AutoModelForImageTextToText, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING),
)


def auto_class(path: str | Path) -> Any:
    """Return the auto class that writes text with a model: the one its config names, or the first that knows it.

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
        raise ValueError(f"{path}: {config.model_type!r} is not a kind of model that writes text")
    named = [auto for auto, kind in known if kind.__name__ in (config.architectures or [])]
    return named[0] if named else known[0][0]


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
    """Return what is saved beside a model: its tokenizer, or for a model that sees images its processor."""
    return AutoProcessor.from_pretrained(path) if auto is AutoModelForImageTextToText else load_tokenizer(path)
