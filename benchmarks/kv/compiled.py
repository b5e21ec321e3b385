"""What the compiled Triton kernels for attention over latents contain, without a GPU.

    python -m benchmarks.kv.compiled         # all targets and cases, some minutes

Each kernel is compiled for real targets with the assembler that comes with Triton, as a launch with 16384 tokens would
have it, and the machine code is read. Writes ``benchmarks/results/kv_compiled.json``. None of this is a speed.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
import triton

from benchmarks.common import write_result
from benchmarks.kernels.compiled import TARGETS, Compiled, Target, ahead_of_time, figures, problems
from benchmarks.kv.cases import SHAPES, Shape
from hf_lowbit.kernels.latent_case import Case
from hf_lowbit.kernels.latent_codec import row_bytes
from hf_lowbit.kernels.triton import latent
from hf_lowbit.kernels.tuning import Settings

KERNELS = ("scores", "values", "results")
TOKENS = 16384
_SHAPES = ("SmolLM2-135M", "32 heads, groups of 1")
_TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")


def case_of(shape: Shape, bits: int, dtype: torch.dtype = torch.bfloat16) -> Case:
    """Return the arguments of the op on ``meta``."""
    ranks = [shape.key_rank] * (shape.kv_heads // shape.together)
    n, dh = shape.kv_heads, shape.head_dim

    def held(widths: list[int]) -> torch.Tensor:
        width = row_bytes(widths, bits) if bits else sum(widths)
        return torch.empty(1, TOKENS, width, dtype=torch.uint8 if bits else dtype, device="meta")

    def made(*sizes: int, kind: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(sizes, dtype=kind, device="meta")

    return Case(
        q=made(1, shape.heads, dh),
        keys=held(ranks),
        values=held([shape.value_rank]),
        up_k=made(n, dh, shape.key_rank),
        up_v=made(n, dh, shape.value_rank),
        bias_k=None,
        bias_v=None,
        norm=None,
        positions=made(1, TOKENS, kind=torch.int32),
        inv_freq=made(dh // 2, kind=torch.float32),
        mask=None,
        groups_k=[head // shape.together for head in range(n)],
        ranks_k=ranks,
        groups_v=[0] * n,
        ranks_v=[shape.value_rank],
        scaling=dh**-0.5,
        rope_scale=1.0,
        eps=0.0,
        bits=bits,
    )


def compile_kernels(case: Case, target: Target, compute: torch.dtype = torch.bfloat16) -> dict[str, Compiled]:
    """Compile the three kernels as :func:`hf_lowbit.kernels.triton.latent.run` would launch them."""
    found = {}
    for name, (kernel, _, arguments, options) in zip(
        KERNELS, latent.launches_of(case, compute, target.cores), strict=True
    ):
        tile = Settings(1, 1, options["num_warps"], options["num_stages"])
        found[name] = ahead_of_time(kernel, arguments, target, tile, **options)
    return found


def wrong(name: str, found: dict[str, Any], target: Target) -> list[str]:
    """Return what should not be in a compiled kernel; the last one has no products. Tiles this small take any matrix
    instruction of the target's generation or of those before it.
    """
    listed = problems(found, target, matrix=False)
    if name != "results" and not found["matrix"]:
        listed.append("no matrix instructions")
    return listed


def main() -> None:
    """Parse arguments, compile, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", nargs="+", choices=_TARGETS, default=_TARGETS)
    result: dict[str, Any] = {}
    for name in parser.parse_args().targets:
        target = TARGETS[name]
        for shape_name in _SHAPES:
            for bits in (0, 4):
                held = f"{bits} bits" if bits else "bfloat16"
                for kernel, compiled in compile_kernels(case_of(SHAPES[shape_name], bits), target).items():
                    found = figures(compiled)
                    kept = {key: found[key] for key in ("registers", "spills", "shared", "matrix")}
                    found = {**kept, "problems": wrong(kernel, found, target)}
                    result[f"{name} | {shape_name} | {held} | {kernel}"] = found
                    print(name, shape_name, held, kernel, found, flush=True)
    write_result("kv_compiled", {"triton": triton.__version__, "tokens": TOKENS, "kernels": result})


if __name__ == "__main__":
    main()
