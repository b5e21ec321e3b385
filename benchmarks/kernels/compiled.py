"""What the compiled Triton kernels contain, without a GPU: registers, spills, shared memory, matrix instructions.

    python -m benchmarks.kernels.compiled                    # all targets and variants, some minutes
    python -m benchmarks.kernels.compiled --targets sm_90    # the others keep the figures they have

Each shipped setting of each variant is compiled for real targets with the assembler that comes with Triton, and the
machine code is read. Writes ``benchmarks/results/kernels_compiled.json``. None of this is a speed.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import subprocess
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import triton
from rich.console import Console
from rich.table import Table
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from benchmarks.common import RESULTS, write_result
from hf_lowbit.formats import BinaryFormat, BinarySpec
from hf_lowbit.kernels.triton import binary, low_rank
from hf_lowbit.kernels.triton.binary_kernels import binary_kernel, columns_kernel, reduce_kernel
from hf_lowbit.kernels.triton.low_rank_kernels import low_rank_kernel
from hf_lowbit.kernels.tuning import Settings, choose, split_count

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclasses.dataclass(frozen=True)
class Target:
    """A kind of GPU; ``matrix`` are the instructions of its matrix units, ``shared`` the bytes a program may use."""

    name: str
    gpu: GPUTarget
    matrix: tuple[str, ...]
    shared: int
    cores: int


# Shared memory per program: 163 KB on sm_80, 99 KB on sm_89, 227 KB on sm_90 and sm_100, 64 KB on gfx942. Cores are
# those of the A100, L40S, H100, B200 and MI300X; they only decide into how many pieces K is cut.
TARGETS = {
    target.name: target
    for target in (
        Target("sm_80", GPUTarget("cuda", 80, 32), ("HMMA",), 163 * 1024, 108),
        Target("sm_89", GPUTarget("cuda", 89, 32), ("HMMA",), 99 * 1024, 142),
        Target("sm_90", GPUTarget("cuda", 90, 32), ("HGMMA",), 227 * 1024, 132),
        Target("sm_100", GPUTarget("cuda", 100, 32), ("UTCHMMA",), 227 * 1024, 148),
        Target("gfx942", GPUTarget("hip", "gfx942", 64), ("v_mfma",), 64 * 1024, 304),
    )
}
# The methods' variants on a layer of 4096 x 4096 weights with 6 % salient columns.
_SIZES: dict[str, Any] = {"out_features": 4096, "in_features": 4096, "block_size": 128}
_SALIENT = {"salient": 256, "salient_groups": 2, "groups": 2}
VARIANTS = {
    "rtn": BinarySpec(**_SIZES),
    "billm": BinarySpec(**_SIZES, salient=256, salient_groups=1, groups=2, shift=True),
    "arb": BinarySpec(**_SIZES, **_SALIENT, shift=True),
    "rc": BinarySpec(**_SIZES, **_SALIENT, col_scales=True),
    "rc-4-groups": BinarySpec(**_SIZES, **{**_SALIENT, "groups": 4}, col_scales=True),
    "rc-2:4": BinarySpec(**_SIZES, **_SALIENT, col_scales=True, keep_n=2, keep_m=4),
    "arb-4:8": BinarySpec(**_SIZES, **_SALIENT, shift=True, keep_n=4, keep_m=8),
}
LOW_RANK, RANK = "low-rank", 816  # two factors of such a layer at a ratio of 0.4, a multiple of 16
BATCHES = {"decode": 1, "few": 32, "skinny": 64, "chunk": 256, "prefill": 2048}


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A compiled kernel and how it was compiled."""

    kernel: Any
    target: Target
    settings: Settings
    seconds: float


