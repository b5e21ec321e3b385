"""One token's attention over latents on a processor that multiplies bfloat16: AMX, or AVX-512 with BF16.

Keys are rebuilt some tokens at a time, and rotated and met by the queries while they are in the first cache; values
are summed as latents. Codes become bfloat16 on the way. ``csrc/latent.h`` has the steps.

Rounding: latents and factors are multiplied as bfloat16 with sums in float32; rotation, norm and soft-max are float32;
the weights of the values are rounded to bfloat16. Where keys are neither rotated nor normed, what a query asks of the
latents is rounded to bfloat16, too.
"""

from __future__ import annotations

import ctypes
import functools
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hf_lowbit.kernels.cpu.library import DTYPES, open_library
from hf_lowbit.kernels.latent_case import Case, pairs_of

ABI = 1
ISAS = ("none", "AVX-512 BF16", "AMX")
_BLOCK, _PAIRS, _STEP = 32, 16, 32  # csrc/latent.h


class _Latents(ctypes.Structure):
    """``hflb_latents`` of ``csrc/latent.h``."""

    _fields_ = (
        ("rows", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("batch_stride", "token_stride", "groups")),
        *((name, ctypes.c_void_p) for name in ("ranks", "owner", "up")),
        *((name, ctypes.c_int64) for name in ("up_head", "up_row")),
        ("bias", ctypes.c_void_p),
    )


class _Attention(ctypes.Structure):
    """``hflb_attention`` of ``csrc/latent.h``."""

    _fields_ = (
        ("keys", _Latents),
        ("values", _Latents),
        *((name, ctypes.c_void_p) for name in ("q", "place", "frequencies", "scale", "turns", "norm", "positions")),
        ("positions_stride", ctypes.c_int64),
        ("mask", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("mask_batch", "mask_head", "batch", "tokens", "heads", "kv_heads")),
        *((name, ctypes.c_int64) for name in ("head_dim", "pairs", "bits")),
        *((name, ctypes.c_float) for name in ("scaling", "eps")),
        *((name, ctypes.c_void_p) for name in ("out", "lse")),
    )


@functools.cache
def _library() -> tuple[Any, str]:
    library, reason = open_library("_latent", "hflb_latent_abi", ABI)
    if library is not None:
        pointer, integer = ctypes.c_void_p, ctypes.c_int64
        library.hflb_attend.argtypes = [ctypes.POINTER(_Attention), integer, integer]
        library.hflb_latent_encode.restype = None
        library.hflb_latent_encode.argtypes = [
            pointer, integer, integer, integer, pointer, integer, integer, pointer, pointer, integer,
        ]  # fmt: skip
    return library, reason


@functools.cache
def load() -> tuple[Any, int, str]:
    """Return the library and how the processor multiplies, an index of :data:`ISAS`, or None, 0 and why not."""
    library, reason = _library()
    if library is None:
        return None, 0, f"no compiled library: {reason}"
    isa = library.hflb_latent_isa()
    return (library, isa, "") if isa else (None, 0, "the processor does not multiply bfloat16")


def why_not(case: Case) -> str | None:
    """Return why the kernel cannot take this case, None if it can."""
    if case.q.device.type != "cpu":
        return f"tensors on {case.q.device.type}"
    if case.q.dtype != torch.bfloat16 or (not case.bits and {case.keys.dtype, case.values.dtype} != {torch.bfloat16}):
        return f"computes in bfloat16, q is {case.q.dtype}, keys are {case.keys.dtype}"
    library, _, reason = load()
    return None if library is not None else reason


class Prepared:
    """What stays the same from token to token: factors as the library wants them, tables, sizes.

    Factors that have its form already, as those of most models do, are not copied.
    """

    def __init__(self, case: Case) -> None:
        """Bring factors into their form; the tensors of the case must outlive the object."""
        kv_heads, head_dim, _ = case.up_k.shape
        half = case.rotated_pairs
        place = _places(head_dim, half)
        self.pairs = len(place) // 2
        self.width = len(place)
        used = place.clamp(min=0)
        self._place, self._used, self._filled = place, used, place >= 0
        # Those that are copied are held, too: as long as they live, no other tensor can be found at their place.
        self.kept = [tensor for tensor in (case.inv_freq, case.bias_k, case.bias_v) if tensor is not None]
        struct = self.struct = _Attention()
        struct.head_dim, struct.kv_heads, struct.pairs = head_dim, kv_heads, self.pairs
        struct.heads, struct.scaling, struct.eps = case.q.shape[1], case.scaling, case.eps
        frequencies = torch.zeros(self.pairs)
        if case.inv_freq is not None:
            frequencies[:half] = case.inv_freq.float()
        scale = torch.ones(self.pairs)
        scale[:half] = case.rope_scale
        angle = frequencies.double()[:, None] * torch.arange(_BLOCK)
        struct.place, struct.frequencies = self._at(place), self._at(frequencies)
        struct.scale = self._at(scale)
        struct.turns = self._at(torch.stack([angle.cos(), angle.sin()], dim=1).float())
        up_k, up_v = case.up_k.detach(), case.up_v.detach()
        whole = self.width == head_dim and torch.equal(place, torch.arange(head_dim))
        if not whole or up_k.shape[-1] % _STEP:
            up_k = up_k[:, used] * self._filled[:, None]
            up_k = torch.nn.functional.pad(up_k, (0, -up_k.shape[-1] % _STEP))
        bias_k = None if case.bias_k is None else self.ordered(case.bias_k.detach().float().view(kv_heads, -1))
        bias_v = None if case.bias_v is None else case.bias_v.detach().float()
        self._fill(struct.keys, up_k, case.ranks_k, case.groups_k, bias_k)
        self._fill(struct.values, up_v, case.ranks_v, case.groups_v, bias_v)

    def _fill(self, part: Any, up: Tensor, ranks: Any, owner: Any, bias: Tensor | None) -> None:
        up = up.bfloat16().contiguous()
        part.groups, part.ranks, part.owner = len(ranks), self._at(torch.tensor(ranks)), self._at(torch.tensor(owner))
        part.up, part.up_head, part.up_row = self._at(up), up.stride(0), up.stride(1)
        part.bias = None if bias is None else self._at(bias)

    def _at(self, tensor: Tensor) -> int:
        tensor = tensor.contiguous()
        self.kept.append(tensor)
        return tensor.data_ptr()

    def ordered(self, rows: Tensor) -> Tensor:
        """Return numbers of a key's coordinates (..., head_dim) in the order of the library."""
        return (rows[..., self._used] * self._filled).contiguous()


