"""What reaches the decoder blocks of a model, found from its structure.

A decoder is recognised as a list of like blocks that holds most linear weights, not by a class name. To learn what
each block is called with, its ``forward`` is replaced for the length of a ``with`` statement; nothing stays behind.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hf_lowbit.calibration.stats import LinearStats
from hf_lowbit.errors import UnsupportedModelError

Wrap = Callable[[Tensor], Any]


def find_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """Return the decoder blocks by name, in order.

    Raises:
        UnsupportedModelError: there is no list of blocks with linear layers, or more than one (an encoder and a
            decoder, a vision tower beside a language model); the lists are named.
    """
    lists: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():
        nested = any(name.startswith(f"{outer}.") for outer in lists)
        if isinstance(module, nn.ModuleList) and not nested and _linears(module):
            lists[name] = module
    if not lists:
        raise UnsupportedModelError("the model has no list of blocks with linear layers")
    if len(lists) > 1:
        raise UnsupportedModelError(
            f"calibration needs one list of blocks, the model has {len(lists)}: {', '.join(lists)}; "
            "a run without data (calibration=None) does not need one"
        )
    ((prefix, blocks),) = lists.items()
    return {f"{prefix}.{i}": block for i, block in enumerate(blocks)}


def _linears(module: nn.Module) -> bool:
    return any(isinstance(child, nn.Linear) for child in module.modules())


class _StopForward(Exception):
    """Ends a forward pass once everything wanted was seen."""


@contextlib.contextmanager
def replaced_forward(modules: list[nn.Module], make: Callable[[int], Callable[..., Any]]) -> Iterator[None]:
    """Replace the ``forward`` of some modules within a ``with`` statement.

    The instances keep their class and attributes, which models read to choose masks (``block.attention_type``).
    """
    before = [module.__dict__.get("forward") for module in modules]  # accelerate's hooks put one there
    try:
        for i, module in enumerate(modules):
            module.__dict__["forward"] = make(i)
        yield
    finally:
        for module, own in zip(modules, before, strict=True):
            module.__dict__.pop("forward", None)
            if own is not None:
                module.__dict__["forward"] = own


@dataclasses.dataclass
class BlockCall:
    """Arguments of one block in one batch, without the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def __call__(self, block: nn.Module, hidden: Tensor) -> Any:
        """Run the block as the model would."""
        return block(hidden, *self.args, **self.kwargs)


def _split_call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, BlockCall]:
    if args:
        return args[0], BlockCall(args[1:], kwargs)
    kwargs = dict(kwargs)
    return kwargs.pop("hidden_states"), BlockCall((), kwargs)


def first_block_inputs(
    model: nn.Module, blocks: list[nn.Module], batches: list[Tensor]
) -> list[tuple[Tensor, BlockCall]]:
    """Return hidden states and other arguments with which the first block is called, for each batch of token ids."""
    found: list[tuple[Tensor, BlockCall]] = []

    def stop(_: int) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            found.append(_split_call(args, kwargs))
            raise _StopForward

        return forward

    with replaced_forward(blocks[:1], stop):
        for batch in batches:
            with contextlib.suppress(_StopForward):
                model(input_ids=batch, use_cache=False)
    if len(found) != len(batches):
        raise UnsupportedModelError("the model's forward pass does not call its first block")
    return found


def block_calls(model: nn.Module, blocks: list[nn.Module], batch: Tensor, wrap: Wrap) -> list[BlockCall]:
    """Return the arguments of every block for one batch, in one cheap pass in which blocks hand their input on.

    Args:
        model: the whole model.
        blocks: its decoder blocks.
        batch: (sequences, length), token ids.
        wrap: turns hidden states into what a block returns, see :func:`output_wrapper`.
    """
    calls: dict[int, BlockCall] = {}
    # Norm and output head are not needed; with one position of logits they cost nothing, and a model that runs its
    # blocks a second time is found out. Where the model cannot be told so, the pass ends at the last block.
    lean = "logits_to_keep" in inspect.signature(model.forward).parameters

    def record(i: int) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            if i in calls:
                raise UnsupportedModelError(f"the model's forward pass calls its block {i} more than once")
            hidden, calls[i] = _split_call(args, kwargs)
            if i == len(blocks) - 1 and not lean:
                raise _StopForward
            return wrap(hidden)

        return forward

    with replaced_forward(blocks, record), contextlib.suppress(_StopForward):
        model(input_ids=batch, use_cache=False, **({"logits_to_keep": 1} if lean else {}))
    missing = [i for i in range(len(blocks)) if i not in calls]
    if missing:
        raise UnsupportedModelError(f"the model's forward pass does not call its block {missing[0]}")
    return [calls[i] for i in range(len(blocks))]


def hidden_of(output: Any) -> Tensor:
    """Return the hidden states from a block's output, which is a tensor or a tuple that starts with it."""
    return output[0] if isinstance(output, tuple) else output


def output_wrapper(output: Any) -> Wrap:
    """Return a function that shapes hidden states like ``output``."""
    if isinstance(output, tuple):
        rest = output[1:]
        return lambda hidden: (hidden, *rest)
    return lambda hidden: hidden


@contextlib.contextmanager
def collect_stats(
    linears: dict[str, nn.Linear], batch_sizes: Sequence[int] | None = None
) -> Iterator[dict[str, LinearStats]]:
    """Gather the inputs of linear layers while blocks run within the ``with`` statement.

    Layers that receive the very same tensor (query, key and value; gate and up) share one second moment.

    Args:
        linears: layers by full name.
        batch_sizes: sequences in each batch, for models that flatten them; by default the leading dimension counts.

    Yields:
        Statistics by name; complete when the statement ends.
    """
    stats: dict[str, LinearStats] = {}
    # last input, and how often it had been changed in place, by name of the layer that owns the statistics
    seen: dict[str, tuple[Tensor, int]] = {}
    owner: dict[str, str] = {}
    calls = dict.fromkeys(linears, 0)
    handles = []

    def hook(name: str) -> Callable[..., None]:
        def before(module: nn.Module, args: tuple[Any, ...]) -> None:
            inputs = args[0]
            now = (inputs, inputs._version)
            twin = next((o for o, last in seen.items() if last[0] is now[0] and last[1] == now[1] and o != name), None)
            if name not in owner:
                owner[name] = twin or name
                if owner[name] == name:
                    stats[name] = LinearStats(name, inputs.shape[-1], inputs.device)
                else:
                    stats[name] = stats[owner[name]]
            if owner[name] == name:
                stats[name].update(
                    inputs, None if batch_sizes is None else batch_sizes[calls[name] % len(batch_sizes)]
                )
                seen[name] = now
                calls[name] += 1
            elif twin != owner[name]:
                raise UnsupportedModelError(f"{name}: shares its input with {owner[name]} in some batches only")

        return before

    try:
        for name, linear in linears.items():
            handles.append(linear.register_forward_pre_hook(hook(name)))
        yield stats
    finally:
        for handle in handles:
            handle.remove()
        seen.clear()


def run_block(block: nn.Module, hidden: list[Tensor], calls: list[BlockCall]) -> Iterator[Any]:
    """Run a block over all batches, yielding its outputs."""
    with torch.no_grad():
        for states, call in zip(hidden, calls, strict=True):
            yield call(block, states)