def compile_binary(
    spec: BinarySpec, batch: int, dtype: torch.dtype, target: Target, settings: Settings | None = None
) -> Compiled:
    """Compile the main kernel as :func:`hf_lowbit.kernels.triton.binary.run` would launch it, on meta tensors."""
    packed = BinaryFormat.empty(spec)
    parts = tuple(getattr(packed, name) for name in BinaryFormat.tensor_names)
    weight = binary.weight_of(dtype, *parts, spec.in_features, spec.block_size, spec.keep_n, spec.keep_m)
    settings = choose(
        "binary", (target.name, target.gpu.backend), 8 * dtype.itemsize, batch, spec.out_features, spec.in_features
    )
    tiles = -(-spec.out_features // settings.block_n) * -(-batch // settings.block_m)
    splits = split_count(tiles, weight.column_groups, target.cores, settings.programs_per_core)
    x = torch.empty((batch, binary.input_width(weight)), dtype=dtype, device="meta")
    out = torch.empty((splits, batch, spec.out_features), dtype=torch.float32 if splits > 1 else dtype, device="meta")
    arguments = binary.kernel_arguments(x, weight, None, out, splits, settings, dtype)
    options = {"num_warps": settings.num_warps, "num_stages": settings.num_stages}
    return ahead_of_time(binary_kernel, arguments, target, settings, **options)


def ahead_of_time(
    function: Any, arguments: dict[str, Any], target: Target, settings: Settings, **options: Any
) -> Compiled:
    """Compile a kernel for arguments that a launch would have: types, alignment and ones are taken from them."""
    types, constants, attributes = {}, {}, {}
    for parameter in function.params:
        value, kind = arguments[parameter.name], "constexpr"
        if isinstance(value, torch.Tensor):
            kind = _POINTERS[value.dtype]
        elif isinstance(value, int) and not parameter.is_constexpr and (value != 1 or parameter.do_not_specialize):
            kind = "i32"
        types[parameter.name] = kind
        if kind == "constexpr":
            constants[parameter.name] = value
        elif kind != "i32" or (value % 16 == 0 and not parameter.do_not_specialize):
            attributes[(parameter.num,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=function, signature=types, constexprs=constants, attrs=attributes)
    start = time.perf_counter()
    kernel = triton.compile(source, target=target.gpu, options={**options, "enable_fp_fusion": True})
    return Compiled(kernel, target, settings, time.perf_counter() - start)


_POINTERS = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.uint8: "*u8",
    torch.int8: "*i8",
    torch.int32: "*i32",
}


def compile_helpers(spec: BinarySpec, batch: int, dtype: torch.dtype, target: Target) -> dict[str, Compiled]:
    """Compile the kernels before and after the main one."""
    settings = Settings(1, 1, 4, 3)
    x = torch.empty((batch, spec.in_features), dtype=dtype, device="meta")
    parts = torch.empty((4, batch, spec.out_features), dtype=torch.float32, device="meta")
    out = torch.empty((batch, spec.out_features), dtype=dtype, device="meta")
    salient = torch.empty(spec.salient, dtype=torch.int32, device="meta")
    columns = binary.columns_arguments(x, salient, x.new_empty((batch, 4096 + 256)), dtype)
    reduce = binary.reduce_arguments(parts, None, out, dtype)
    return {
        "columns": ahead_of_time(columns_kernel, columns, target, settings),
        "reduce": ahead_of_time(reduce_kernel, reduce, target, settings),
    }


def compile_low_rank(batch: int, dtype: torch.dtype, target: Target) -> Compiled:
    """Compile the kernel of two factors as :func:`hf_lowbit.kernels.triton.low_rank.run` would launch it."""
    up, down = (torch.empty(shape, dtype=dtype, device="meta") for shape in ((4096, RANK), (RANK, 4096)))
    shape = low_rank.shape_of(4096, RANK, batch, target.cores, dtype)
    x = torch.empty((batch, 4096), dtype=dtype, device="meta")
    out = torch.empty((shape.groups(RANK), batch, 4096), dtype=torch.float32, device="meta")
    arguments = low_rank.kernel_arguments(x, up, down, None, out, shape, dtype)
    # both loops take as many weights at a turn, so figures per weight hold: 128 columns of `block_r` rows of `down`
    tile = Settings(shape.block_r, shape.block_m, shape.num_warps, shape.num_stages)
    options = {"num_warps": shape.num_warps, "num_stages": shape.num_stages}
    return ahead_of_time(low_rank_kernel, arguments, target, tile, **options)


# What the machine code contains -----------------------------------------------------------------------------------

# Instructions of the arithmetic units that unpacking needs; moves, memory, matrix and control are none of them.
ALU = re.compile(
    r"(LOP3|PLOP3|SHF|IMAD|IADD3|VIADD|PRMT|SEL|FSEL|ISETP|FSETP|FMUL|FADD|FFMA|HMUL2|HFMA2|HADD2|F2FP?|I2F|I2FP|LEA)\b"
)


def figures(compiled: Compiled) -> dict[str, Any]:
    """Return registers, stack, spills, shared memory and instruction counts of a compiled kernel.

    ``per_weight`` and ``alu_per_weight`` count the instructions of the loop that walks the groups, over all threads,
    per weight that one turn of the loop unpacks.
    """
    nvidia = compiled.target.gpu.backend == "cuda"
    found = _nvidia(compiled.kernel) if nvidia else _amd(compiled.kernel)
    loop = found.pop("loop")
    threads = compiled.settings.num_warps * compiled.target.gpu.warp_size
    weights = compiled.settings.block_n * 128
    alu = sum(1 for op in loop if (ALU.match(op) if nvidia else op.startswith("v_") and not _is_matrix(op)))
    return {
        **found,
        "shared": compiled.kernel.metadata.shared,
        "matrix_in_loop": sum(map(_is_matrix, loop)),
        "per_weight": round(len(loop) * threads / weights, 2),
        "alu_per_weight": round(alu * threads / weights, 2),
        "settings": dataclasses.asdict(compiled.settings),
        "seconds": round(compiled.seconds, 1),
    }


def _is_matrix(op: str) -> bool:
    return "MMA" in op or op.startswith("v_mfma")


def _nvidia(kernel: Any) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(kernel.asm["cubin"])
        usage, sass = (
            subprocess.run(
                [str(TOOLS / "cuobjdump"), flag, str(path)], capture_output=True, text=True, check=True
            ).stdout
            for flag in ("-res-usage", "-sass")
        )
    registers = re.search(r"REG:(\d+).*?STACK:(\d+)", usage)
    if registers is None:
        raise RuntimeError(f"cuobjdump names no registers:\n{usage}")
    lines = re.findall(r"/\*([0-9a-f]{4,5})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);", sass)
    code = [(int(address, 16), op, rest) for address, op, rest in lines]
    counts = Counter(op.split(".")[0] for _, op, _ in code)
    return {
        "registers": int(registers[1]),
        "stack": int(registers[2]),
        "spills": counts["LDL"] + counts["STL"],
        "matrix": {op: number for op, number in sorted(counts.items()) if _is_matrix(op)},
        "instructions": len(code),
        "loop": _loop(
            [(a, op, int(t[1], 16) if (t := re.search(r"0x([0-9a-f]+)", r)) else None) for a, op, r in code]
        ),
    }


def _address(operands: str) -> int | None:
    found = re.search(r"0x([0-9a-f]+)", operands)
    return int(found[1], 16) if found else None


def _loop(code: list[tuple[int, str, int | None]]) -> list[str]:
    """Instructions of the loop that walks the groups, from (address, name, branch target).

    That is the shortest one with at least half as many matrix instructions as any: code moved out of line jumps back
    too, which looks like a loop around several.
    """
    bodies = [
        [name for place, name, _ in code if target <= place <= address]
        for address, op, target in code
        if op.startswith(("BRA", "s_cbranch", "s_branch")) and target is not None and target < address
    ]
    most = max((sum(map(_is_matrix, body)) for body in bodies), default=0)
    return min((body for body in bodies if most and sum(map(_is_matrix, body)) * 2 >= most), key=len, default=[])


def _amd(kernel: Any) -> dict[str, Any]:
    text = kernel.asm["amdgcn"]

    def number(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", text)
        if found is None:
            raise RuntimeError(f"the assembly names no {name}")
        return int(found[1])

    labels: dict[str, int] = {}
    code: list[tuple[int, str, str]] = []
    for line in text.splitlines():
        if label := re.match(r"(\.?\w+):", line):
            labels[label[1]] = len(code)
        elif instruction := re.match(r"\t([sv]_\w+|ds_\w+|global_\w+|buffer_\w+|scratch_\w+)(?:\s+(\S+))?", line):
            code.append((len(code), instruction[1], instruction[2] or ""))
    counts = Counter(op for _, op, _ in code)
    return {
        "registers": number("vgpr_count"),
        "stack": number("private_segment_fixed_size"),
        "spills": number("vgpr_spill_count"),  # scalar registers spill into vector registers, not into memory
        "matrix": {op: count for op, count in sorted(counts.items()) if _is_matrix(op)},
        "instructions": len(code),
        "loop": _loop([(place, op, labels.get(target)) for place, op, target in code]),
    }


def problems(found: dict[str, Any], target: Target, matrix: bool = True) -> list[str]:
    """Return what must not be in a shipped kernel, empty if nothing is."""
    wrong = []
    if found["stack"] or found["spills"]:
        wrong.append(f"{found['spills']} spills, {found['stack']} bytes of stack")
    if found["shared"] > target.shared:
        wrong.append(f"{found['shared']} bytes of shared memory, the limit is {target.shared}")
    if matrix and not any(op.startswith(target.matrix) for op in found["matrix"]):
        wrong.append(f"no {' or '.join(target.matrix)}, only {found['matrix']}")
    return wrong


def main() -> None:
    """Compile everything, print a table, write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    variants = [*VARIANTS, LOW_RANK]
    parser.add_argument("--variants", nargs="+", choices=variants, default=variants)
    parser.add_argument("--batches", nargs="+", choices=BATCHES, default=list(BATCHES))
    parser.add_argument("--no-file", action="store_true", help="print only")
    arguments = parser.parse_args()
    table = Table(
        "target", "variant", "use", "tile", "registers", "stack", "shared", "matrix", "ALU/weight", "all", "s"
    )
    console, results = Console(), {}
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TRITON_CACHE_DIR"] = folder
        for name in arguments.targets:
            for variant in arguments.variants:
                for use in arguments.batches:
                    target, batch = TARGETS[name], BATCHES[use]
                    if variant == LOW_RANK:
                        if batch > low_rank.MOST_TOKENS:
                            continue
                        row = figures(compile_low_rank(batch, torch.bfloat16, target))
                    else:
                        row = figures(compile_binary(VARIANTS[variant], batch, torch.bfloat16, target))
                    results[f"{name} {variant} {use}"] = {**row, "problems": problems(row, target)}
                    table.add_row(name, variant, use, *_cells(row, target))
                    console.print(name, variant, use, *_cells(row, target))
    console.print(table)
    if not arguments.no_file:
        record(results)


def record(results: dict[str, Any]) -> None:
    """Write figures by name; those of the same Triton that are not among them stay."""
    path = RESULTS / "kernels_compiled.json"
    before = json.loads(path.read_text("utf-8")) if path.exists() else {}
    kept = before["kernels"] if before.get("triton") == triton.__version__ else {}
    shape = [VARIANTS["rtn"].out_features, VARIANTS["rtn"].in_features]
    kernels = dict(sorted({**kept, **results}.items()))
    write_result("kernels_compiled", {"shape": shape, "triton": triton.__version__, "kernels": kernels})


def _cells(row: dict[str, Any], target: Target) -> list[str]:
    wrong = problems(row, target)
    return [
        f"{row['settings']['block_n']}×{row['settings']['block_m']}",
        str(row["registers"]),
        f"[red]{row['stack']}[/red]" if row["stack"] or row["spills"] else "0",
        f"{row['shared'] / 1024:.0f} KB",
        " ".join(f"{op} {number}" for op, number in row["matrix"].items()) if wrong == [] else f"[red]{wrong}[/red]",
        f"{row['alu_per_weight']:.1f}",
        f"{row['per_weight']:.1f}",
        f"{row['seconds']:.0f}",
    ]


if __name__ == "__main__":
    main()
