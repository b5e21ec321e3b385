"""Random ``binary`` weights of every kind and size, quickly made, for the kernel tests."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from hf_lowbit.kernels import pack_plane


@dataclasses.dataclass(frozen=True)
class Kind:
    """What a weight has; the fields are those of the format's spec."""

    groups: int = 1
    salient_groups: int = 0
    shift: bool = False
    columns: bool = False
    keep: tuple[int, int] = (0, 0)


# All that the methods make, and what they do not: three groups, shifts together with column scales.
KINDS = {
    "rtn": Kind(),
    "billm": Kind(2, 1, shift=True),
    "arb": Kind(2, 2, shift=True),
    "rc": Kind(2, 2, columns=True),
    "rc-4-groups": Kind(4, 2, columns=True),
    "rc-2:4": Kind(2, 2, columns=True, keep=(2, 4)),
    "arb-4:8": Kind(2, 1, shift=True, keep=(4, 8)),
    "rtn-2:4": Kind(keep=(2, 4)),
    "one-group-columns": Kind(1, 1, columns=True),
    "three-groups": Kind(3, 2, shift=True),
    "no-salient": Kind(4, 0, columns=True),
    "everything": Kind(4, 2, shift=True, columns=True, keep=(3, 5)),
}


@dataclasses.dataclass(frozen=True)
class Case:
    """A packed weight: ``parts`` and ``sizes`` in the order of the op."""

    kind: Kind
    parts: tuple[Tensor | None, ...]
    sizes: tuple[int, int, int, int]

    def to(self, device: str) -> Case:
        """The same weight on another device."""
        parts = tuple(None if part is None else part.to(device) for part in self.parts)
        return dataclasses.replace(self, parts=parts)


def make(
    kind: Kind,
    n: int,
    m: int,
    block: int = 128,
    dtype: torch.dtype = torch.float16,
    seed: int = 0,
    share: float = 0.15,
) -> Case:
    """A random weight (n, m); about this share of its columns is salient, the first and the last among them."""
    random = torch.Generator().manual_seed(seed)
    g, s, blocks = kind.groups, kind.salient_groups, -(-m // block)

    def bits(*shape: int) -> Tensor:
        return torch.rand(shape, generator=random) < 0.5

    def scale(*shape: int, low: float = 0.25) -> Tensor:
        return (torch.rand(shape, generator=random) + low).to(dtype)

    salient = None
    if s:
        inner = torch.randperm(m, generator=random)[: int(share * m)]
        salient = torch.cat([inner, torch.tensor([0, m - 1])]).unique().to(torch.int32)
    code = torch.randint(g, (n, m), generator=random)
    if s > 1 and salient is not None:
        code[:, salient.long()] %= s
    mask = _mask(kind.keep, n, m, random) if kind.keep[1] else None

    def kept(plane: Tensor) -> Tensor:
        return pack_plane(plane if mask is None else plane[mask].view(n, -1))

    planes = (g - 1).bit_length()
    parts = (
        kept(bits(n, m)),
        scale(2 * s + g, blocks, n),
        torch.stack([kept(code >> p & 1 == 1) for p in range(planes)]) if planes else None,
        scale(s + g, blocks, n, low=-0.75) if kind.shift else None,
        scale(max(s, g), m) if kind.columns else None,
        salient,
        None if salient is None else pack_plane(bits(n, len(salient))),
        scale(s, len(salient)) if salient is not None and kind.columns else None,
        None if mask is None else pack_plane(mask),
    )
    return Case(kind, parts, (m, block, *kind.keep))


def _mask(keep: tuple[int, int], n: int, m: int, random: torch.Generator) -> Tensor:
    mask = torch.zeros((n, m), dtype=torch.bool)
    for start in range(0, m, keep[1]):
        width = min(keep[1], m - start)
        order = torch.rand((n, width), generator=random).argsort(1)
        mask[:, start : start + width] = order < -(-keep[0] * width // keep[1])
    return mask
