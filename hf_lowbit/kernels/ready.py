"""Short ways from a layer to its product while a model decodes; layers that read one input share a call.

In most blocks q, k and v read the same activations, and so do gate and up. Which layers do is not told by names: it is
noticed while the model runs, when calls that follow each other are given the very same tensor. From the second time on
the first of them computes for all, and the others find their results. Nothing is shared across threads, and what is
computed in vain, because a model takes another way, ends the sharing.
"""

from __future__ import annotations

import dataclasses
import threading
import weakref

from torch import Tensor

from hf_lowbit.kernels import dispatch, integer
from hf_lowbit.kernels.cpu.binary import Parts, Sizes
from hf_lowbit.kernels.cpu.calls import Call, Together
from hf_lowbit.kernels.ops import unobserved

_MOST_IN_VAIN = 2  # times that a group's results were not asked for, before it is given up


class Ready:
    """The product with one weight, for calls that nothing has to see."""

    def __init__(self, call: Call, bias: Tensor | None) -> None:
        """Take what ``binary_call`` or ``integer_call`` has found."""
        self.call, self._bias = call, bias
        self.group: Group | None = None
        self.alone = False

    def __call__(self, x: Tensor) -> Tensor | None:
        """Return ``x @ W.T + bias``, or None where the long way has to be taken.

        Args:
            x: (..., in_features), anything.
        """
        if dispatch.forced_name() is not None or not unobserved(x, self._bias):
            return None
        if self.group is not None:
            out = self.group.take(self, x)
            if out is not None:
                return out
        out = self.call(x)
        if out is not None and self.group is None and not self.alone:
            _notice(self, x)
        return out


def binary_ready(parts: Parts, bias: Tensor | None, sizes: Sizes) -> Ready | None:
    """Return a shorter way to :func:`hf_lowbit.kernels.ops.binary_linear` with one weight, None if there is none."""
    call = dispatch.binary_call(parts, bias, sizes)
    return None if call is None else Ready(call, bias)


def integer_ready(parts: integer.Parts, bias: Tensor | None, sizes: integer.Sizes) -> Ready | None:
    """Return a shorter way to :func:`hf_lowbit.kernels.integer.integer_linear`, None if there is none."""
    call = integer.integer_call(parts, bias, sizes)
    return None if call is None else Ready(call, bias)


@dataclasses.dataclass
class _Results:
    """What a thread has computed for an input, by the members that have not asked yet."""

    x: Tensor
    version: int
    outs: dict[Ready, Tensor]


class Group:
    """Weights that read the same input."""

    def __init__(self, members: list[Ready]) -> None:
        """Tie them together."""
        self._members = members
        self._together = Together([member.call for member in members])
        self._local = threading.local()
        self._in_vain = 0
        for member in members:
            member.group = self

    def take(self, member: Ready, x: Tensor) -> Tensor | None:
        """Return a member's result, computing those of all for an input that is new; None: compute it alone."""
        if x.is_inference():  # whether it was written to in between cannot be seen
            return None
        results: _Results | None = getattr(self._local, "results", None)
        if results is not None and results.x is x and results.version == x._version:
            return results.outs.pop(member, None)
        if results is not None and results.outs:
            self._in_vain += 1
            if self._in_vain > _MOST_IN_VAIN:
                self._dissolve()
                return None
        outs = self._together(x)
        if outs is None:
            return None
        self._local.results = _Results(x, x._version, dict(zip(self._members, outs, strict=True)))
        return self._local.results.outs.pop(member)

    def _dissolve(self) -> None:
        self._local = threading.local()
        for member in self._members:
            member.group, member.alone = None, True


_LAST = threading.local()  # input of the last call, and the members that were given it; neither is kept alive


def _notice(member: Ready, x: Tensor) -> None:
    """Remember a call; when a new input comes, those that were given the last one become a group."""
    seen: list[weakref.ref[Ready]] = getattr(_LAST, "members", [])
    if seen and _LAST.x() is x:
        seen.append(weakref.ref(member))
        return
    found = [each for each in (ref() for ref in seen) if each is not None and each.group is None]
    if len(found) > 1 and len(set(found)) == len(found) and len({type(each.call.job) for each in found}) == 1:
        Group(found)
    _LAST.x, _LAST.members = weakref.ref(x), [weakref.ref(member)]