def _places(head_dim: int, half: int) -> Tensor:
    """Return for each row of the library's pairs the coordinate that it is, -1 for none; filled up to 16 pairs."""
    first, second = pairs_of(head_dim, half)
    missing = [-1] * (-len(first) % _PAIRS)
    return torch.tensor([*first, *missing, *second, *missing])


# Prepared cases by the keys' factor, as long as that lives: its id, checked against a weak reference.
_PREPARED: dict[int, tuple[Any, Any, Prepared]] = {}


def prepared(case: Case) -> Prepared:
    """Return the prepared form of a case, made at the first call and again whenever its tensors or options change."""
    stamp = _stamp(case)
    key = id(case.up_k)
    found = _PREPARED.get(key)
    if found is not None and found[0]() is case.up_k and found[1] == stamp:
        return found[2]
    made = Prepared(case)
    _PREPARED[key] = (weakref.ref(case.up_k, lambda _: _PREPARED.pop(key, None)), stamp, made)
    return made


def _stamp(case: Case) -> Any:
    """Where the tensors are, how often each was written to (not counted in inference mode), and options."""
    tensors = case.up_k, case.up_v, case.bias_k, case.bias_v, case.inv_freq
    places = [
        None if tensor is None else (tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version)
        for tensor in tensors
    ]
    grouping = [tuple(part) for part in (case.groups_k, case.ranks_k, case.groups_v, case.ranks_v)]
    return places, grouping, case.q.shape[1], case.scaling, case.rope_scale, case.eps


def decode(case: Case) -> tuple[Tensor, Tensor]:
    """Attend; the results are those of :func:`hf_lowbit.kernels.latent_attention.latent_decode`.

    Raises:
        MemoryError: there is no memory for some thousand numbers.
    """
    library, isa, _ = load()
    made = prepared(case)
    q = case.q.contiguous()
    batch, heads, _ = q.shape
    out, lse = torch.empty_like(q), torch.empty(batch, heads)
    if not batch:
        return out, lse
    struct = _Attention.from_buffer_copy(made.struct)
    held = []
    for part, rows in ((struct.keys, case.keys), (struct.values, case.values)):
        if rows.stride(2) != 1:
            rows = rows.contiguous()
            held.append(rows)
        size = rows.element_size()
        part.rows, part.batch_stride, part.token_stride = rows.data_ptr(), rows.stride(0) * size, rows.stride(1) * size
    if case.norm is not None:
        norm = made.ordered(case.norm.detach().float())
        held.append(norm)
        struct.norm = norm.data_ptr()
    if case.positions is not None:
        positions = case.positions
        if positions.stride(1) != 1 or positions.dtype != torch.int32:
            positions = positions.to(torch.int32).contiguous()
            held.append(positions)
        struct.positions, struct.positions_stride = positions.data_ptr(), positions.stride(0)
    if case.mask is not None:
        mask = case.mask
        if mask.dtype == torch.bool:
            mask = torch.zeros(mask.shape).masked_fill_(~mask, -torch.inf)
        mask = mask.float().contiguous()
        held.append(mask)
        struct.mask = mask.data_ptr()
        struct.mask_batch = mask.stride(0) if mask.shape[0] > 1 else 0
        struct.mask_head = mask.stride(1) if mask.shape[1] > 1 else 0
    struct.batch, struct.tokens, struct.bits = batch, case.keys.shape[1], case.bits
    struct.q, struct.out, struct.lse = q.data_ptr(), out.data_ptr(), lse.data_ptr()
    if library.hflb_attend(ctypes.byref(struct), isa, torch.get_num_threads()):
        raise MemoryError("attention over latents: no memory for what lies between")
    return out, lse


def encode(latents: Tensor, ranks: Sequence[int], bits: int, row_bytes: int) -> Tensor | None:
    """Return what :func:`hf_lowbit.kernels.latent_codec.encode_rows` finds, or None where the library cannot."""
    library, _ = _library()
    if library is None or latents.device.type != "cpu" or latents.dtype not in DTYPES:
        return None
    latents = latents.detach().contiguous()
    width = latents.shape[-1]
    rows = latents.numel() // width
    out = torch.empty((*latents.shape[:-1], row_bytes), dtype=torch.uint8)
    places = torch.tensor(ranks)
    buffer = torch.empty(max(ranks))
    library.hflb_latent_encode(
        latents.data_ptr(), DTYPES[latents.dtype], rows, width, places.data_ptr(), len(ranks), bits,
        buffer.data_ptr(), out.data_ptr(), row_bytes,
    )  # fmt: skip
    return out
