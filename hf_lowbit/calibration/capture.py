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
from hf_lowbit.layers import DENSE_TYPES

Wrap = Callable[[Tensor], Any]


def find_stacks(model: nn.Module) -> list[dict[str, nn.Module]]:
    """Return the stacks of like blocks that text runs through, in the order in which it does.

    One for a decoder, two for an encoder-decoder. Of a model with other towers (vision, audio) the one of its text
    model is returned.

    Returns:
        For each stack its blocks by name, in order.

    Raises:
        UnsupportedModelError: there is no list of blocks with linear layers, or several of which it is not clear what
            text does with them; they are named.
    """
    lists = _block_lists(model)
    if not lists:
        raise UnsupportedModelError("the model has no list of blocks with linear layers")
    chosen = list(lists) if len(lists) == 1 else _text_lists(model, lists)
    if not chosen:
        raise UnsupportedModelError(
            f"the model has {len(lists)} lists of blocks ({', '.join(lists)}), and it is not clear which of them text "
            "runs through; a run without data (calibration=None) need not know"
        )
    return [{f"{name}.{i}": block for i, block in enumerate(lists[name])} for name in chosen]


def other_towers(model: nn.Module) -> list[str]:
    """Return the lists of blocks that text does not run through: those of a vision or audio tower."""
    lists = _block_lists(model)
    text = _text_lists(model, lists) if len(lists) > 1 else []
    return [name for name in lists if name not in text] if text else []


def text_roots(model: nn.Module) -> list[str]:
    """Return the names of the text encoder and decoder inside a model; "" is the model itself."""
    names = {id(module): name for name, module in model.named_modules()}
    found = []
    for finder in ("get_encoder", "get_decoder"):
        find: Any = getattr(model, finder, None)
        part = None if find is None else find()
        if id(part) in names and not (finder == "get_encoder" and part is model):
            found.append(names[id(part)])
    return found


def _text_lists(model: nn.Module, lists: dict[str, nn.ModuleList]) -> list[str]:
    """Return which lists of blocks belong to the text encoder and the decoder; one of each, or none at all."""
    chosen: list[str] = []
    for root in text_roots(model):
        inside = [name for name in lists if name.startswith(f"{root}.")] if root else []
        if len(inside) > 1:
            return []
        chosen += [name for name in inside if name not in chosen]
    return chosen


def _block_lists(model: nn.Module) -> dict[str, nn.ModuleList]:
    lists: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():
        nested = any(name.startswith(f"{outer}.") for outer in lists)
        if isinstance(module, nn.ModuleList) and not nested and _has_weights(module):
            lists[name] = module
    return lists


def _has_weights(module: nn.Module) -> bool:
    return any(isinstance(child, DENSE_TYPES) for child in module.modules())


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


def text_inputs(model: nn.Module, batch: Tensor) -> dict[str, Any]:
    """Return the arguments of a forward pass over token ids; an encoder-decoder reads the same text on both sides."""
    accepted = inspect.signature(model.forward).parameters
    arguments: dict[str, Any] = {"input_ids": batch}
    if "decoder_input_ids" in accepted:
        shift: Any = getattr(model, "prepare_decoder_input_ids_from_labels", None)
        arguments["decoder_input_ids"] = batch if shift is None else shift(labels=batch)
    if "use_cache" in accepted or any(p.kind is p.VAR_KEYWORD for p in accepted.values()):
        arguments["use_cache"] = False
    return arguments


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
                model(**text_inputs(model, batch))
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
        model(**text_inputs(model, batch), **({"logits_to_keep": 1} if lean else {}))
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


def output_wrappers(block: nn.Module, hidden: list[Tensor], calls: list[BlockCall]) -> list[Wrap]:
    """Return for every batch a function that shapes hidden states like what a block returns.

    One batch tells, unless the block returns other tensors as well (T5's position bias), which depend on the batch.
    """
    first = next(iter(run_block(block, hidden[:1], calls[:1])))
    if isinstance(first, tuple) and any(isinstance(part, Tensor) for part in first[1:]):
        return [output_wrapper(output) for output in run_block(block, hidden, calls)]
    return [output_wrapper(first)] * len(hidden)


