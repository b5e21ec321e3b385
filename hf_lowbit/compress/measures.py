"""What methods may ask of the dense blocks of a stack before the first of them is compressed.

Each question is a pass over the calibration data that reads a block when its turn comes and lets go of it, like the
run itself, so memory holds one dense block and its activations whatever the depth. Gradients take two passes, one
forward that keeps the input of every block and one backward that runs each block again: the backward pass of the whole
model, exactly, one block at a time.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from hf_lowbit.calibration import capture
from hf_lowbit.calibration.recall import with_returns
from hf_lowbit.calibration.stats import LinearStats
from hf_lowbit.compress.planning import cosine_sums
from hf_lowbit.errors import CalibrationError, UnsupportedModelError
from hf_lowbit.layers import dense_weight, features

if TYPE_CHECKING:
    from hf_lowbit.compress.engine import Run

Calls = list[list[capture.BlockCall]]
Backwards = tuple[nn.Module, dict[str, nn.Module], list[Tensor], list[Tensor], list[capture.BlockCall], list[Tensor]]


@dataclasses.dataclass(frozen=True)
class GradientStats:
    """How the loss of a model depends on a linear layer.

    Attributes:
        fisher: mean, over the entries of the weight, of ``sqrt(mean over sequences of (∂ loss / ∂ entry)²)``; what
            Palu (arXiv 2407.21118) and ReCalKV (arXiv 2505.24357) call Fisher information of a projection.
        second_moment: (out_features, out_features), float64, mean over sequences of Σ g gᵀ over their tokens, with g
            the gradient of the loss with respect to the layer's output for a token.
    """

    fisher: float
    second_moment: Tensor


class StackMeasures:
    """Looks at the dense blocks of one stack.

    Attributes:
        hidden: hidden states of each calibration batch before the first block.
    """

    def __init__(self, run: Run, stack: Mapping[str, nn.Module], batches: list[Tensor]) -> None:
        """Run the model up to its first block.

        Args:
            run: whose model and team it is.
            stack: blocks by name.
            batches: token ids, (sequences, length) each.
        """
        self._run, self._stack, self._batches = run, stack, batches
        inputs = capture.first_block_inputs(run.model, list(stack.values()), batches)
        self.hidden = [states for states, _ in inputs]
        self._first_calls = [call for _, call in inputs]
        self._calls: Calls | None = None
        self._gradients: tuple[Any, dict[str, GradientStats]] | None = None

    def calls(self, first: nn.Module | None = None) -> Calls:
        """Return for each batch the other arguments of every block.

        Args:
            first: the first block with some weights, to learn what blocks return; by default its dense ones are read.
        """
        if self._calls is None and first is None:
            with contextlib.closing(self._run.dense_blocks(self._stack)) as dense:
                first = next(dense)
                self._calls = self._calls_of(first, self._batches, self.hidden, self._first_calls)
        elif self._calls is None and first is not None:
            self._calls = self._calls_of(first, self._batches, self.hidden, self._first_calls)
        return self._calls or []

    def _calls_of(
        self, first: nn.Module, batches: list[Tensor], hidden: list[Tensor], first_calls: list[capture.BlockCall]
    ) -> Calls:
        # the first block's outputs tell what blocks return, which the recording pass must mimic
        wraps = capture.output_wrappers(first, hidden, first_calls)
        blocks = list(self._stack.values())
        pairs = zip(batches, wraps, strict=True)
        return [capture.block_calls(self._run.model, blocks, batch, wrap) for batch, wrap in pairs]

    def similarity(self) -> dict[str, float]:
        """Return by name of each block the mean cosine of its input and output, over all tokens."""
        calls = self.calls()
        with contextlib.closing(self._run.dense_blocks(self._stack)) as dense:
            sums = [self._run.team.total(part) for part in cosine_sums(dense, self.hidden, calls)]
        return {prefix: float(total / count) for prefix, (total, count) in zip(self._stack, sums, strict=True)}

    def dense_inputs(self, names: Sequence[str]) -> Iterator[tuple[str, Tensor, LinearStats | None]]:
        """Yield name, weight and inputs of layers of the dense model, block by block; None where no token comes.

        Args:
            names: of linear layers inside the blocks.
        """
        hidden, calls = self.hidden, self.calls()
        sizes = [len(states) for states in hidden]
        with contextlib.closing(self._run.dense_blocks(self._stack)) as dense:
            for i, (prefix, block) in enumerate(zip(self._stack, dense, strict=True)):
                own = {name: self._run.model.get_submodule(name) for name in names if name.startswith(f"{prefix}.")}
                with capture.collect_stats(own, sizes) as stats:
                    outputs = capture.run_block(block, hidden, [call[i] for call in calls])
                    hidden = [capture.hidden_of(output) for output in outputs]
                self._run.team.add_up(stats)
                for name, module in own.items():
                    yield name, dense_weight(module), stats.get(name)

    def gradients(
        self, names: Sequence[str], samples: int, length: int, recall: float = 0.0
    ) -> dict[str, GradientStats]:
        """Return how the model's loss depends on layers of the dense model; measured once for the same question.

        Args:
            names: of linear layers inside the blocks.
            samples: calibration sequences that are looked at, one after the other; of several processes, all together.
            length: tokens of each.
            recall: share of each in which passages return, see :func:`hf_lowbit.calibration.recall.with_returns`.

        Returns:
            Statistics of the gradients by name; the loss is that of predicting the next token.

        Raises:
            UnsupportedModelError: the model has no output over its vocabulary.
            CalibrationError: a gradient is not finite; the layer is named.
        """
        question = (tuple(names), samples, length, recall)
        if self._gradients is None or self._gradients[0] != question:
            self._gradients = question, self._measured_gradients(names, samples, length, recall)
        return self._gradients[1]

    def sensitivity(self, names: Sequence[str], samples: int, length: int) -> dict[str, Tensor]:
        """Return how much the model's loss curves with the outputs of layers of the dense model.

        Args:
            names: of linear layers inside the blocks.
            samples: calibration sequences that are looked at; of several processes, all together.
            length: tokens of each, at most.

        Returns:
            By name (out_features,), float64, on the CPU: the mean over all tokens of the squared gradient of a
            sequence's summed loss with respect to each output, the diagonal of the empirical Fisher matrix. Zeros for
            an expert that no token reaches. Rows r of a residual R then raise the mean loss of a token by about
            ``½ Σ γ_r (R S Rᵀ)_rr``, with S the mean of x xᵀ: that of K-FAC with the output's matrix made diagonal.

        Raises:
            UnsupportedModelError: the model has no output over its vocabulary.
            CalibrationError: a gradient is not finite; the layer is named.
        """
        found: dict[str, Tensor] = {}
        tokens = 0.0
        for block, own, hidden, grads, calls, below in self._backwards(names, samples, length):
            sums = {name: torch.zeros(features(layer)[0], dtype=torch.float64) for name, layer in own.items()}
            with _output_squares(own, sums):
                below += [_through(block, *one) for one in zip(hidden, grads, calls, strict=True)]
            tokens = float(sum(states.shape[0] * states.shape[1] for states in hidden))
            factor = float((hidden[0].shape[1] - 1) ** 2) if hidden else 0.0  # from the mean loss to the sum
            for name, total in sums.items():
                found[name] = self._run.team.total(total) * factor
                if not bool(torch.isfinite(found[name]).all()):
                    raise CalibrationError(f"{name}: its gradient is not finite")
        count = float(self._run.team.total(torch.tensor(tokens, dtype=torch.float64)))
        return {name: found[name] / max(count, 1.0) for name in names}

    def wanted_gradients(self, names: Sequence[str]) -> dict[str, Tensor]:
        """Return second moments of gradients for those of some layers whose method asks for them."""
        methods: dict[str, Any] = {name: self._run.targets.methods[name] for name in names}
        asking = {name: rule for name, rule in methods.items() if "gradients" in rule.streams and rule.needs != "none"}
        found: dict[str, Tensor] = {}
        for rule in {id(rule): rule for rule in asking.values()}.values():
            own = [name for name in names if asking.get(name) is rule]
            stats = self.gradients(own, rule.gradient_samples, rule.gradient_length, rule.returning)
            found |= {name: stats[name].second_moment for name in own}
        return found

    def _measured_gradients(
        self, names: Sequence[str], samples: int, length: int, recall: float
    ) -> dict[str, GradientStats]:
        found: dict[str, GradientStats] = {}
        for block, own, hidden, grads, calls, below in self._backwards(names, samples, length, recall):
            sums, gradients = _backward(block, own, hidden, grads, calls)
            below += gradients
            sequences = int(self._run.team.total(torch.tensor(float(len(hidden)))))
            for name, (squares, products) in sums.items():
                found[name] = GradientStats(
                    fisher=float((self._run.team.total(squares) / sequences).sqrt().mean()),
                    second_moment=self._run.team.total(products) / sequences,
                )
                if not (math.isfinite(found[name].fisher) and bool(torch.isfinite(found[name].second_moment).all())):
                    raise CalibrationError(f"{name}: its gradient is not finite")
        return {name: found[name] for name in names}

    def _backwards(self, names: Sequence[str], samples: int, length: int, recall: float = 0.0) -> Iterator[Backwards]:
        """Run the dense blocks forwards, keeping their inputs, and yield them from the last to the first.

        Yields:
            A block with its dense weights; those of the named layers that are in it; its input for each sequence; the
            gradient of each sequence's loss with respect to its output; its other arguments; and a list that the
            caller fills with the gradients with respect to its inputs.
        """
        team = self._run.team
        rows = [row[:length] for batch in self._batches for row in batch][: -(-samples // team.size)]
        batches = [with_returns(row, recall)[None] for row in rows]
        inputs = capture.first_block_inputs(self._run.model, list(self._stack.values()), batches)
        kept = [[states for states, _ in inputs]]
        calls: Calls = []
        wraps: list[capture.Wrap] = []
        with contextlib.closing(self._run.dense_blocks(self._stack)) as dense:
            for i, block in enumerate(dense):
                calls = calls or self._calls_of(block, batches, kept[0], [call for _, call in inputs])
                outputs = list(capture.run_block(block, kept[-1], [call[i] for call in calls]))
                wraps = [capture.output_wrapper(output) for output in outputs]
                kept.append([capture.hidden_of(output) for output in outputs])
        grads = [self._top_gradient(*one) for one in zip(batches, kept.pop(), wraps, strict=True)]
        backwards = dict(reversed(list(self._stack.items())))
        with contextlib.closing(self._run.dense_blocks(backwards)) as dense:
            for prefix, block in zip(backwards, dense, strict=True):
                own = {name: self._run.model.get_submodule(name) for name in names if name.startswith(f"{prefix}.")}
                hidden, below = kept.pop(), list[Tensor]()
                yield block, own, hidden, grads, [call[len(kept)] for call in calls], below
                grads = below

    def _top_gradient(self, batch: Tensor, states: Tensor, wrap: capture.Wrap) -> Tensor:
        """Return the gradient of the loss of one sequence with respect to the last block's output."""
        blocks = list(self._stack.values())
        leaf = states.detach().requires_grad_(True)

        def pass_on(i: int) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                return wrap(leaf)

            return forward

        with torch.enable_grad(), capture.replaced_forward(blocks, pass_on):
            output = self._run.model(**capture.text_inputs(self._run.model, batch))
            logits = getattr(output, "logits", None)
            if logits is None or logits.dim() != 3:
                raise UnsupportedModelError("gradients need a model that predicts tokens; load it with its head")
            loss = cross_entropy(logits[0, :-1].float(), batch[0, 1:].to(logits.device))
            (gradient,) = torch.autograd.grad(loss, leaf)
        return gradient


