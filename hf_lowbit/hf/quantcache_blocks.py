"""The blocks of a diffusion transformer as QuantCache sees them: in the order in which they run, with their streams.

A block takes and returns hidden states, and in models of joint attention a second stream beside them (text, audio).
Where they stand among a block's arguments and results is in diffusers' own registry of blocks; the classes that it
lacks in 0.42 are listed here, and added to it when one of them is met.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from diffusers.hooks._common import (
    _ALL_TRANSFORMER_BLOCK_IDENTIFIERS,
    _ATTENTION_CLASSES,
    _FEEDFORWARD_CLASSES,
    _TEMPORAL_TRANSFORMER_BLOCK_IDENTIFIERS,
)
from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry
from diffusers.utils.torch_utils import unwrap_module
from torch import Tensor, nn

from hf_lowbit.errors import UnsupportedModelError
from hf_lowbit.layers import check_model

# Class -> places of hidden states and of the second stream among what it returns, and the second stream's argument.
# Read in the source of diffusers 0.42.1; a class is only looked up by its name, so that none of them is imported.
_MORE_BLOCKS: dict[str, tuple[int, int | None, str]] = {
    "AllegroTransformerBlock": (0, None, ""),
    "AuraFlowJointTransformerBlock": (1, 0, "encoder_hidden_states"),
    "AuraFlowSingleTransformerBlock": (0, None, ""),
    "BriaSingleTransformerBlock": (1, 0, "encoder_hidden_states"),
    "ChromaSingleTransformerBlock": (0, None, ""),
    "ChromaTransformerBlock": (1, 0, "encoder_hidden_states"),
    "CogView3PlusTransformerBlock": (0, 1, "encoder_hidden_states"),
    "ConsisIDBlock": (0, 1, "encoder_hidden_states"),
    "EasyAnimateTransformerBlock": (0, 1, "encoder_hidden_states"),
    "GlmImageTransformerBlock": (0, 1, "encoder_hidden_states"),
    "HeliosTransformerBlock": (0, None, ""),
    "HunyuanVideo15TransformerBlock": (0, 1, "encoder_hidden_states"),
    "LTX2VideoTransformerBlock": (0, 1, "audio_hidden_states"),
    "LongCatImageSingleTransformerBlock": (1, 0, "encoder_hidden_states"),
    "LongCatImageTransformerBlock": (1, 0, "encoder_hidden_states"),
    "OvisImageSingleTransformerBlock": (1, 0, "encoder_hidden_states"),
    "OvisImageTransformerBlock": (1, 0, "encoder_hidden_states"),
    "SanaTransformerBlock": (0, None, ""),
    "SanaVideoTransformerBlock": (0, None, ""),
    "SkyReelsV2TransformerBlock": (0, None, ""),
}


class Streams:
    """How to read the streams of one class of blocks from its arguments and results, and to write them back."""

    def __init__(self, metadata: TransformerBlockMetadata) -> None:
        self._metadata = metadata
        self._length: int | None = None  # of the tuple that the block returns; None for a single tensor

    def of_arguments(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
        """Return hidden states, then the second stream if there is one."""
        read = self._metadata._get_parameter_from_args_kwargs
        found = [read(self._metadata.hidden_states_argument_name, args, kwargs)]
        if self._metadata.return_encoder_hidden_states_index is not None:
            found.append(read(self._metadata.encoder_hidden_states_argument_name, args, kwargs))
        return [stream for stream in found if stream is not None]

    def of_output(self, output: Any) -> list[Tensor]:
        """Return the same streams of what the block has returned."""
        if isinstance(output, Tensor):
            self._length = None
            return [output]
        self._length = len(output)
        places = (self._metadata.return_hidden_states_index, self._metadata.return_encoder_hidden_states_index)
        return [output[place] for place in places if place is not None and output[place] is not None]

    def complete(self) -> bool:
        """Return whether the streams are all that the block returns, so that it can be left out."""
        second = self._metadata.return_encoder_hidden_states_index is not None
        return self._length is None or self._length == 1 + second

    def output(self, streams: Sequence[Tensor]) -> Any:
        """Return streams as the block would."""
        if self._length is None:
            return streams[0]
        found: list[Any] = [None] * self._length
        places = (self._metadata.return_hidden_states_index, self._metadata.return_encoder_hidden_states_index)
        for place, stream in zip(places, streams, strict=False):
            if place is not None:
                found[place] = stream
        return tuple(found)


def streams_of(block: nn.Module) -> Streams:
    """Return how to read the streams of a block.

    Raises:
        UnsupportedModelError: neither diffusers nor this package knows its class.
    """
    kind = type(unwrap_module(block))
    try:
        return Streams(TransformerBlockRegistry.get(kind))
    except ValueError:
        pass
    if kind.__name__ not in _MORE_BLOCKS or not kind.__module__.startswith("diffusers."):
        raise UnsupportedModelError(
            f"QuantCache does not know what a {kind.__name__} takes and returns; tell diffusers: "
            "TransformerBlockRegistry.register(model_class, TransformerBlockMetadata(return_hidden_states_index=...)),"
            " both from diffusers.hooks._helpers"
        )
    hidden, second, argument = _MORE_BLOCKS[kind.__name__]
    places: dict[str, Any] = {"return_hidden_states_index": hidden, "return_encoder_hidden_states_index": second}
    if argument:
        places["encoder_hidden_states_argument_name"] = argument
    TransformerBlockRegistry.register(kind, TransformerBlockMetadata(**places))
    return Streams(TransformerBlockRegistry.get(kind))


def find_blocks(transformer: nn.Module) -> dict[str, nn.Module]:
    """Return the repeated blocks of a transformer by name, in the order in which they run.

    That is the order of registration, except that spatial and temporal blocks take turns (Latte).

    Raises:
        TypeError: it is no model, but a pipeline.
        UnsupportedModelError: there are none.
    """
    check_model(transformer, "transformer")
    stacks = {
        name: [(f"{name}.{i}", block) for i, block in enumerate(child)]
        for name, child in transformer.named_children()
        if isinstance(child, nn.ModuleList) and name in _ALL_TRANSFORMER_BLOCK_IDENTIFIERS and len(child)
    }
    if not stacks:
        raise UnsupportedModelError(
            f"{type(transformer).__name__} has no list of blocks named as diffusers names them "
            f"({', '.join(sorted(_ALL_TRANSFORMER_BLOCK_IDENTIFIERS))})"
        )
    temporal = [name for name in stacks if name in _TEMPORAL_TRANSFORMER_BLOCK_IDENTIFIERS]
    if len(stacks) == 2 and temporal and len({len(stack) for stack in stacks.values()}) == 1:
        found = [pair for pairs in zip(*stacks.values(), strict=True) for pair in pairs]
    else:
        found = [pair for stack in stacks.values() for pair in stack]
    return dict(found)


def find_sublayers(name: str, block: nn.Module) -> dict[str, nn.Module]:
    """Return the attention and feed-forward modules of a block by name, none inside another.

    Raises:
        UnsupportedModelError: there are none.
    """
    found: dict[str, nn.Module] = {}
    for path, module in block.named_modules(prefix=name):
        inside = any(path.startswith(f"{outer}.") for outer in found)
        if isinstance(unwrap_module(module), (*_ATTENTION_CLASSES, *_FEEDFORWARD_CLASSES)) and not inside:
            found[path] = module
    if not found:
        raise UnsupportedModelError(
            f"{name}: {type(block).__name__} has no attention or feed-forward of a known class to cache; use "
            "granularity 'stack' or 'block'"
        )
    return found
