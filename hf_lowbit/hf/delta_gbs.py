"""δ-GBS in diffusers: a hook that chooses the bits of activations before every denoising step.

A linear layer does not see which step it runs in; the transformer's call does. :func:`enable_delta_gbs` adds a module
``delta_gbs`` without parameters to the transformer. Torch's own hooks show it each call and each output, and it is
known to diffusers as a stateful hook, so that a pipeline tells it when a trajectory ends and which of the two calls of
classifier-free guidance is running. Being a module, it is copied and printed with the model, and not saved: what is
saved is the config.

What is a step: a run of calls with the same step index or, in the many pipelines that give none, the same timestep.
The first call of a step decides (:mod:`hf_lowbit.methods.dvd_quant.schedule`), and its output is what the decision of
later steps is made of; further calls in the step, such as those for guidance, take the same bits. Every context
(``cond``, ``uncond``, ...) has a state of its own, so a context that comes first only sometimes is never compared with
another. Calls outside of any context are those of one context called ``inference``.

What is a trajectory: it ends when the pipeline does (``maybe_free_model_hooks``). Should it be left by an exception,
the next one is told from it by its timesteps, which jump back, and by the shape of its latents.

Step caches leave calls out, in whole or after the first block. A call in which the last layer that rounds activations
did not run counts for nothing: no step, no bits, and its output, a reused one, is no change.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Iterable
from typing import Any

import torch
from diffusers.hooks.hooks import BaseState, CacheContext, HookRegistry, ModelHook, StateManager
from torch import Tensor, nn

from hf_lowbit.config import LowBitConfig
from hf_lowbit.kernels.rounding import check_act_bits
from hf_lowbit.layers import PackedLinear, check_model, packed_modules
from hf_lowbit.methods.dvd_quant import schedule
from hf_lowbit.recipe import matches, rules_of

NAME = "delta_gbs"
_NO_CONTEXT = "inference"


@dataclasses.dataclass(frozen=True)
class DeltaReport:
    """What was decided along one trajectory.

    Attributes:
        bits: of the activations, for each step that was computed.
        changes: of the output, relative to the step before; none for the first step.
        skipped: calls that a step cache left out.
    """

    bits: tuple[int, ...] = ()
    changes: tuple[float, ...] = ()
    skipped: int = 0

    @property
    def mean_bits(self) -> float:
        """Mean bits of the activations over the steps that were computed; NaN if there were none."""
        return sum(self.bits) / len(self.bits) if self.bits else math.nan


def enable_delta_gbs(
    transformer: Any,
    *,
    delta: float = 0.09,
    low: int = 4,
    high: int = 8,
    warmup: int = 2,
    layers: Iterable[str] | None = None,
) -> None:
    """Choose the bits of activations step by step; called for models whose config has ``delta``.

    A second call replaces what the first one set.

    Args:
        transformer: a model of diffusers, in memory, with packed layers that round activations.
        delta: how much the output may change, in sum over steps, before a step takes many bits; 0 for many bits
            always, infinity for few bits after the warm-up.
        low: bits of activations in calm steps.
        high: bits of activations in the others.
        warmup: how many steps at the start take many bits.
        layers: names of the layers it is for; None for all that round activations.

    Raises:
        TypeError: it is no model, but a pipeline.
        ValueError: an argument is out of range, no layer rounds activations, or one that is named does not.
    """
    check_model(transformer, "transformer")
    hook = DeltaGBSHook(transformer, delta, low, high, warmup, layers)
    disable_delta_gbs(transformer)
    transformer.add_module(NAME, _DeltaGBS(hook))
    hook.attach(transformer)
    HookRegistry.check_if_exists_or_initialize(transformer).invalidate_child_registries_cache()


def disable_delta_gbs(transformer: Any) -> None:
    """Take the hook away; layers round activations to the bits they were stored with. Without a hook, do nothing."""
    hook = _hook_of(transformer)
    if hook is None:
        return
    hook.detach(transformer)
    delattr(transformer, NAME)
    HookRegistry.check_if_exists_or_initialize(transformer).invalidate_child_registries_cache()


def delta_gbs_report(transformer: Any) -> DeltaReport:
    """Return what was decided along the trajectory that runs or, after its end, along the last one.

    Raises:
        ValueError: δ-GBS is not enabled.
    """
    hook = _hook_of(transformer)
    if hook is None:
        raise ValueError(f"{type(transformer).__name__}: delta-GBS is not enabled, see enable_delta_gbs")
    return hook.running if hook.running.bits or hook.running.skipped else hook.finished


def reset_delta_gbs(transformer: Any) -> None:
    """End the trajectory; pipelines do so by themselves, loops of one's own call it between two videos.

    Raises:
        ValueError: δ-GBS is not enabled.
    """
    delta_gbs_report(transformer)
    hook: Any = _hook_of(transformer)
    hook.reset_state(transformer)


def options_of(config: LowBitConfig) -> dict[str, Any] | None:
    """Return what a config wants of :func:`enable_delta_gbs`, None if it wants nothing.

    Raises:
        ValueError: rules of a recipe want different things.
    """
    rules: list[Any] = [rule for _, rule in rules_of(config) if getattr(rule, "delta", None) is not None]
    wanted = {(rule.delta, rule.a_bits_low, rule.a_bits_high, rule.warmup_steps) for rule in rules}
    if len(wanted) > 1:
        raise ValueError(
            "rules of a recipe differ in delta, a_bits_low, a_bits_high or warmup_steps; a step is judged once for "
            "the whole model"
        )
    return dict(zip(("delta", "low", "high", "warmup"), wanted.pop(), strict=True)) if wanted else None


def follow_config(model: Any, config: LowBitConfig) -> None:
    """Enable what the config of a packed model asks for, on the layers of the rules that ask; else do nothing.

    Raises:
        ValueError: as :func:`options_of`.
    """
    options, names = options_of(config), []
    for name, layer in packed_modules(model).items():
        rule = next((rule for pattern, rule in rules_of(config) if matches(pattern, name)), None)
        if getattr(rule, "delta", None) is not None and _rounds(layer):
            names.append(name)
    if options is not None and names:
        enable_delta_gbs(model, **options, layers=names)


def _rounds(layer: Any) -> bool:
    return bool(layer.format_type.rounds_activations(layer.spec))


def _plain(name: str) -> str:
    """Return the name that a layer has without an adapter around it."""
    return name.removesuffix(".base_layer")


class _State(BaseState):
    """Of one context.

    Attributes:
        drift: what decisions are made of.
        previous: output of the last step that this context decided on.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.drift = schedule.Drift()
        self.previous: Tensor | None = None


