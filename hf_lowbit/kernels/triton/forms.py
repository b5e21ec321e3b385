"""What kernels read instead of the stored tensors: computed once from them, kept as long as they live, never saved.

Plain torch, any device; nothing here imports Triton.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from hf_lowbit.kernels.planes import pack_plane, padded_columns, unpack_plane
from hf_lowbit.kernels.reference import kept_columns, spread


def compute_form(
    sign: Tensor, group: Tensor | None, mask: Tensor, in_features: int, keep_n: int, keep_m: int
) -> tuple[Tensor, Tensor | None]:
    """Spread planes of the kept positions to all columns, so that a kernel finds a column's bit at its own place.

    Args:
        sign: (out_features, bytes of the kept columns), uint8.
        group: (planes, out_features, bytes of the kept columns), uint8, or None.
        mask: (out_features, bytes of all columns), uint8.
        in_features: number of columns.
        keep_n: N of the N:M mask.
        keep_m: M of the N:M mask.

    Returns:
        ``sign`` and ``group`` with the bytes of all columns; bits of pruned positions are 0.
    """
    keep, kept = unpack_plane(mask, in_features), kept_columns(in_features, keep_n, keep_m)

    def widen(plane: Tensor) -> Tensor:
        return pack_plane(spread(unpack_plane(plane, kept), keep))

    return widen(sign), None if group is None else torch.stack([widen(plane) for plane in group])


def padded_scale(col_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Return column scales (entries, in_features) in ``dtype``, with zeros up to a multiple of 128 columns."""
    columns = col_scale.shape[1]
    return torch.nn.functional.pad(col_scale.to(dtype), (0, padded_columns(columns) - columns)).contiguous()


class Derived:
    """Results that belong to stored tensors: computed again when one of these has changed, gone when it is gone.

    A change is seen by the version counter and the address of a tensor. Tensors made in inference mode have no
    version counter, so nothing is kept for them.
    """

    def __init__(self) -> None:
        """Start empty."""
        self._kept: WeakTensorKeyDictionary = WeakTensorKeyDictionary()

    def get(self, key: Any, sources: tuple[Tensor, ...], make: Callable[[], Any]) -> Any:
        """Return ``make()``, or what it returned before.

        Args:
            key: what is made, and every setting that it depends on.
            sources: the tensors that it depends on; the first one owns the result.
            make: called with nothing.
        """
        if any(source.is_inference() for source in sources):
            return make()
        stamp = tuple((source.data_ptr(), source._version, source.device) for source in sources)
        of_owner = self._kept.get(sources[0])
        found = None if of_owner is None else of_owner.get(key)
        if found is not None and found[0] == stamp:
            return found[1]
        result = make()
        if sources[0].is_cuda:
            if torch.cuda.is_current_stream_capturing():
                return result  # it lives in the memory of a graph and holds nothing before the first replay
            torch.cuda.current_stream(sources[0].device).synchronize()  # another stream may read it next
        if of_owner is None:
            of_owner = self._kept.setdefault(sources[0], {})
        of_owner[key] = (stamp, result)
        return result
