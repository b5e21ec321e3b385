"""Which kernel runs for a layer and why; and how fast it is beside a dense product."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from hf_lowbit.compress.headers import packed_layer_spec
from hf_lowbit.formats import (
    FORMATS,
    BinaryFormat,
    BinarySpec,
    Format,
    IntegerFormat,
    IntegerSpec,
    LowRankFormat,
    LowRankSpec,
    Spec,
)
from hf_lowbit.formats.low_rank import FACTOR_DTYPES, FACTORS, INNER
from hf_lowbit.kernels import dispatch, low_rank
from hf_lowbit.report.inspect import inspect

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# What ARB-LLM_RC finds on average, see the tables of `python -m benchmarks.quality.arb`.
SALIENT_SHARE = 0.094


def typical_spec(rows: int, columns: int) -> BinarySpec:
    """Return the form of a layer that the default options of ARB-LLM make."""
    salient = round(SALIENT_SHARE * columns)
    return BinarySpec(rows, columns, groups=2, salient=salient, salient_groups=2, col_scales=True)


def random_weight(spec: BinarySpec) -> BinaryFormat:
    """Return a packed weight with random bits and scales; for speed, where values do not matter."""
    n, m, count, entries = spec.out_features, spec.in_features, spec.salient, spec.salient_groups + spec.groups
    code = (torch.rand(n, m) < 0.5).to(torch.uint8) if spec.groups > 1 else None
    return BinaryFormat.pack(
        spec,
        sign=torch.rand(n, m) < 0.5,
        row_scale=torch.rand(entries + spec.salient_groups, spec.blocks, n) * 0.01 + 0.01,
        code=code,
        row_shift=torch.randn(entries, spec.blocks, n) * 0.01 if spec.shift else None,
        col_scale=torch.rand(max(spec.groups, spec.salient_groups), m) + 0.5 if spec.col_scales else None,
        salient=torch.randperm(m)[:count].sort().values if count else None,
        sign2=torch.rand(n, count) < 0.5 if count else None,
        col_scale2=torch.rand(spec.salient_groups, count) + 0.5 if count and spec.col_scales else None,
    )


def random_format(spec: Spec) -> Format:
    """Return a packed weight of any format with random contents; for speed, where values do not matter."""
    if isinstance(spec, BinarySpec):
        return random_weight(spec)
    if isinstance(spec, LowRankSpec):
        plain = {"up": (spec.out_features, spec.rank), "down": (spec.rank, spec.in_features)}
        dtype = FACTOR_DTYPES[spec.dtype]
        up, down = (
            0.02 * torch.randn(shape) if getattr(spec, name) is None else random_format(getattr(spec, name))
            for name, shape in plain.items()
        )
        return LowRankFormat.pack(up, down, dtype)
    kind = next(one for one in FORMATS.values() if one.spec_type is type(spec))
    tensors = {
        name: 0.02 * torch.rand(shape).to(dtype) if dtype.is_floating_point else torch.randint(256, shape).to(dtype)
        for name, (shape, dtype) in kind.shapes(spec).items()
    }
    return kind.from_state(tensors, spec)


def layer_kinds(path: str | Path | None) -> dict[str, Spec]:
    """Return the kinds of packed layers in a model by a text that describes each; without a model a typical one."""
    if path is None:
        return {"4096 × 4096, as ARB-LLM makes it": typical_spec(4096, 4096)}
    kinds: dict[str, list[Spec]] = {}
    for module in inspect(path).modules:
        _, spec = packed_layer_spec(module.name, {"format": module.format, "spec": module.spec})
        text = "" if isinstance(spec, BinarySpec) else f", {module.format}"
        if isinstance(spec, LowRankSpec):
            held = [INNER[type(inner)].name for inner in (spec.up, spec.down) if inner is not None]
            text += f", rank {spec.rank}" + (f", {' and '.join(dict.fromkeys(held))}" if held else "")
        kinds.setdefault(f"{spec.out_features} × {spec.in_features}{text}", []).append(spec)
    return {f"{len(specs)} × ({kind})": specs[0] for kind, specs in kinds.items()}


def kernels_of(spec: Spec, dtype: torch.dtype, device: str) -> dict[str, str]:
    """Return by kernel why it runs, or does not, for a layer of this form."""
    if isinstance(spec, BinarySpec):
        return dispatch.reasons(dtype, device, *BinaryFormat.empty(spec).call_arguments())
    inner = (spec.up, spec.down) if isinstance(spec, LowRankSpec) else (spec,)
    if isinstance(spec, IntegerSpec):
        return IntegerFormat.empty(spec).kernel_reasons(dtype, device)
    if any(isinstance(one, BinarySpec | IntegerSpec) for one in inner):
        return {"as the factors": "each factor runs as a layer of its own form"}
    if isinstance(spec, LowRankSpec):
        held = FACTOR_DTYPES[spec.dtype]
        up, down = (torch.empty(spec.shape_of(name), dtype=held, device="meta") for name in FACTORS)
        return low_rank.TABLE.reasons(dtype, device, up, down)
    return {"torch": "runs: plain dense products"}


def kernel_table(path: str | Path | None, device: str) -> Table:
    """Return the table of ``hf-lowbit bench --list``: for each kind of layer and dtype which kernel runs, and why."""
    table = Table("layers", "activations", "kernel", "why", title=f"kernels on {device}")
    for kind, spec in layer_kinds(path).items():
        for dtype in DTYPES:
            for name, reason in kernels_of(spec, dtype, device).items():
                table.add_row(kind, str(dtype).removeprefix("torch."), name, reason)
    return table


def timed_in_turn(
    products: Mapping[str, Callable[[int], Any]], seconds: float, least: int = 10
) -> dict[str, list[float]]:
    """Return times in seconds of each product, all in turn for about so long; each is given the number of its turn.

    There are ``least`` turns or more; the first two are not counted.
    """
    times: dict[str, list[float]] = {name: [] for name in products}
    turn, end = 0, time.perf_counter() + seconds
    while time.perf_counter() < end or turn < least:
        for name, product in products.items():
            began = time.perf_counter()
            product(turn)
            if turn > 1:  # the first ones prepare
                times[name].append(time.perf_counter() - began)
        turn += 1
    return times


def _packed_product(weight: Format, x: torch.Tensor, turn: int) -> torch.Tensor:
    return weight.linear(x, None)


def _dense_product(weight: torch.Tensor, x: torch.Tensor, turn: int) -> torch.Tensor:
    return torch.nn.functional.linear(x, weight)


def speed_table(path: str | Path | None, batches: tuple[int, ...] = (1, 16, 128), seconds: float = 2.0) -> Table:
    """Return the table of ``hf-lowbit bench``: products with packed layers beside dense ones in bfloat16, on the CPU.

    Weights stay in the caches, so a large model gains more than this shows; `python -m benchmarks.kernels` in the
    repository measures with cold ones.
    """
    table = Table("layers", "tokens", "packed, µs", "dense, µs", "× dense", title="median times")
    for kind, spec in layer_kinds(path).items():
        packed = random_format(spec)
        dense = torch.randn(spec.out_features, spec.in_features).bfloat16()
        for batch in batches:
            x = torch.randn(batch, spec.in_features).bfloat16()
            products: dict[str, Callable[[int], Any]] = {
                "packed": functools.partial(_packed_product, packed, x),
                "dense": functools.partial(_dense_product, dense, x),
            }
            with torch.no_grad():
                times = timed_in_turn(products, seconds)
            ours, theirs = (1e6 * statistics.median(times[name]) for name in ("packed", "dense"))
            table.add_row(kind, str(batch), f"{ours:,.0f}", f"{theirs:,.0f}", f"{theirs / ours:.2f}")
    return table
