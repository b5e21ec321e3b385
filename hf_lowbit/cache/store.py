"""The cache of a prefix in a file: a long prompt is read once, and its latents serve later runs.

One safetensors file holds, for layer ``i``, ``layers.i.keys``, ``layers.i.values``, ``layers.i.positions`` (with
rotary embeddings), and ``first_keys``, ``first_values``, ``recent_keys``, ``recent_values`` (latents that are kept in
full beside their codes), ``first_slots`` (where rows begin, if they are padded on the left). Its metadata say what the
tensors are, for which model, and carry a checksum of them.

Nothing in a file is believed: its names, shapes and dtypes must be those that the model's own projections call for,
the checksum must fit, and the model must be the one that filled the cache, told by a hash of all its projections of
keys and values. The checksum is against damage, not against an adversary.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import reprlib
import secrets
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.cache_utils import Cache

from hf_lowbit.cache.cache import ReCalKVCache, attention_by_layer
from hf_lowbit.cache.layers import LatentDynamicLayer, LatentSlidingLayer
from hf_lowbit.cache.layout import Layout
from hf_lowbit.errors import CheckpointError
from hf_lowbit.kernels.latent_codec import WORDS, row_bytes

_VERSION = 1
_KEY = "hf_lowbit_cache"
_LONGEST_HEADER = 2**20
_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
_Forms = dict[str, tuple[tuple[int, ...], torch.dtype]]
_KINDS = (LatentDynamicLayer, LatentSlidingLayer)


@dataclasses.dataclass(frozen=True)
class _Header:
    """What the metadata of a file say; see :func:`_read_header` for what is accepted."""

    version: int
    fingerprint: str
    checksum: str
    batch: int
    length: int
    dtype: str
    bits: int
    recent: int
    first: int
    layers: int


def fingerprint(model: nn.Module) -> str:
    """Return a hash of all projections of keys and values of a model with latent attention: what its latents mean."""
    digest = hashlib.sha256()
    for index, attention in sorted(attention_by_layer(model).items()):
        for name in ("k_proj", "v_proj"):
            projection = getattr(attention, name)
            digest.update(f"{index} {name} {projection.spec!r}".encode())
            for _, tensor in projection.packed_tensors():
                digest.update(_bytes(tensor))
    return digest.hexdigest()


def save_cache(cache: Cache, model: nn.Module, path: str | Path) -> None:
    """Write a dynamic cache to a file; a file of that name is replaced in one step, or not at all.

    Args:
        cache: filled by ``model``: the one that ``generate`` or ``forward`` returned, or a :class:`ReCalKVCache`.
        model: with latent attention.
        path: of the file.

    Raises:
        TypeError: ``cache`` is no cache, or ``model`` no model.
        ValueError: the cache is empty or static, not all of its layers hold latents, or another model filled it.
        FileNotFoundError: there is no folder for the file.
        IsADirectoryError: ``path`` is a folder.
    """
    path = Path(path)
    if not isinstance(cache, Cache):
        raise TypeError(f"cache must be a cache of transformers, got {type(cache).__name__}")
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; give the file a name in it")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path.parent} is no folder; make it first")
    attentions = attention_by_layer(model)
    layers: list[Any] = list(cache.layers)
    for index, layer in enumerate(layers):
        if not isinstance(layer, _KINDS) or index not in attentions:
            raise ValueError(
                f"layer {index} of the cache is a {type(layer).__name__}; a file takes dynamic caches whose layers "
                "all hold latents"
            )
        own = attentions[index].latent_layout()
        if layer.layout.stamp != own.stamp:
            raise ValueError(f"the cache was filled by another model: its layer {index} is not that of {own.name}")
    lengths = {int(layer.get_seq_length()) for layer in layers}
    if len(lengths) != 1 or len(layers) != len(attentions) or not min(lengths):
        raise ValueError(
            f"the cache holds {sorted(lengths) or 'no'} tokens in {len(layers)} layers; it must be filled, and all "
            f"{len(attentions)} layers alike"
        )
    first = layers[0]
    dtype = str(first.latent_dtype).removeprefix("torch.")
    if dtype not in _DTYPES:
        raise ValueError(f"the cache holds {dtype} latents; a file takes {', '.join(_DTYPES)}")
    tensors = {f"layers.{i}.{name}": part for i, layer in enumerate(layers) for name, part in _tensors(layer).items()}
    header = _Header(
        version=_VERSION,
        fingerprint=fingerprint(model),
        checksum=_checksum(tensors),
        batch=first.keys.shape[0],
        length=min(lengths),
        dtype=dtype,
        bits=first.layout.bits,
        recent=first.layout.recent,
        first=max(layer.layout.first for layer in layers),
        layers=len(layers),
    )
    problems = _problems(tensors, _expected(layers, header, tensors), header.length)
    if problems:  # what would be refused later is not written
        raise ValueError(f"this cache cannot be saved: {'; '.join(problems[:10])}")
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        save_file(tensors, partial, metadata={_KEY: json.dumps(dataclasses.asdict(header))})
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def load_cache(model: Any, path: str | Path) -> ReCalKVCache:
    """Read a cache that :func:`save_cache` wrote.

    Args:
        model: with the same weights as the one that filled the cache.
        path: of the file.

    Returns:
        A cache ready to be passed to ``generate`` or ``forward``, each layer on the device of its projections.

    Raises:
        CheckpointError: the file is no such cache, is damaged, or its tensors are not those that the model calls for.
        ValueError: another model filled it, or one with another dtype.
    """
    path = Path(path)
    attentions = attention_by_layer(model)
    header, tensors = _read(path)
    if header.fingerprint != fingerprint(model):
        raise ValueError(
            f"{path}: this cache was filled by another model; the hash of its projections of keys and values is "
            f"{header.fingerprint[:16]}…"
        )
    if model.dtype != _DTYPES[header.dtype]:
        raise ValueError(f"{path}: this cache holds {header.dtype} latents, the model computes in {model.dtype}")
    cache = ReCalKVCache.from_model(
        model, latent_bits=header.bits or None, recent_window=header.recent, sink_tokens=header.first
    )
    layers: list[Any] = list(cache.layers)
    if len(layers) != header.layers:
        raise CheckpointError(f"{path}: the cache has {header.layers} layers, the model {len(layers)}")
    problems = _problems(tensors, _expected(layers, header, tensors), header.length)
    if problems:
        raise CheckpointError(f"{path}: {'; '.join(problems[:10])}")
    for index, layer in enumerate(layers):
        prefix = f"layers.{index}."
        parts = {key.removeprefix(prefix): part for key, part in tensors.items() if key.startswith(prefix)}
        device = attentions[index].k_proj.weight_down.device
        layer.fill({name: part.to(device) for name, part in parts.items()}, header.length, _DTYPES[header.dtype])
    return cache


# What a file holds -------------------------------------------------------------------------------------------------


def _tensors(layer: Any) -> dict[str, Tensor]:
    """Return the tensors of a layer for a file, without what a window no longer needs."""
    stored = min(layer.get_seq_length(), layer.sliding_window - 1) if layer.is_sliding else layer.get_seq_length()
    parts = {"keys": layer.keys[:, :, -stored:], "values": layer.values[:, :, -stored:]}
    if layer.layout.rotary:
        parts["positions"] = layer.stored_positions[:, -stored:]
    recent = layer.recent(stored)
    if recent is not None:
        parts["recent_keys"], parts["recent_values"] = recent
    early = layer.first(stored)
    if early is not None:
        parts["first_keys"], parts["first_values"] = early
        if layer.first_slots is not None:
            parts["first_slots"] = layer.first_slots.int()
    return {name: part.contiguous().clone() for name, part in parts.items()}


def _expected(layers: list[Any], header: _Header, tensors: dict[str, Tensor]) -> _Forms:
    """Return ``{name: (shape, dtype)}`` that a file of these layers calls for."""
    return {
        f"layers.{index}.{name}": form
        for index, layer in enumerate(layers)
        for name, form in _forms(
            layer, header, tensors.get(f"layers.{index}.recent_keys"), f"layers.{index}.first_slots" in tensors
        ).items()
    }


def _forms(layer: Any, header: _Header, kept: Tensor | None, padded: bool) -> _Forms:
    """Return ``{name: (shape, dtype)}`` that a layer calls for.

    Args:
        layer: of a cache for the model.
        header: of the file.
        kept: its latest keys that are kept in full, if the file has any.
        padded: whether the file says at which slots the rows begin.
    """
    layout: Layout = layer.layout
    stored = min(header.length, layer.sliding_window - 1) if layer.is_sliding else header.length
    dtype = _DTYPES[header.dtype]
    recent = 0  # fewer than the window holds, down to none, after tokens were taken back
    if kept is not None:
        recent = min(kept.shape[2] if kept.dim() == 4 else 1, layout.recent, stored)
    forms: _Forms = {}
    for name, ranks in (("keys", layout.key_ranks), ("values", layout.value_ranks)):
        width = row_bytes(ranks, layout.bits) if layout.bits else sum(ranks)
        forms[name] = (header.batch, 1, stored, width), torch.uint8 if layout.bits else dtype
        if recent:
            forms[f"recent_{name}"] = (header.batch, 1, recent, sum(ranks)), dtype
        if layout.first:
            count = layout.first if padded else min(stored, layout.first)
            forms[f"first_{name}"] = (header.batch, 1, count, sum(ranks)), dtype
    if layout.first and padded:
        forms["first_slots"] = (header.batch,), torch.int32
    if layout.rotary:
        forms["positions"] = (header.batch, stored), torch.int32
    return forms


def _problems(tensors: dict[str, Tensor], expected: _Forms, length: int) -> list[str]:
    found = [f"{name} is missing" for name in expected if name not in tensors]
    found += [f"{reprlib.repr(name)} does not belong there" for name in tensors if name not in expected]
    for name, tensor in tensors.items():
        want = expected.get(name)
        if want is None:
            continue
        if (tuple(tensor.shape), tensor.dtype) != want:
            found.append(f"{name} is {tensor.dtype} {tuple(tensor.shape)}, expected {want[1]} {want[0]}")
        elif tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            found.append(f"{name} holds NaN or infinity")
        elif name.endswith("positions") and bool((tensor < 0).any()):
            found.append(f"{name} holds a negative position")
        elif name.endswith("first_slots") and not 0 <= int(tensor.min()) <= int(tensor.max()) < length:
            found.append(f"{name} is out of range")
    return found


def _read(path: Path) -> tuple[_Header, dict[str, Tensor]]:
    try:
        with safe_open(path, "pt") as file:
            header = _read_header(path, (file.metadata() or {}).get(_KEY))
            if len(file.keys()) > 8 * header.layers:
                raise CheckpointError(f"{path}: {len(file.keys())} tensors are too many for {header.layers} layers")
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: cannot be read as a safetensors file: {error}") from error
    if _checksum(tensors) != header.checksum:
        raise CheckpointError(f"{path}: the tensors do not fit their checksum: the file is damaged")
    return header, tensors


def _read_header(path: Path, text: str | None) -> _Header:
    if text is None:
        raise CheckpointError(f"{path}: not a cache file (no {_KEY!r} in its metadata)")
    found: Any
    try:
        found = json.loads(text) if len(text) <= _LONGEST_HEADER else None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: {_KEY!r} in its metadata is not JSON") from error
    fields = {field.name: {"int": int, "str": str}[str(field.type)] for field in dataclasses.fields(_Header)}
    if isinstance(found, dict) and found.get("version") not in (None, _VERSION):
        raise CheckpointError(f"{path}: version {reprlib.repr(found['version'])} of cache files is not known")
    fitting = isinstance(found, dict) and set(found) == set(fields)
    if not fitting or any(type(found[name]) is not kind for name, kind in fields.items()):
        raise CheckpointError(f"{path}: {_KEY!r} in its metadata must hold {', '.join(fields)}, each of its type")
    header = _Header(**found)
    ranges = {
        "batch": header.batch >= 1,
        "length": 1 <= header.length < 2**31,
        "layers": 1 <= header.layers <= 2**16,
        "recent": 0 <= header.recent < 2**31,
        "first": 0 <= header.first < 2**31,
        "bits": header.bits == 0 or header.bits in WORDS,
        "dtype": header.dtype in _DTYPES,
    }
    bad = [f"{name} {reprlib.repr(found[name])}" for name, fine in ranges.items() if not fine]
    if bad or (header.recent and not header.bits):
        raise CheckpointError(f"{path}: out of range in its metadata: {', '.join(bad) or 'recent'}")
    return header


def _checksum(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(_bytes(tensor))
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> Any:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
