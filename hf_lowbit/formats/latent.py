"""Format ``latent``: a key or value projection as a product whose middle is worth keeping, in groups of heads.

The rows of the weight are heads of ``head_dim`` rows each. Heads are put into groups; a group ``g`` of rank ``r_g``
holds ``W_h ≈ U_h D_g`` for each of its heads ``h``. What lies between the factors, ``z = D x``, is the *latent* that a
cache keeps instead of keys or values.

=========  =======================================  ==================================================
tensor     shape                                    meaning
=========  =======================================  ==================================================
``down``   (sum of ranks, in_features)              ``D_g``, group after group
``up``     (num_heads, head_dim, largest rank)      ``U_h`` in the order that the heads have in the
                                                    model; zero beyond the rank of the head's group
=========  =======================================  ==================================================

On disk each is called ``<module>.weight_<name>``. Since ``up`` follows the heads of the model, no other weight has to
be reordered for the groups, and nothing is permuted at run time.
"""

from __future__ import annotations

import dataclasses
import reprlib
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import linear, pad

from hf_lowbit.formats.base import Format, Shapes, Spec, register_format
from hf_lowbit.formats.low_rank import FACTOR_DTYPES

_MOST_HEADS = 2**12  # more than any model has; a larger claim is a damaged or hostile file


@dataclasses.dataclass(frozen=True)
class LatentSpec(Spec):
    """Scalars of a ``latent`` weight.

    Attributes:
        num_heads: heads, each of ``out_features / num_heads`` rows.
        groups: heads of each group, counted from 0; every head is in exactly one group.
        ranks: width of the latent of each group, from 1 to the smaller side of the group's rows.
        dtype: of both factors.
    """

    num_heads: int
    groups: tuple[tuple[int, ...], ...]
    ranks: tuple[int, ...]
    dtype: str = "float16"

    def __post_init__(self) -> None:
        """Turn the lists of JSON into tuples; anything else stays as it is, for :meth:`problems` to name."""
        if isinstance(self.groups, list):
            groups = tuple(tuple(group) if isinstance(group, list) else group for group in self.groups)
            object.__setattr__(self, "groups", groups)
        if isinstance(self.ranks, list):
            object.__setattr__(self, "ranks", tuple(self.ranks))

    @property
    def head_dim(self) -> int:
        """Rows of a head."""
        return self.out_features // self.num_heads

    @property
    def width(self) -> int:
        """Numbers of the latent of one token: the sum of the ranks."""
        return sum(self.ranks)

    @property
    def group_of_head(self) -> tuple[int, ...]:
        """Index of the group of each head."""
        owner = {head: index for index, group in enumerate(self.groups) for head in group}
        return tuple(owner[head] for head in range(self.num_heads))

    @property
    def offsets(self) -> tuple[int, ...]:
        """First position of each group in the latent."""
        return tuple(sum(self.ranks[:index]) for index in range(len(self.ranks)))

    def to_json(self) -> dict[str, Any]:
        """Return the spec as JSON types, defaults left out."""
        return {**super().to_json(), "groups": [list(group) for group in self.groups], "ranks": list(self.ranks)}

    def problems(self) -> list[str]:
        """Return what is wrong with the values, empty if nothing is."""
        found = super().problems()
        if not isinstance(self.dtype, str) or self.dtype not in FACTOR_DTYPES:
            found.append(f"dtype must be one of {', '.join(FACTOR_DTYPES)}, got {reprlib.repr(self.dtype)}")
        if type(self.num_heads) is not int or not 1 <= self.num_heads <= _MOST_HEADS:
            return [
                *found,
                f"num_heads must be an integer from 1 to {_MOST_HEADS}, got {reprlib.repr(self.num_heads)}",
            ]
        if found:
            return found
        if self.out_features % self.num_heads:
            return [f"out_features {self.out_features} is not a multiple of num_heads {self.num_heads}"]
        if not _is_partition(self.groups, self.num_heads):
            return [
                f"groups must put each of the heads 0 to {self.num_heads - 1} into exactly one group, "
                f"got {reprlib.repr(self.groups)}"
            ]
        if not isinstance(self.ranks, tuple) or len(self.ranks) != len(self.groups):
            return [f"ranks must hold one rank for each of {len(self.groups)} groups, got {reprlib.repr(self.ranks)}"]
        for group, rank in zip(self.groups, self.ranks, strict=True):
            most = min(len(group) * self.head_dim, self.in_features)
            if type(rank) is not int or not 1 <= rank <= most:
                found.append(f"a group of {len(group)} heads has rank 1 to {most}, got {reprlib.repr(rank)}")
        return found


def _is_partition(groups: Any, heads: int) -> bool:
    """Return whether ``groups`` holds every head once and no empty group."""
    if not isinstance(groups, tuple) or not all(isinstance(group, tuple) and group for group in groups):
        return False
    members = [head for group in groups for head in group]
    return all(type(head) is int for head in members) and sorted(members) == list(range(heads))


