"""What is kept of a computed step to be used again: tensors as they are or in eight bits, of one step or a few."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hf_lowbit.methods.quantcache.algorithm import extrapolation_weights, from_int8, to_int8

_Kept = tuple[Tensor, Tensor | None]  # a tensor, or codes with their scale


class History:
    """The tensors of the last computed steps, and what they say about another one.

    A step holds one tensor, or several of different shapes (the two streams of joint attention).
    """

    def __init__(self, order: int = 0, int8: bool = False) -> None:
        """Make an empty history.

        Args:
            order: 0 gives the last tensors again, 1 and 2 continue the line or parabola through the last two or three
                steps, once there are as many.
            int8: whether tensors are kept in eight bits, with a scale per token.
        """
        self._order, self._int8 = order, int8
        self._steps: list[int] = []  # latest first
        self._kept: list[list[_Kept]] = []
        self._dtypes: list[torch.dtype] = []

    def __bool__(self) -> bool:
        """Return whether there is anything to use."""
        return bool(self._steps)

    def put(self, step: int, tensors: Sequence[Tensor]) -> None:
        """Keep the tensors of a computed step; a change of shapes, dtypes or devices drops the earlier ones."""
        if not self.fits(tensors):
            self.clear()
        kept: list[_Kept] = [to_int8(tensor) if self._int8 else (tensor, None) for tensor in tensors]
        self._steps, self._kept = [step, *self._steps][: self._order + 1], [kept, *self._kept][: self._order + 1]
        self._dtypes = [tensor.dtype for tensor in tensors]

    def clear(self) -> None:
        """Forget everything."""
        self._steps, self._kept, self._dtypes = [], [], []

    def fits(self, tensors: Sequence[Tensor]) -> bool:
        """Return whether what is kept has the shapes, dtypes and devices of these."""
        if not self._kept or len(tensors) != len(self._dtypes):
            return False
        return all(
            kept.shape == tensor.shape and dtype == tensor.dtype and kept.device == tensor.device
            for (kept, _), dtype, tensor in zip(self._kept[0], self._dtypes, tensors, strict=True)
        )

    def last(self) -> list[Tensor]:
        """Return the tensors of the last computed step."""
        return self._read(0)

    def at(self, step: int) -> list[Tensor]:
        """Return what is to be used at a step.

        Raises:
            IndexError: nothing is kept.
        """
        found = self._read(0)
        if len(self._steps) == 1:
            return found
        weights = extrapolation_weights(self._steps, step)
        found = [tensor * weights[0] for tensor in found]
        for i, weight in enumerate(weights[1:], 1):
            found = [total.add_(tensor, alpha=weight) for total, tensor in zip(found, self._read(i), strict=True)]
        return found

    def _read(self, i: int) -> list[Tensor]:
        return [
            kept if scale is None else from_int8(kept, scale, dtype)
            for (kept, scale), dtype in zip(self._kept[i], self._dtypes, strict=True)
        ]

    @property
    def count(self) -> int:
        """How many tensors a step has."""
        return len(self._dtypes)

    def tensors(self) -> list[Tensor]:
        """Return everything that is held."""
        return [tensor for kept in self._kept for pair in kept for tensor in pair if tensor is not None]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors that are held."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors())
