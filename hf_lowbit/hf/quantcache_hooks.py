"""The hooks of QuantCache on a transformer of diffusers, and what they share.

One :class:`Engine` per transformer drives a :class:`~hf_lowbit.methods.quantcache.decisions.Trajectory`: the hook on
the transformer begins and ends each call, the hooks on blocks (and on attention and feed-forward modules, where those
are cached) ask it what to do. Tensors are kept per cache context ("cond", "uncond", ...), decisions per trajectory.

A whole stack is cached as what it adds, which holds only if each block is handed the very tensors that the block
before it has returned. Where a model does something between its blocks, each block is cached by itself; where not even
that can be, every step is computed, and a warning says why.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterable
from typing import Any

import torch
from diffusers.hooks.hooks import BaseState, CacheContext, ModelHook, StateManager
from torch import Tensor, nn

from hf_lowbit.hf.quantcache_bits import BitOwner
from hf_lowbit.hf.quantcache_blocks import find_blocks, find_sublayers, streams_of
from hf_lowbit.methods.quantcache.algorithm import motion, relative_change, similarity
from hf_lowbit.methods.quantcache.decisions import Decision, Trajectory
from hf_lowbit.methods.quantcache.options import QuantCacheConfig
from hf_lowbit.methods.quantcache.store import History
from hf_lowbit.report.timeline import CacheReport

logger = logging.getLogger(__name__)

# What a pipeline without contexts gets, as diffusers' own caches do.
_NO_CONTEXT = "inference"
_OPEN = "open"


class ContextState(BaseState):
    """What is kept for one context of one trajectory.

    Attributes:
        step: of the last call.
        entry: shapes, dtypes and devices of the streams that entered the first block.
        whole: what the whole stack adds.
        blocks: what each block adds.
        sublayers: what attention and feed-forward modules return.
        measured: residuals of the measured blocks when they last ran.
    """

    def __init__(self, config: QuantCacheConfig) -> None:
        self._config = config
        self.step = -1
        self.reset()

    def reset(self, *args: Any, **kwargs: Any) -> None:
        """Forget all tensors."""
        self.entry: list[tuple[Any, ...]] | None = None
        self.whole = self.history()
        self.blocks: dict[int, History] = {}
        self.sublayers: dict[str, History] = {}
        self.measured: dict[int, Tensor] = {}

    def history(self) -> History:
        """Return an empty history of the configured kind."""
        return History(self._config.extrapolation, self._config.cache_dtype == "int8")

    def histories(self) -> Iterable[History]:
        """Return everything that is kept to be used again."""
        return (self.whole, *self.blocks.values(), *self.sublayers.values())


class Engine:
    """What the hooks of one transformer share.

    Attributes:
        mode: what is cached: "stack", "block", "sublayer", or "open" if nothing can be.
        manager: of the states by context.
        bits: sets those of activations.
    """

    def __init__(self, transformer: nn.Module, config: QuantCacheConfig) -> None:
        """Look at a transformer; nothing of it is changed.

        Raises:
            UnsupportedModelError: its blocks, or the modules to be cached, are not known.
        """
        self.config = config
        self.blocks = find_blocks(transformer)
        self.streams = [streams_of(block) for block in self.blocks.values()]
        per_block = config.schedule == "per_block"
        self.mode = "stack" if config.granularity == "auto" else config.granularity
        self.mode = "block" if per_block else self.mode
        self.sublayers: dict[str, nn.Module] = {}
        if self.mode == "sublayer":
            for name, block in self.blocks.items():
                self.sublayers |= find_sublayers(name, block)
        self.manager: Any = StateManager(ContextState, (config,))  # type: ignore[arg-type]  # a class is what it wants
        self.bits = BitOwner(transformer, config)
        self._transformer = transformer
        names = [*inspect.signature(type(transformer).forward).parameters][1:]
        self._timestep_at = names.index("timestep") if "timestep" in names else len(names)
        self._warned: set[str] = set()
        self._trajectory: Trajectory | None = None
        self._report = CacheReport(self.mode, len(self.blocks))
        self._timestep: float | None = None
        self._falls: bool | None = None
        self._lends_context = False
        self._clear_call()

    # A call ----------------------------------------------------------------------------------------------------------

    def _clear_call(self) -> None:
        self._state: Any = None
        self._decision: Decision | None = None
        self._first: list[Tensor] = []
        self._latest: list[Tensor] = []
        self._next = 0
        self._in_order = True
        self._pending: dict[tuple[str, int], Tensor] = {}

    @torch.compiler.disable
    def begin_call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Find out which step a call belongs to and decide what it does."""
        self._clear_call()
        if torch.is_grad_enabled():
            self._warn("gradients are on: every step is computed; sample under torch.no_grad()")
            self.reset()
            return
        self._lends_context = self.manager._context is None
        if self._lends_context:
            self.manager.set_context(CacheContext(_NO_CONTEXT))
        context = self.manager.context
        step = self._step_of(context, args, kwargs)
        if self._trajectory is None:
            self.bits.take()
            self._trajectory = Trajectory(self.config, context.num_inference_steps, len(self.blocks))
            self._report = CacheReport(self.mode, len(self.blocks), self._trajectory.rows)
            self._report.remarks = tuple(sorted(self._warned))
        self._state = self.manager.get_state()
        if self._state.step >= 0 and step != self._state.step + 1:
            self._state.reset()
        self._state.step = step
        self._decision = self._trajectory.begin(context.name, step, self._has_cache())
        self._report.begin(context.name)
        self._apply_bits()

    def _step_of(self, context: CacheContext, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
        """Return the step of a call; one that does not follow the last begins a new trajectory.

        Pipelines that do not number their steps are counted by the calls of the leading context. If such a pipeline
        was interrupted, nothing has reset the count; timesteps that turn round give it away, or too many steps.
        """
        before = self._trajectory
        if context.step_index is not None:
            if before is not None and context.step_index - before.step not in (0, 1):
                self.reset(keep_context=True)
            return context.step_index
        if before is not None and before.leader != context.name:
            return before.step
        if before is not None and (self._turned(args, kwargs) or before.step + 1 == (before.rules.steps or -1)):
            self.reset(keep_context=True)
            before = None
        self._turned(args, kwargs)
        return 0 if before is None else before.step + 1

    def _turned(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Return whether timesteps go the other way than before, and remember the one of this call."""
        timestep: Any = kwargs.get("timestep", args[self._timestep_at] if len(args) > self._timestep_at else None)
        if timestep is None:
            return False
        now = float(timestep.max()) if isinstance(timestep, Tensor) else float(timestep)
        before, self._timestep = self._timestep, now
        if before is None or before == now:
            return False
        falls = now < before
        turned, self._falls = self._falls is not None and falls != self._falls, falls
        return turned

    def _has_cache(self) -> bool:
        if self.mode == "stack":
            return bool(self._state.whole)
        if self.mode == "block":
            return len(self._state.blocks) == len(self.blocks)
        return self.mode == "sublayer" and len(self._state.sublayers) == len(self.sublayers)

    def _apply_bits(self) -> None:
        """Give the layers the bits of a computed step, and note what they have."""
        if self._decision is not None and self._decision.computes:
            self._trajectory_().rows[-1]["bits"] = self.bits.choose(self._decision.bits)

    @torch.compiler.disable
    def end_call(self) -> None:
        """Keep what the call has computed and hand on what it has measured."""
        if self._decision is None or self._trajectory is None:
            return
        if self._decision.computes:
            if self.mode == "stack" and all(self._decision.runs):
                self._keep_whole()
            if self._decision.leads:
                self._hand_on()
        self._report.hold(
            [state for state in self.manager._state_cache.values() if isinstance(state, ContextState)], self.mode
        )
        self._clear_call()
        if self._lends_context:
            self.manager.set_context(None)

    def _keep_whole(self) -> None:
        same = [a.shape == b.shape for a, b in zip(self._first, self._latest, strict=False)]
        if self._in_order and self._next == len(self.blocks) and all(same) and same:
            pairs = zip(self._first, self._latest, strict=False)
            self._state.whole.put(self._state.step, [after - before for before, after in pairs])
        elif self.config.granularity == "auto":
            logger.info("between its blocks %s does more; each block is cached", type(self._transformer).__name__)
            self._change_mode("block")
        else:
            self._fail_open("does more between its blocks than handing on, so that the stack cannot be cached whole")

    def _hand_on(self) -> None:
        """Turn all that was measured in this call into numbers at once, which waits for the device once."""
        keys = list(self._pending)
        values = torch.stack(list(self._pending.values())).tolist() if keys else []
        found = dict(zip(keys, values, strict=True))
        ran = {block for kind, block in keys if kind == "ran"}
        self._trajectory_().measured(
            {block: (found.get(("change", block)), found.get(("motion", block))) for block in ran},
            {block: value for (kind, block), value in found.items() if kind == "similarity"},
        )

    def _trajectory_(self) -> Trajectory:
        if self._trajectory is None:
            raise RuntimeError("no trajectory has begun")
        return self._trajectory

    # Blocks ----------------------------------------------------------------------------------------------------------

    @torch.compiler.disable
    def block(self, index: int, original: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Do for a block what was decided: run it, or give what stands in for it."""
        if self._decision is None:
            return original(*args, **kwargs)
        entered = self.streams[index].of_arguments(args, kwargs)
        self._follow(index, entered)
        decision = self._decision
        found = None
        if self.mode in ("stack", "block") and not decision.runs[index]:
            found = self._reused(index, entered)
        elif index in decision.pruned and self.streams[index].complete():
            found = self._bypassed(index, entered)
            self._report.pruned += found is not None
        if found is not None:
            self._report.count(ran=False, block=True)
            self._latest = found
            return self.streams[index].output(found)
        output = original(*args, **kwargs)
        self._report.count(ran=True, block=True)
        self._latest = self.streams[index].of_output(output)
        self._note(index, entered)
        return output

    def _follow(self, index: int, entered: list[Tensor]) -> None:
        """Watch whether blocks run in order and hand on what they return, and whether the cache fits at all."""
        handed_on = all(a is b for a, b in zip(entered, self._latest, strict=False))
        self._in_order &= index == self._next and (index == 0 or handed_on)
        self._next = index + 1
        if index:
            return
        self._first = entered if self.mode == "stack" else []
        entry = [(stream.shape, stream.dtype, stream.device) for stream in entered]
        if self._state.entry is not None and self._state.entry != entry:
            self._state.reset()
            trajectory = self._trajectory_()
            self._decision = trajectory.without_cache(trajectory.leader == self.manager.context.name)
            self._apply_bits()
        self._state.entry = entry

    def _reused(self, index: int, entered: list[Tensor]) -> list[Tensor] | None:
        """Return what a block that is not computed gives, None if it has to run."""
        step = self._state.step
        if self.mode == "stack":
            return _added(entered, self._state.whole.at(step)) if index == 0 else entered
        history = self._state.blocks.get(index)
        if history is None or not history.fits(entered[: history.count]):
            return None
        return _added(entered, history.at(step))

    def _bypassed(self, index: int, entered: list[Tensor]) -> list[Tensor] | None:
        """Return what a bypassed block gives, None if it has to run."""
        if self.config.prune_mode == "identity":
            return entered
        history = self._state.blocks.get(index)
        if history is None or not history.fits(entered[: history.count]):
            return None
        return _added(entered, history.last())

    def _note(self, index: int, entered: list[Tensor]) -> None:
        """Keep and measure what a block has added that has just run."""
        trajectory, state, left = self._trajectory_(), self._state, self._latest
        decision = self._decision
        if decision is None or self.mode == _OPEN:
            return
        fits = all(a.shape == b.shape for a, b in zip(entered, left, strict=False)) and self.streams[index].complete()
        per_block = self.config.schedule == "per_block"
        measures = decision.leads and decision.computes and (per_block or index == trajectory.measured_block)
        bypass = trajectory.pruner.may(index) and self.config.prune_mode == "cached"
        keeps = self.mode == "block" or bypass
        if not fits:
            if keeps or measures:
                self._fail_open(f"has a block {index} that returns other shapes or more than it is given")
            return
        if not (keeps or measures):
            return self._compare(index, entered, left)
        residuals = [after - before for before, after in zip(entered, left, strict=False)]
        if keeps:
            state.blocks.setdefault(index, state.history()).put(state.step, residuals)
        if measures:
            self._measure(index, residuals[0])
        return self._compare(index, entered, left)

    def _compare(self, index: int, entered: list[Tensor], left: list[Tensor]) -> None:
        decision = self._decision
        if decision is not None and decision.leads and decision.computes and self._trajectory_().pruner.may(index):
            self._pending["similarity", index] = similarity(entered[0], left[0])

    def _measure(self, index: int, residual: Tensor) -> None:
        old, self._state.measured[index] = self._state.measured.get(index), residual
        self._pending["ran", index] = residual.new_zeros((), dtype=torch.float64)
        if old is not None and old.shape == residual.shape:
            self._pending["change", index] = relative_change(residual, old)
        if self.config.motion == "none":
            return
        frames = self.config.num_frames
        if frames is None or residual.dim() != 3 or residual.shape[1] % frames:
            self._warn(
                f"motion={self.config.motion!r} needs num_frames, the frames of the latent after patching, dividing "
                f"its {residual.shape[-2]} tokens; D is measured without motion"
            )
            return
        self._pending["motion", index] = motion(residual, frames)

    @torch.compiler.disable
    def sublayer(self, name: str, original: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run an attention or feed-forward module, or return what it returned last."""
        if self._decision is None or self.mode != "sublayer":
            return original(*args, **kwargs)
        history = self._state.sublayers.get(name)
        if not self._decision.computes and history is not None:
            self._report.count(ran=False, block=False)
            found = history.at(self._state.step)
            return found[0] if history.count == 1 else tuple(found)
        output = original(*args, **kwargs)
        self._report.count(ran=True, block=False)
        tensors = [output] if isinstance(output, Tensor) else [*output]
        if all(isinstance(tensor, Tensor) for tensor in tensors):
            self._state.sublayers.setdefault(name, self._state.history()).put(self._state.step, tensors)
        return output

    # Around trajectories ---------------------------------------------------------------------------------------------

    def _change_mode(self, mode: str) -> None:
        """Cache something else from now on; what other modes have kept is dropped."""
        self.mode = self._report.mode = mode
        for state in self.manager._state_cache.values():
            state.whole.clear()
            state.blocks.clear()

    def _fail_open(self, reason: str) -> None:
        self._change_mode(_OPEN)
        self._warn(f"{type(self._transformer).__name__} {reason}; every step is computed")

    def _warn(self, text: str) -> None:
        """Warn once for each text."""
        if text not in self._warned:
            self._warned.add(text)
            logger.warning("QuantCache: %s", text)
        self._report.remarks = tuple(sorted(self._warned))

    def reset(self, keep_context: bool = False) -> None:
        """Drop all that is kept; the report of the trajectory stays until another one begins."""
        context = self.manager._context
        self.manager.reset()
        if keep_context:
            self.manager.set_context(context)
        self._trajectory, self._timestep, self._falls = None, None, None
        self._clear_call()

    def report(self) -> CacheReport:
        """Return the report of the latest trajectory, finished or not."""
        return self._report


def _added(streams: list[Tensor], residuals: list[Tensor]) -> list[Tensor]:
    """Return streams with residuals added; a stream without one goes on as it is."""
    found = [stream + residual for stream, residual in zip(streams, residuals, strict=False)]
    return found + streams[len(found) :]


class RootHook(ModelHook):
    """Begins and ends a call of the transformer."""

    _is_stateful = True

    def __init__(self, engine: Engine) -> None:
        super().__init__()
        self.engine = engine
        self.state_manager = engine.manager  # contexts are set on the managers that stateful hooks have

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """Decide before the first layer runs."""
        self.engine.begin_call(args, kwargs)
        return args, kwargs

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        """Keep what was computed."""
        self.engine.end_call()
        return output

    def reset_state(self, module: nn.Module) -> nn.Module:
        """Drop everything; pipelines ask for it when they are done."""
        self.engine.reset()
        return module


class BlockHook(ModelHook):
    """Stands in for a block."""

    def __init__(self, engine: Engine, index: int) -> None:
        super().__init__()
        self._engine, self._index = engine, index

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Run the block or what stands in for it."""
        return self._engine.block(self._index, self.fn_ref.original_forward, args, kwargs)


class SublayerHook(ModelHook):
    """Stands in for an attention or feed-forward module."""

    def __init__(self, engine: Engine, name: str) -> None:
        super().__init__()
        self._engine, self._name = engine, name

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Run the module or return what it returned last."""
        return self._engine.sublayer(self._name, self.fn_ref.original_forward, args, kwargs)
