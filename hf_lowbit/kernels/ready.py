"""Short ways from a layer to its product while a model decodes; layers that read one input share a call.

In most blocks q, k and v read the same activations, and so do gate and up. Which layers do is not told by names: it is
noticed while the model runs, when calls that follow each other are given the very same tensor. From the second time on
the first of them computes for all, and the others find their results. What is often computed in vain, because a model
takes another way, ends the sharing; a request that is broken off now and then does not.

Threads may use one model at the same time. Which layers belong together is known to all of them; inputs and results
are each thread's own. Another thread may make or end a group at any moment, so what a call needs of it is read once.
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

# Results that are left unasked for weigh so much against the sharing, those that were all used speak so much for it.
_IN_VAIN, _USED, _MOST_IN_VAIN = 8, 1, 16
_MOST_MEMBERS = 4096  # of calls in a row with one tensor that are remembered; blocks of many experts have some hundred


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
        group = self.group
        if group is not None:
            out = group.take(self, x)
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
        for member in members:
            member.group = self

    def take(self, member: Ready, x: Tensor) -> Tensor | None:
        """Return a member's result, computing those of all for an input that is new; None: compute it alone."""
        if x.is_inference():  # whether it was written to in between cannot be seen
            return None
        local = self._local
        results: _Results | None = getattr(local, "results", None)
        if results is not None and results.x is x and results.version == x._version:
            return results.outs.pop(member, None)
        if results is not None:
            in_vain = getattr(local, "in_vain", 0)
            local.in_vain = in_vain + _IN_VAIN if results.outs else max(in_vain - _USED, 0)
            if local.in_vain > _MOST_IN_VAIN:
                self._dissolve()
                return None
        outs = self._together(x)
        if outs is None:
            return None
        found = dict(zip(self._members, outs, strict=True))
        own = found.pop(member)
        local.results = _Results(x, x._version, found)
        return own

    def _dissolve(self) -> None:
        with _GROUPING:
            self._local = threading.local()
            for member in self._members:
                if member.group is self:
                    member.group, member.alone = None, True


_GROUPING = threading.Lock()  # held while a layer comes into a group or leaves it: a layer is in one group at most
_LAST = threading.local()  # input of the last call, and the members that were given it; neither is kept alive


def _notice(member: Ready, x: Tensor) -> None:
    """Remember a call; when a new input comes, those that were given the last one become a group."""
    seen: list[weakref.ref[Ready]] = getattr(_LAST, "members", [])
    if seen and _LAST.x() is x:
        if len(seen) < _MOST_MEMBERS:
            seen.append(weakref.ref(member))
        return
    found = [each for each in (ref() for ref in seen) if each is not None]
    with _GROUPING:
        free = [each for each in found if each.group is None and not each.alone]
        if len(free) > 1 and len(set(free)) == len(free) and len({type(each.call.job) for each in free}) == 1:
            Group(free)
    _LAST.x, _LAST.members = weakref.ref(x), [weakref.ref(member)]
