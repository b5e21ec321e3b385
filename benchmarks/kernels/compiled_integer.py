"""What the compiled Triton kernels of format ``integer`` contain; see :mod:`benchmarks.kernels.compiled`.

    python -m benchmarks.kernels.compiled_integer

A layer of 4096 x 4096 weights with groups of 64 columns and zero points; products with bfloat16 and with rounded
activations, and the kernel that rotates and rounds. Adds to ``benchmarks/results/kernels_compiled.json``.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import tempfile
from typing import Any

import torch
from rich.console import Console

from benchmarks.kernels.compiled import TARGETS, Compiled, Target, ahead_of_time, figures, problems, record
from hf_lowbit.kernels.activation import Sizes
from hf_lowbit.kernels.integer import code_bytes
from hf_lowbit.kernels.triton import integer
from hf_lowbit.kernels.tuning import Settings, choose, split_count

SIDE = 4096
# Matrix instructions that multiply bytes, by target.
BYTES = {"sm_80": "IMMA", "sm_89": "IMMA", "sm_90": "IGMMA", "sm_100": "UTCIMMA", "gfx942": "v_mfma_i32"}
BATCHES = {"decode": 1, "skinny": 64, "chunk": 256}
# Bytes of stack that the assembler for sm_90 and newer gives a kernel, of which no instruction reads or writes any.
_FRAME = 8
# Bits and columns of a group; a product of bytes is as long as a tile of 32 units, or as a group of 32 columns.
FLOATS = {2: 64, 3: 128, 4: 64, 8: 0}
CODES = {"2": (2, 128), "4": (4, 64), "4/32": (4, 32), "8": (8, 0)}


def weight_of(bits: int, group: int) -> tuple[Any, ...]:
    """Return packed, scale and zero_point of the layer on ``meta``."""
    groups = SIDE // group if group else 1
    shapes = ((SIDE, code_bytes(SIDE, bits)), (SIDE, groups), (SIDE, code_bytes(groups, bits)))
    kinds = (torch.uint8, torch.float16, torch.uint8)
    packed, scale, zero = (
        torch.empty(shape, dtype=kind, device="meta") for shape, kind in zip(shapes, kinds, strict=True)
    )
    return packed, scale, zero if bits < 8 else None


def _cut(target: Target, bits: int, batch: int, steps: int) -> tuple[Settings, int]:
    settings = choose("integer", (target.name, target.gpu.backend), bits, batch, SIDE, SIDE)
    tiles = -(-SIDE // settings.block_n) * -(-batch // settings.block_m)
    return settings, split_count(tiles, steps, target.cores, settings.programs_per_core)


def _compile(kernel: Any, arguments: dict[str, Any], target: Target, settings: Settings) -> Compiled:
    options = {"num_warps": settings.num_warps, "num_stages": settings.num_stages}
    return ahead_of_time(kernel, arguments, target, settings, **options)


def compile_floats(bits: int, batch: int, target: Target, dtype: torch.dtype = torch.bfloat16) -> dict[str, Any]:
    """Compile the product with floats as it would be launched; figures."""
    sizes = (SIDE, bits, FLOATS[bits])
    units, _ = integer.units_of(bits, SIDE, FLOATS[bits])
    steps = -(-SIDE // (units * integer.UNIT[bits][0]))
    settings, splits = _cut(target, 8 * dtype.itemsize, batch, steps)
    x = torch.empty((batch, SIDE), dtype=dtype, device="meta")
    out = torch.empty((splits, batch, SIDE), dtype=torch.float32 if splits > 1 else dtype, device="meta")
    arguments = integer.kernel_arguments(
        x, weight_of(bits, FLOATS[bits]), None, out, -(-steps // splits), sizes, settings, dtype
    )
    made = _compile(integer.integer_kernel, arguments, target, settings)
    return figures_of(made, units * integer.UNIT[bits][0])


def figures_of(compiled: Compiled, columns: int) -> dict[str, Any]:
    """Return what :func:`figures` does, per weight of a loop's turn that takes so many columns."""
    row = figures(compiled)
    return row | {name: round(row[name] * 128 / columns, 2) for name in ("per_weight", "alu_per_weight")}