@dataclasses.dataclass
class _Step:
    """The step that runs.

    Attributes:
        key: step index or timestep; None if calls give neither.
        contexts: names of the contexts that were called in it.
        bits: of its activations.
        drift: of the deciding context, once the step is known to be computed.
    """

    key: float | None
    contexts: set[str]
    bits: int
    drift: schedule.Drift


class DeltaGBSHook(ModelHook):  # type: ignore[misc]
    """Holds the states; :func:`enable_delta_gbs` attaches it."""

    _is_stateful = True

    def __init__(
        self, model: Any, delta: float, low: int, high: int, warmup: int, layers: Iterable[str] | None
    ) -> None:
        super().__init__()
        if isinstance(delta, bool) or not isinstance(delta, (int, float)) or not delta >= 0:
            raise ValueError(f"delta must be a number of at least 0, got {delta!r}")
        if type(warmup) is not int or warmup < 0:
            raise ValueError(f"warmup must be a whole number of steps, at least 0, got {warmup!r}")
        for bits in (low, high):
            check_act_bits(bits)
        if low > high:
            raise ValueError(f"low must be at most high, got {low} and {high}")
        self.delta, self.low, self.high, self.warmup = delta, low, high, warmup
        if isinstance(layers, str):
            raise ValueError(f"layers must be several names, got the text {layers!r}")
        self.layers = None if layers is None else frozenset(layers)
        found = self._rounding(model)
        if not found:
            raise ValueError(f"{type(model).__name__}: no packed layer rounds activations, delta-GBS has none to set")
        unknown = (self.layers or frozenset()) - {*map(_plain, found)}
        if unknown:
            raise ValueError(f"layers: no packed layer called {min(map(str, unknown))!r} rounds activations")
        self.states: Any = StateManager(_State)  # type: ignore[arg-type]  # a class is what it wants
        self.running, self.finished = DeltaReport(), DeltaReport()
        self.step: _Step | None = None
        self.decides = False  # whether the call that runs is the one that decides
        self.ran = False
        self.inside = False  # of a call
        self.keys: list[float] = []  # of the first and the last step
        self.shape: torch.Size | None = None
        self.handles: list[Any] = []
        self.timestep_place = _place_of_timestep(model)

    def _rounding(self, model: Any) -> dict[str, PackedLinear]:
        """Return the layers it is for. Looked up anew for each step, since layers may be replaced or wrapped."""
        return {
            name: layer
            for name, layer in packed_modules(model).items()
            if _rounds(layer) and (self.layers is None or _plain(name) in self.layers)
        }

    def attach(self, model: Any) -> None:
        """Hook it to a model, and to the last of the layers it is for."""
        self.handles = [
            model.register_forward_pre_hook(self._before, with_kwargs=True),
            model.register_forward_hook(self._after),
        ]
        [*self._rounding(model).values()][-1].on_call = self._seen

    def detach(self, model: Any) -> None:
        """Undo :meth:`attach`."""
        for handle in self.handles:
            handle.remove()
        for layer in self._rounding(model).values():
            layer.act_bits = layer.on_call = None

    def _set(self, model: Any, bits: int) -> None:
        for layer in self._rounding(model).values():
            layer.act_bits = bits

    def _seen(self) -> None:
        self.ran = True

    @torch.compiler.disable
    def _before(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Decide, if a step begins with this call."""
        if self.states._context is None:
            self.states.set_context(CacheContext(name=_NO_CONTEXT))
        name = self.states.context.name
        timestep = kwargs.get("timestep", args[self.timestep_place] if len(args) > self.timestep_place else None)
        key = _key(self.states.context.step_index, timestep)
        self._tell_trajectories_apart(key, _shape_of(args, kwargs))
        self.decides = self._begins(key, name)
        self.ran, self.inside = False, True
        if self.decides:
            high, drift = schedule.decide(self.states.get_state().drift, self.delta, self.warmup)
            self.step = _Step(key, set(), self.high if high else self.low, drift)
            self._set(model, self.step.bits)
        if self.step is not None:
            self.step.contexts.add(name)

    def _begins(self, key: float | None, name: str) -> bool:
        if self.step is None or key != self.step.key:
            return True
        return key is None and name in self.step.contexts

    def _tell_trajectories_apart(self, key: float | None, shape: torch.Size | None) -> None:
        """Reset if a trajectory was left without a word: steps never turn back, and latents keep their shape."""
        back = key is not None and len(self.keys) == 2 and (key - self.keys[1]) * (self.keys[1] - self.keys[0]) < 0
        if back or self.inside or (self.shape is not None and shape != self.shape):
            self._end()
        self.shape = shape
        if key is not None:
            self.keys = [*self.keys[:1], key] if not self.keys or key != self.keys[-1] else self.keys

    @torch.compiler.disable
    def _after(self, model: Any, args: tuple[Any, ...], output: Any) -> None:
        """Look at what came out, if something was computed."""
        self.inside = False
        if self.step is None or not self.decides:
            return
        if not self.ran:
            self.running = dataclasses.replace(self.running, skipped=self.running.skipped + 1)
            return
        found, state = _tensor_of(output).detach(), self.states.get_state()
        state.drift = self.step.drift
        changes = self.running.changes
        if state.previous is not None and state.previous.shape == found.shape:
            change = schedule.relative_change(found, state.previous)
            state.drift, changes = schedule.observe(state.drift, change), (*changes, change)
        state.previous = found.clone()  # the memory of outputs may be used again
        self.running = DeltaReport((*self.running.bits, self.step.bits), changes, self.running.skipped)

    def _end(self) -> None:
        if self.running.bits or self.running.skipped:
            self.running, self.finished = DeltaReport(), self.running
        context = self.states._context
        self.states.reset()
        self.states.set_context(context)
        self.step, self.keys, self.shape, self.inside = None, [], None, False

    def reset_state(self, module: Any) -> Any:
        """End the trajectory; diffusers calls it at the end of a pipeline."""
        self._end()
        self.states.set_context(None)
        return module


class _DeltaGBS(nn.Module):
    """The module under which a transformer keeps the hook; it is never called."""

    def __init__(self, hook: DeltaGBSHook) -> None:
        super().__init__()
        HookRegistry.check_if_exists_or_initialize(self).register_hook(hook, NAME)
        del self.forward  # what diffusers has put there can neither be pickled nor copied

    def forward(self) -> None:
        """Refuse."""
        raise NotImplementedError("delta_gbs is no layer")

    @property
    def hook(self) -> DeltaGBSHook:
        registry: Any = self._diffusers_hook
        hook: DeltaGBSHook = registry.get_hook(NAME)
        return hook

    def extra_repr(self) -> str:
        hook = self.hook
        return f"delta={hook.delta}, bits={hook.low} or {hook.high}, warmup={hook.warmup}"


def _hook_of(transformer: Any) -> DeltaGBSHook | None:
    module = getattr(transformer, NAME, None)
    return module.hook if isinstance(module, _DeltaGBS) else None


def _place_of_timestep(model: Any) -> int:
    """Return where the timestep stands among the arguments of a model's call, beyond all if it has none."""
    names = [*inspect.signature(type(model).forward).parameters][1:]
    return names.index("timestep") if "timestep" in names else len(names)


def _key(step_index: int | None, timestep: Any) -> float | None:
    """Return what tells steps apart: the step's index, else the timestep (of the noisiest token), else None.

    Timesteps fall and step indices rise; each is compared with its like only.
    """
    if step_index is not None:
        return float(step_index)
    if isinstance(timestep, Tensor) and timestep.numel():
        return float(timestep.max())
    return float(timestep) if isinstance(timestep, (int, float)) else None


def _shape_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Size | None:
    """Return the shape of the latents."""
    latents = kwargs.get("hidden_states", args[0] if args else None)
    return latents.shape if isinstance(latents, Tensor) else None


def _tensor_of(output: Any) -> Tensor:
    found: Tensor = output[0] if isinstance(output, tuple) else getattr(output, "sample", output)
    return found
