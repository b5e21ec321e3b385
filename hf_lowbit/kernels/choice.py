"""Tables of kernels: each kernel says for a case whether it can, or why not, and the first that can is taken.

An op has a table; what describes a case is the op's own. There is no environment variable: :func:`forced` is for tests
and measurements, and for opt-in modes.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One way to compute an op.

    Attributes:
        name: for :func:`forced` and for tables.
        summary: what it does, in a few words.
        why_not: of a case -> reason or None.
        linear: the product, or what the op returns.
        dequantize: the dense weight, or None to leave that to the reference.
        opt_in: never taken unless forced.
    """

    name: str
    summary: str
    why_not: Callable[..., str | None]
    linear: Callable[..., Any]
    dequantize: Callable[..., Tensor] | None = None
    opt_in: bool = False


_names: dict[str, None] = {}  # of kernels in any table, in order
_forced: str | None = None


class Table:
    """The kernels of an op in order of preference; the last one can all cases."""

    def __init__(self, *kernels: Kernel) -> None:
        """Take the kernels."""
        self.kernels = {kernel.name: kernel for kernel in kernels}
        _names.update(dict.fromkeys(self.kernels))

    def choose(self, *case: Any) -> Kernel:
        """Return the kernel for a case.

        Raises:
            RuntimeError: a kernel is forced that cannot do it; with the reason.
        """
        kernel = self.kernels.get(_forced or "")
        if kernel is not None:
            reason = kernel.why_not(*case)
            if reason is not None:
                raise RuntimeError(f"kernel {kernel.name!r} was asked for and cannot multiply: {reason}")
            return kernel
        return next(k for k in self.kernels.values() if not k.opt_in and k.why_not(*case) is None)

    def reasons(self, *case: Any) -> dict[str, str]:
        """Return for every kernel why it is taken or not, for tables."""
        found, taken = {}, False
        for name, kernel in self.kernels.items():
            reason = kernel.why_not(*case)
            if reason is not None:
                found[name] = f"cannot: {reason}"
            elif kernel.opt_in:
                found[name] = f"on request: {kernel.summary}"
            else:
                found[name] = f"{'could, but is slower' if taken else 'taken'}: {kernel.summary}"
                taken = True
        return found


@contextlib.contextmanager
def forced(name: str) -> Iterator[None]:
    """Use one kernel within a ``with`` statement, in all threads and all ops that have one of this name.

    Raises:
        ValueError: no op has a kernel of this name.
    """
    global _forced
    if name not in _names:
        raise ValueError(f"unknown kernel {name!r}; known: {', '.join(_names)}")
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


def forced_name() -> str | None:
    """Return the name that :func:`forced` asks for."""
    return _forced