@register_format
@dataclasses.dataclass
class LatentFormat(Format):
    """Tensors of a ``latent`` weight; shapes and meaning in the module docstring."""

    down: Tensor
    up: Tensor

    name: ClassVar[str] = "latent"
    spec_type: ClassVar[type[Spec]] = LatentSpec

    @classmethod
    def shapes(cls, spec: LatentSpec) -> Shapes:
        """Return ``{tensor name: (shape, dtype)}`` of every tensor that ``spec`` calls for."""
        dtype = FACTOR_DTYPES[spec.dtype]
        return {
            "down": ((spec.width, spec.in_features), dtype),
            "up": ((spec.num_heads, spec.head_dim, max(spec.ranks)), dtype),
        }

    @classmethod
    def pack(
        cls,
        groups: Sequence[Sequence[int]],
        ups: Sequence[Tensor],
        downs: Sequence[Tensor],
        dtype: torch.dtype,
    ) -> LatentFormat:
        """Round the factors of all groups to their storage dtype and put them in the order of the model's heads.

        Args:
            groups: heads of each group.
            ups: for each group (heads, head_dim, rank), heads in the order of the group, floating.
            downs: for each group (rank, in_features), floating.
            dtype: one of :data:`FACTOR_DTYPES`.

        Returns:
            A validated format on the device of the factors.

        Raises:
            ValueError: shapes or groups do not fit, the dtype is none of those, or a value leaves its range.
        """
        names = {value: name for name, value in FACTOR_DTYPES.items()}
        ranks = tuple(int(down.shape[0]) for down in downs)
        fitting = len(groups) == len(ups) == len(downs) > 0 and all(
            up.dim() == 3 and down.dim() == 2 and up.shape == (len(group), ups[0].shape[1], down.shape[0])
            for group, up, down in zip(groups, ups, downs, strict=True)
        )
        if dtype not in names or not fitting:
            shapes = [(tuple(up.shape), tuple(down.shape)) for up, down in zip(ups, downs, strict=False)]
            raise ValueError(f"cannot store factors of shapes {shapes} for groups {list(groups)} as {dtype}")
        heads = sum(len(group) for group in groups)
        spec = LatentSpec(
            out_features=heads * ups[0].shape[1],
            in_features=downs[0].shape[1],
            num_heads=heads,
            groups=tuple(tuple(group) for group in groups),
            ranks=ranks,
            dtype=names[dtype],
        )
        if problems := spec.problems():
            raise ValueError(f"packed weight: {'; '.join(problems)}")
        up = torch.cat([pad(factor, (0, max(ranks) - factor.shape[2])) for factor in ups])
        order = torch.tensor([head for group in groups for head in group], device=up.device).argsort()
        packed = cls(
            spec=spec, down=torch.cat(list(downs)).to(dtype).contiguous(), up=up[order].to(dtype).contiguous()
        )
        packed.validate("packed weight")
        return packed

    def check_values(self) -> list[str]:
        """Return what is wrong with the tensors' contents: values not finite, or not zero where nothing belongs."""
        found = [
            f"{name} holds NaN or infinity"
            for name, factor in self.state().items()
            if not bool(torch.isfinite(factor.abs().amax()))
        ]
        ranks = [self.spec.ranks[group] for group in self.spec.group_of_head]
        if min(ranks) < self.up.shape[2]:
            column = torch.arange(self.up.shape[2], device=self.up.device)
            beyond = column >= torch.tensor(ranks, device=self.up.device)[:, None]
            if bool((self.up * beyond[:, None]).any()):
                found.append("up is not zero beyond the rank of a head's group")
        return found

    def latent(self, x: Tensor) -> Tensor:
        """Return what a cache keeps of ``x``: (..., in_features) to (..., sum of ranks), in the dtype of ``x``."""
        return linear(x, self.down.to(x.dtype))

    def expand(self, z: Tensor) -> Tensor:
        """Return the rows that a latent stands for: (..., sum of ranks) to (..., out_features), heads in order."""
        spec, parts = self.spec, []
        for group, start, rank in zip(spec.groups, spec.offsets, spec.ranks, strict=True):
            rows = self.up[list(group), :, :rank].reshape(-1, rank)
            parts.append(linear(z[..., start : start + rank], rows.to(z.dtype)).unflatten(-1, (len(group), -1)))
        place = {head: at for at, head in enumerate(head for group in spec.groups for head in group)}
        order = [place[head] for head in range(spec.num_heads)]
        heads = torch.cat(parts, dim=-2)
        return (heads if order == sorted(order) else heads[..., order, :]).flatten(-2)

    def unpack(self) -> Tensor:
        """Return the dense weight, (out_features, in_features), float32."""
        return self.expand(self.down.float().T).T.contiguous()

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Return ``x @ W.T + bias``; x (..., in_features), result and middle in the dtype of ``x``."""
        out = self.expand(self.latent(x))
        return out if bias is None else out + bias.to(out.dtype)