def _through(block: nn.Module, states: Tensor, grad: Tensor, call: capture.BlockCall) -> Tensor:
    """Return the gradient of one sequence's loss with respect to a block's input, given that of its output."""
    leaf = states.detach().requires_grad_(True)
    with torch.enable_grad():
        last = capture.hidden_of(call(block, leaf))
        (found,) = torch.autograd.grad(last, leaf, grad.to(last.device))
    return found


@contextlib.contextmanager
def _output_squares(layers: Mapping[str, nn.Module], sums: dict[str, Tensor]) -> Iterator[None]:
    """Add the squared gradients of what layers return, token by token, within the ``with`` statement."""

    def hook(name: str) -> Callable[..., None]:
        def add(grad: Tensor) -> None:
            sums[name] += grad.detach().reshape(-1, grad.shape[-1]).double().square().sum(0).cpu()

        def after(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            if output.requires_grad:
                output.register_hook(add)

        return after

    handles = [layer.register_forward_hook(hook(name)) for name, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _backward(
    block: nn.Module,
    layers: Mapping[str, nn.Module],
    hidden: list[Tensor],
    grads: list[Tensor],
    calls: list[capture.BlockCall],
) -> tuple[dict[str, tuple[Tensor, Tensor]], list[Tensor]]:
    """Run a block again, backwards.

    Args:
        block: with its dense weights.
        layers: whose weights' gradients are wanted.
        hidden: its input for each sequence.
        grads: gradient of each sequence's loss with respect to its output.
        calls: its other arguments.

    Returns:
        For each layer, over the sequences and in float64, Σ squares of the weight's gradient and Σ products of the
        gradients of its outputs; and the gradients with respect to the block's inputs.
    """
    weights: dict[str, Any] = {name: layer.weight for name, layer in layers.items()}
    before = {name: weight.requires_grad for name, weight in weights.items()}
    squares = {name: torch.zeros(weight.shape, dtype=torch.float64) for name, weight in weights.items()}
    products: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}
    handles = [
        layer.register_forward_hook(lambda _module, _args, out, name=name: outputs.__setitem__(name, out))
        for name, layer in layers.items()
    ]
    below = []
    try:
        for weight in weights.values():
            weight.requires_grad_(True)
        for states, grad, call in zip(hidden, grads, calls, strict=True):
            leaf = states.detach().requires_grad_(True)
            with torch.enable_grad():
                last = capture.hidden_of(call(block, leaf))
                wanted = [leaf, *weights.values(), *(outputs[name] for name in layers)]
                found = torch.autograd.grad(last, wanted, grad.to(last.device))
            below.append(found[0])
            for name, weight_grad, output_grad in zip(
                layers, found[1 : len(layers) + 1], found[len(layers) + 1 :], strict=True
            ):
                squares[name] += weight_grad.cpu().double().square()
                rows = output_grad.reshape(-1, output_grad.shape[-1]).float()
                product = (rows.T @ rows).cpu().double()
                products[name] = products[name] + product if name in products else product
    finally:
        for handle in handles:
            handle.remove()
        for name, weight in weights.items():
            weight.requires_grad_(before[name])
    return {name: (squares[name], products[name]) for name in layers}, below