@contextlib.contextmanager
def collect_stats(
    linears: dict[str, nn.Module], batch_sizes: Sequence[int] | None = None, keep: int = 0
) -> Iterator[dict[str, LinearStats]]:
    """Gather the inputs of linear layers while blocks run within the ``with`` statement.

    Layers that receive the very same tensor (query, key and value; gate and up) share one second moment.

    Args:
        linears: layers by full name.
        batch_sizes: sequences in each batch, for models that flatten them; by default the leading dimension counts.
        keep: rows of every batch that are kept as a sample of the inputs.

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
                    stats[name] = LinearStats(name, inputs.shape[-1], inputs.device, keep)
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


@contextlib.contextmanager
def collect_inputs(linears: dict[str, nn.Module]) -> Iterator[dict[str, list[Tensor]]]:
    """Keep what linear layers receive within the ``with`` statement, a tensor for each call; layers may share them."""
    seen: dict[str, list[Tensor]] = {name: [] for name in linears}

    def hook(name: str) -> Callable[..., None]:
        return lambda module, args: seen[name].append(args[0])

    handles = [linear.register_forward_pre_hook(hook(name)) for name, linear in linears.items()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def collect_cross(linears: dict[str, nn.Module], before: dict[str, list[Tensor]]) -> Iterator[dict[str, Tensor]]:
    """Sum products of what linear layers receive now and what they received before, within the ``with`` statement.

    Args:
        linears: layers by full name.
        before: their inputs in an earlier pass over the same batches, see :func:`collect_inputs`.

    Yields:
        By name Σ x x'ᵀ of earlier and present inputs, (in_features, in_features), float64; complete at the end.

    Raises:
        UnsupportedModelError: a layer receives other tokens now than before, as experts may; it is named.
    """
    sums: dict[str, Tensor] = {}
    calls = dict.fromkeys(linears, 0)
    last: list[Tensor] = []  # the last pair of inputs and their product, for layers that share both

    def hook(name: str) -> Callable[..., None]:
        def add(module: nn.Module, args: tuple[Any, ...]) -> None:
            pair = before[name][calls[name]], args[0]
            if pair[0].shape != pair[1].shape:
                raise UnsupportedModelError(f"{name}: receives other tokens in the compressed model than in the dense")
            calls[name] += 1
            if not last or last[0] is not pair[0] or last[1] is not pair[1]:
                one, other = (x.detach().reshape(-1, x.shape[-1]).float() for x in pair)
                last[:] = [*pair, (one.T @ other).double()]
            sums[name] = sums[name] + last[2] if name in sums else last[2]

        return add

    handles = [linear.register_forward_pre_hook(hook(name)) for name, linear in linears.items()]
    try:
        yield sums
    finally:
        for handle in handles:
            handle.remove()
        last.clear()


@contextlib.contextmanager
def collect_stacked(
    linears: dict[str, nn.Module],
    samples: int,
    buckets: int,
    own: Tensor | None = None,
    total: Callable[[Tensor], Tensor] = lambda values: values,
) -> Iterator[dict[str, Tensor]]:
    """Average samples, position by position, while a block runs within the ``with`` statement ("stack of batch").

    Args:
        linears: layers by full name, which receive (sequences, length, in_features).
        samples: sequences in all.
        buckets: how many averages there are; each takes the same number of samples, drawn at random, but the last may
            take fewer.
        own: numbers of the sequences that run here, in order; by default all. Others run in other processes.
        total: adds a tensor up over all processes.

    Yields:
        By name, once the statement has ended, ``(2 / buckets) Σ x̄ x̄ᵀ`` over the averages, (in_features, in_features),
        float64. It is not that of the samples: averages keep the mean and lose most of the covariance.

    Raises:
        UnsupportedModelError: a layer receives its tokens in another form; it is named.

    Source: AdaSVD (arXiv 2502.01403), Eq. 14 and 15.
    """
    order = torch.randperm(samples, generator=torch.Generator().manual_seed(0)) // -(-samples // buckets)
    places = order if own is None else order[own]
    sums: dict[str, Tensor] = {}
    seen = dict.fromkeys(linears, 0)
    found: dict[str, Tensor] = {}

    def hook(name: str) -> Callable[..., None]:
        def add(module: nn.Module, args: tuple[Any, ...]) -> None:
            inputs = args[0].detach().float()
            into = places[seen[name] : seen[name] + len(inputs)]
            if inputs.dim() != 3 or len(into) != len(inputs):
                raise UnsupportedModelError(f"{name}: receives {tuple(args[0].shape)}, whose samples cannot be told")
            if name not in sums:
                sums[name] = inputs.new_zeros((int(order.max()) + 1, *inputs.shape[1:]))
            sums[name].index_add_(0, into.to(inputs.device), inputs)
            seen[name] += len(inputs)

        return add

    handles = [linear.register_forward_pre_hook(hook(name)) for name, linear in linears.items()]
    try:
        yield found
        counts = torch.bincount(order)
        for name, own_sum in sums.items():
            means = (total(own_sum) / counts[:, None, None].to(own_sum)).flatten(0, 1).double()
            found[name] = means.T @ means * (2.0 / len(counts))
    finally:
        for handle in handles:
            handle.remove()


def stages(block: nn.Module, hidden: Tensor, call: BlockCall, linears: dict[str, nn.Module]) -> list[list[str]]:
    """Return the layers of a block in the order in which they run, those together that receive the same tensor.

    Args:
        block: the block.
        hidden: one batch of its hidden states.
        call: its other arguments for them.
        linears: its layers by full name; those that do not run on this batch come last.
    """
    seen: list[tuple[str, Tensor]] = []

    def hook(name: str) -> Callable[..., None]:
        return lambda module, args: seen.append((name, args[0]))

    handles = [linear.register_forward_pre_hook(hook(name)) for name, linear in linears.items()]
    try:
        for _ in run_block(block, [hidden], [call]):
            pass
    finally:
        for handle in handles:
            handle.remove()
    found: list[list[str]] = []
    last: Tensor | None = None
    for name, inputs in seen:
        if any(name in stage for stage in found):
            continue
        if inputs is not last:
            found.append([])
            last = inputs
        found[-1].append(name)
    idle = [name for name in linears if not any(name in stage for stage in found)]
    return [*found, idle] if idle else found


def run_until(block: nn.Module, hidden: list[Tensor], calls: list[BlockCall], last: nn.Module | None) -> None:
    """Run a block over all batches, up to the call of one of its layers, whose other hooks have run by then.

    Args:
        block: the block.
        hidden: its hidden states of each batch.
        calls: its other arguments.
        last: the layer, None to run all of the block.
    """

    def stop(module: nn.Module, args: tuple[Any, ...]) -> None:
        raise _StopForward

    handle = None if last is None else last.register_forward_pre_hook(stop)
    try:
        with torch.no_grad():
            for states, call in zip(hidden, calls, strict=True):
                with contextlib.suppress(_StopForward):
                    call(block, states)
    finally:
        if handle is not None:
            handle.remove()


def run_block(block: nn.Module, hidden: list[Tensor], calls: list[BlockCall]) -> Iterator[Any]:
    """Run a block over all batches, yielding its outputs."""
    with torch.no_grad():
        for states, call in zip(hidden, calls, strict=True):
            yield call(block, states)