def _sizes(kind: str) -> Sizes:
    bits, group = CODES[kind]
    return Sizes(SIDE, bits, group, 128, "token_group", 4, max(64, group))


def compile_codes(kind: str, batch: int, target: Target) -> dict[str, Any]:
    """Compile the product with codes as it would be launched; figures."""
    sizes = _sizes(kind)
    bits, group, steps = sizes.bits, sizes.group_size, integer.stretches(sizes)[1]
    settings, splits = _cut(target, 8, batch, steps)
    codes = torch.empty((batch, integer.tile_width(sizes)), dtype=torch.int8, device="meta")
    scale = torch.empty((batch, SIDE // sizes.act_group_size), device="meta")
    dtype = torch.float32 if splits > 1 else torch.bfloat16
    out = torch.empty((splits, batch, SIDE), dtype=dtype, device="meta")
    arguments = integer.codes_arguments(
        codes, scale, weight_of(bits, group), None, out, -(-steps // splits), sizes, settings, torch.bfloat16
    )
    made = _compile(integer.codes_kernel, arguments, target, settings)
    return figures_of(made, integer.UNITS * integer.per_unit(sizes))


def compile_rounding(kind: str, batch: int, target: Target) -> dict[str, Any]:
    """Compile the kernel that divides, rotates and rounds; figures, which have no weights to count by."""
    sizes = _sizes(kind)
    x = torch.empty((batch, SIDE), dtype=torch.bfloat16, device="meta")
    codes = torch.empty((batch, integer.tile_width(sizes)), dtype=torch.int8, device="meta")
    scale, divisor = torch.empty((batch, SIDE // sizes.act_group_size), device="meta"), x.new_empty(SIDE).float()
    arguments = integer.round_arguments(x, divisor, codes, scale, sizes, target.gpu.backend == "cuda")
    arguments["matrix_ptr"] = torch.empty((128, 128), device="meta")
    settings = Settings(arguments["BLOCK_M"], arguments["BLOCK_K"], integer.ROUNDING_WARPS, 3)
    return figures(ahead_of_time(integer.round_kernel, arguments, target, settings, num_warps=settings.num_warps))


def cases(name: str) -> dict[str, tuple[Any, str | None]]:
    """Return by name what to compile for a target, and the matrix instruction it must have; None for the target's."""
    target, found = TARGETS[name], {}
    for use, batch in BATCHES.items():
        for bits in FLOATS:
            found[f"integer-{bits} {use}"] = (lambda b=bits, m=batch: compile_floats(b, m, target), None)
        for kind in CODES:
            found[f"codes-{kind} {use}"] = (lambda k=kind, m=batch: compile_codes(k, m, target), BYTES[name])
    found["rounding chunk"] = (lambda: compile_rounding("4", 256, target), "")
    return found


def wrong(row: dict[str, Any], name: str, matrix: str | None) -> list[str]:
    """Return what must not be in a shipped kernel."""
    target = TARGETS[name]
    wanted = target if matrix is None else dataclasses.replace(target, matrix=(matrix,))
    if not row["spills"] and row["stack"] <= _FRAME:
        row = row | {"stack": 0}
    return problems(row, wanted, matrix=matrix != "")


def main() -> None:
    """Compile everything, print, write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--uses", default="", help="only those with this in their names, such as codes-4; others stay")
    parser.add_argument("--no-file", action="store_true", help="print only")
    arguments = parser.parse_args()
    results, console = {}, Console()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TRITON_CACHE_DIR"] = folder
        for name in arguments.targets:
            for use, (build, matrix) in cases(name).items():
                if arguments.uses not in use:
                    continue
                row = build()
                found = wrong(row, name, matrix)
                results[f"{name} {use}"] = {**row, "problems": found}
                console.print(name, use, row["registers"], row["shared"], row["matrix"], found or "", row["seconds"])
    if not arguments.no_file:
        record(results)


if __name__ == "__main__":
    main()
